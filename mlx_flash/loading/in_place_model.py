"""A checkpoint that is run as it is: the places of its experts and its layers in the files, and how both are streamed.

No family is named here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..flash.experts import ExpertSlots
from ..flash.in_place import InPlaceFiles, TensorParts
from ..flash.safetensors_file import TensorEntry
from ..layers.experts import StreamedExperts
from ..layers.routers import LIKELY_NAMES, Router
from ..source.model_kind import is_projection, switch_layers
from .adapter import Adapter
from .layer_weights import LayerWeights, find_layers, spread
from .lazy_model import open_lazily
from .lookup_tables import Table, find_tables
from .provenance import locate
from .trial_calls import nothing_scheduled


@dataclass
class InPlaceModel:
    """A lazily loaded model, and the places of the experts of its switch layers and of its layers' other weights.

    A dense model has no switch layers.
    """

    model: Any
    config: dict[str, Any]
    files: list[Path]
    switches: dict[str, dict[str, TensorParts]]  # path in the model -> "up_proj.weight" -> places of its E parts
    sources: dict[str, list[str]]  # parameter -> the checkpoint's tensors that it consists of, if known
    entries: dict[str, tuple[int, TensorEntry]]  # the checkpoint's tensors -> (index of the file, entry in its header)
    tensors: dict[str, mx.array]  # the checkpoint's tensors, lazily loaded
    layers: list[LayerWeights]  # those that can be streamed, in the order in which a token needs them
    lookup_tables: list[Table]  # those whose rows can be read
    streamed: set[str]  # paths of the parameters that do not stay in memory
    adapter: Adapter | None = None  # what was put into the model
    part: str = ""  # what this rank computes, where layers are shared out over ranks

    @property
    def experts(self) -> int:
        """The largest number of experts in a layer."""
        return max((len(next(iter(tensors.values())).offsets) for tensors in self.switches.values()), default=0)

    @property
    def expert_bytes(self) -> int:
        """Bytes of all tensors of one expert, in the layer with the largest experts."""
        return max((sum(tensor.nbytes for tensor in tensors.values()) for tensors in self.switches.values()), default=0)

    @property
    def table_bytes(self) -> int:
        """Bytes of all experts' small tensors (such as biases) in all layers, which are kept beside the slots."""
        tensors = [tensor for tensors in self.switches.values() for tensor in tensors.values()]
        return sum(tensor.nbytes * len(tensor.offsets) for tensor in tensors if tensor.is_table)

    def of_experts(self) -> set[str]:
        """The paths of the experts' parameters."""
        return {f"{path}.{name}" for path, tensors in self.switches.items() for name in tensors}

    def of_tables(self) -> set[str]:
        """The paths of the parameters of the lookup tables."""
        return set().union(*(table.names() for table in self.lookup_tables))

    def behind(self, parameters: Iterable[str]) -> set[str]:
        """The checkpoint's tensors that parameters consist of."""
        return {name for key in parameters for name in self.sources.get(key, [])}

    def resident(self) -> Iterator[tuple[str, mx.array]]:
        """(path in the model, array) of every parameter that stays in memory, not yet read."""
        from mlx.utils import tree_flatten

        parameters: Any = tree_flatten(self.model.parameters())
        for name, array in parameters:
            if name not in self.streamed:
                yield name, array

    def stream_experts(self, shared: InPlaceFiles, slots: Sequence[int], window: int | None) -> None:
        """Replaces every switch layer with a streamed one.

        slots: number of experts that each layer holds in memory, in the order of `switches`. window: tokens of the
        eviction window; None to evict the least used.
        """
        for (path, tensors), count in zip(self.switches.items(), slots, strict=True):
            parent, name = parent_of(self.model, path)
            parent[name] = StreamedExperts(parent[name], ExpertSlots(shared, tensors, count, window, path))
        if any(self.streamed & layer.names() for layer in self.layers):
            return  # The next layer's router is not in memory yet, so nothing can be guessed by it.
        for path, following in pairwise(self.switches):
            switch, holder = module_at(self.model, following), following.rpartition(".")[0]
            router = router_of(switch, [module_at(self.model, at) for at in (holder, holder.rpartition(".")[0])])
            module_at(self.model, path).look_ahead(switch, router)

    def layers_to_stream(self, pinned: int) -> tuple[list[int], list[LayerWeights]]:
        """(numbers, layers) to stream if `pinned` layers are in memory. Their weights are resident no longer."""
        chosen = spread(self.layers, pinned)
        self.streamed |= {name for _, layer in chosen for name in layer.names()}
        return [number for number, _ in chosen], [layer for _, layer in chosen]

    def streamed_experts(self) -> list[StreamedExperts]:
        """The layers that `stream_experts` put into the model."""
        return [module for _, module in self.model.named_modules() if isinstance(module, StreamedExperts)]


