"""Finds the layers of a model that can be read when a token reaches them, and the places of their weights in the files.

No family is named here. A trial call finds out whether the model calls each layer once, and whether nothing else reads
a layer's weights. Nothing is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import mlx.core as mx
import mlx.nn as nn

from ..errors import UnsupportedModelError
from ..flash.in_place import TensorParts
from ..flash.layer_ring import LayerRing, LayerTensor, buffer_bytes, lay_out
from ..layers.streamed_layers import hook, stream_layer, unhook
from .lazy_model import LazyModel
from .memory_needs import OneRow, StreamedNeed, stand_ins
from .provenance import locate
from .quantised_cache import plain_cache

T = TypeVar("T")
SHORTEST_TENSOR = 16 << 10  # bytes; shorter ones, such as norms, are kept in memory, where they save a request each
TRIAL_TOKENS = (2, 1)  # a prompt and a single token may take different ways


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """A layer of a model, and those of its tensors that can be read when a token reaches it.

    owners: for each tensor, the module that has it, and its name there.
    """

    module: nn.Module
    tensors: list[LayerTensor]
    owners: list[tuple[nn.Module, str]]

    @property
    def nbytes(self) -> int:
        """Bytes of a buffer for this layer."""
        return buffer_bytes(self.tensors)

    def names(self) -> set[str]:
        """The tensors' paths in the model."""
        return {tensor.name for tensor in self.tensors}


def find_layers(
    lazy: LazyModel, experts: Sequence[tuple[Any, Any, StreamedNeed | OneRow]], besides: set[str]
) -> list[LayerWeights]:
    """The layers that can be streamed, in the order in which a token needs them; none if the model does not allow it.

    experts: the model's streamed experts, in the form of `needs_of`. besides: parameters that are streamed already.
    """
    from mlx.utils import tree_flatten

    path_of = {id(module): path for path, module in lazy.model.named_modules()}
    found = []
    for layer in getattr(lazy.model, "layers", None) or []:
        if (path := path_of.get(id(layer))) is None:
            continue
        placed: list[tuple[str, TensorParts]] = []
        parameters: Any = tree_flatten(layer.parameters())
        for name, array in parameters:
            key = f"{path}.{name}"
            if key in besides or array.ndim == 0 or array.nbytes < SHORTEST_TENSOR:
                continue
            try:
                placed.append((key, locate(lazy.folder, key, array, lazy.provenance, lazy.entries)))
            except UnsupportedModelError:  # The zoo changes it when it loads it, so it stays in memory.
                continue
        if placed:
            tensors = lay_out(placed)
            found.append(LayerWeights(layer, tensors, [_owner(layer, t.name[len(path) + 1 :]) for t in tensors]))
    order = _order_of_calls(lazy.model, found, experts)
    return [found[number] for number in order]


def spread(layers: Sequence[T], pinned: int) -> list[tuple[int, T]]:
    """(number, item) of the layers that are streamed if `pinned` of them are in memory.

    Pinned layers are spread evenly, and so is the reading.
    """
    kept = {(2 * turn + 1) * len(layers) // (2 * pinned) for turn in range(pinned)}
    return [(number, item) for number, item in enumerate(layers) if number not in kept]


def stream_layers(layers: Sequence[LayerWeights], ring: LayerRing) -> None:
    """Makes layers take their weights from a ring, which was made for their tensors in this order."""
    for number, layer in enumerate(layers):
        stream_layer(layer.module, layer.owners, ring, number)


def _owner(layer: nn.Module, path: str) -> tuple[nn.Module, str]:
    *parents, name = path.split(".")
    where: Any = layer
    for parent in parents:
        where = where[int(parent)] if isinstance(where, list) else where[parent]
    return where, name


def _order_of_calls(
    model: Any, layers: Sequence[LayerWeights], experts: Sequence[tuple[Any, Any, StreamedNeed | OneRow]]
) -> list[int]:
    """The numbers of `layers` in the order in which the model calls them; [] if it reads weights at another time."""
    calls: list[int] = []
    try:
        with stand_ins(experts), _withheld(layers, calls):
            cache = plain_cache(model)
            for tokens in TRIAL_TOKENS:
                calls.append(-1)
                model(mx.zeros((1, tokens), mx.int32), cache=cache)
    except Exception:  # A weight was missing, or the model cannot be run at all, which the plan finds out and reports.
        return []
    _, first, *others = _split(calls)
    once = sorted(first) == list(range(len(layers))) and all(other == first for other in others)
    return first if once else []


def _split(calls: Sequence[int]) -> list[list[int]]:
    """Splits at every -1."""
    parts: list[list[int]] = [[]]
    for call in calls:
        if call < 0:
            parts.append([])
        else:
            parts[-1].append(call)
    return parts


@contextmanager
def _withheld(layers: Sequence[LayerWeights], calls: list[int]) -> Iterator[None]:
    """Inside this context, a layer has its weights only while it is called. Each call appends the layer's number."""
    held = [[module[name] for module, name in layer.owners] for layer in layers]

    def put(number: int, arrays: Sequence[Any]) -> None:
        for (module, name), array in zip(layers[number].owners, arrays, strict=True):
            module[name] = array

    def before(number: int) -> None:
        calls.append(number)
        put(number, held[number])

    def after(number: int) -> None:
        put(number, [None] * len(held[number]))

    hooked = 0
    try:
        for number, layer in enumerate(layers):
            after(number)
            hook(layer.module, lambda n=number: before(n), lambda _, n=number: after(n))  # type: ignore[misc]
            hooked += 1
        yield
    finally:
        for number, layer in enumerate(layers):
            put(number, held[number])
            if number < hooked:
                unhook(layer.module)