@nothing_scheduled()
def open_in_place(
    folder: Path,
    small: Path | None = None,
    zoo: str | None = None,
    images: bool = False,
    adapter: Adapter | None = None,
) -> InPlaceModel:
    """Builds the model without reading a weight. The other arguments and the errors are those of `open_lazily`.

    adapter: is put into the model. It may raise UnsupportedModelError or CheckpointError as well.
    """
    lazy = open_lazily(folder, small, zoo, images)
    switches = {}
    for path, module in switch_layers(lazy.model):
        parts = {}
        for name, array in _tensors_of(module):
            parts[name] = locate(folder, f"{path}.{name}", array, lazy.provenance, lazy.entries)
        switches[path] = parts
    streamed = {f"{path}.{name}" for path, parts in switches.items() for name in parts}
    tables = find_tables(lazy)
    if adapter is not None:
        paths = {path for table in tables for path in table.paths}
        adapter.put_into(lazy.model, lazy.provenance, switches.keys(), paths)
    apart: list[Any] = [(*parent_of(lazy.model, path), lambda call: 0) for path in switches]
    apart += [stand_in for table in tables for stand_in in table.stand_ins]
    layers = find_layers(lazy, apart, streamed.union(*(table.names() for table in tables)))
    lazy.provenance.arrays.clear()  # each array keeps its file open
    lazy.provenance.stacks.clear()
    tensors, lazy.provenance.tensors = lazy.provenance.tensors, {}
    return InPlaceModel(
        lazy.model,
        lazy.config,
        lazy.files,
        switches,
        lazy.provenance.sources,
        lazy.entries,
        tensors,
        layers,
        tables,
        streamed,
        adapter,
    )


def _tensors_of(switch: nn.Module) -> Iterator[tuple[str, mx.array]]:
    """The arrays of a switch layer's projections, named `projection.tensor`, and its own, named `tensor`."""
    for name, child in switch.items():
        if isinstance(child, mx.array):
            yield name, child
        elif is_projection(child):
            yield from ((f"{name}.{tensor}", array) for tensor, array in child.items() if isinstance(array, mx.array))


def router_of(switch: StreamedExperts, holders: Sequence[Any]) -> Router:
    """The router of streamed experts: one of the modules beside them.

    holders: the module or list that holds them, and the one that holds that.
    """
    beside = [
        (name, module)
        for holder in holders
        if isinstance(holder, nn.Module)
        for name, module in holder.children().items()
        if isinstance(module, nn.Module) and not any(inner is switch for inner in module.modules())
    ]
    beside.sort(key=lambda item: item[0] not in LIKELY_NAMES)  # the others stay in their own order
    return Router([module for _, module in beside], switch.experts)


def module_at(model: Any, path: str) -> Any:
    """The module or list at a path; the model itself for an empty one."""
    if not path:
        return model
    parent, name = parent_of(model, path)
    return parent[name]


def parent_of(model: Any, path: str) -> tuple[Any, Any]:
    """The module or list that holds the module at `path`, and its key there."""
    *parents, last = path.split(".")
    where = model
    for name in parents:
        where = where[int(name)] if isinstance(where, list) else where[name]
    return where, int(last) if isinstance(where, list) else last
