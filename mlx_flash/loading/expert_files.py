"""Opens a mixture-of-experts checkpoint as it is: mlx-lm's model of it, and the place of every expert in its files.

mlx-lm builds the model lazily. The places of the experts' bytes are found by watching its `sanitize`. A tensor that
`sanitize` passes on is found by its identity; a tensor that it makes with `mx.stack` is found by the stacked tensors.
An operator such as `a *= 2` keeps the identity, but shows in the graph. No family is named here.
"""

from __future__ import annotations

import io
import json
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import CheckpointError, FlashError, UnsupportedModelError
from ..flash.experts import ExpertFiles, ExpertSlots, ExpertTensor
from ..flash.plain_files import reading, unreadable
from ..flash.safetensors_file import TensorEntry
from ..flash.stored_tensors import is_as_entered, lazily_loaded
from ..layers.experts import StreamedExperts
from ..layers.lookahead_trial import LookAheadTrial
from ..source.checkpoint_files import files_in, read_config
from ..source.checkpoint_tensors import malformed, tensors_in
from ..source.compared_copies import no_room, temporary_folder
from ..source.model_kind import error_line, switch_layers
from ..source.quantisation import foreign_quantisation, group_problem

MODELOPT = "hf_quant_config.json"  # mlx-lm uses it as config.json's quantization_config
CONFIGURATION = frozenset({"config.json", "generation_config.json", MODELOPT})  # files that mlx-lm reads
UNQUANTISED = (
    "Use a checkpoint in MLX's own quantisation, or convert the unquantised one once: `mlx_lm.convert --hf-path MODEL "
    "-q --q-bits 4 --mlx-path OUTPUT`, and run OUTPUT."
)
WATCHING = threading.Lock()  # held while `mx.stack` is replaced
# MLX's primitives in the graph of a tensor that is read, or of a stack of such tensors. They do not change the numbers.
LOADED = {"Load", "ExpandDims", "Reshape", "Stack", "Concatenate"}


@dataclass
class Provenance:
    """The checkpoint's tensors behind every parameter: one tensor, or those that were stacked along a new axis."""

    sources: dict[str, list[str]] = field(default_factory=dict)  # parameter -> tensors, in the order of the stack
    stacked: set[str] = field(default_factory=set)  # parameters (E, ...) made of E tensors (...)
    arrays: dict[str, Any] = field(default_factory=dict)  # as `sanitize` returned them, so that later changes show
    tensors: dict[str, Any] = field(default_factory=dict)  # the checkpoint's tensors, as `sanitize` got them

    def watch(self, sanitize: Callable[[dict[str, Any]], dict[str, Any]], weights: dict[str, Any]) -> dict[str, Any]:
        """Calls `sanitize` and records what it makes of every tensor. Only one call runs at a time, in all threads.

        weights: name in the checkpoint -> array, not yet read. Returns name in the model -> array.
        """
        self.tensors = dict(weights)  # kept alive, so that no other array gets the same identity
        name_of = {id(array): name for name, array in self.tensors.items()}
        stacks: dict[int, tuple[Any, list[Any]]] = {}

        def noting(arrays: Sequence[Any], axis: int = 0, **options: Any) -> Any:
            parts = list(arrays)
            result = stack(parts, axis, **options)
            if axis == 0:
                stacks[id(result)] = (result, parts)
            return result

        with WATCHING:
            stack = mx.stack
            mx.stack = noting  # type: ignore[assignment]
            try:
                result = sanitize(weights)
            finally:
                mx.stack = stack
        self.arrays = dict(result)
        for name, array in result.items():
            if id(array) in name_of:
                self.sources[name] = [name_of[id(array)]]
            elif id(array) in stacks and all(id(part) in name_of for part in stacks[id(array)][1]):
                self.sources[name] = [name_of[id(part)] for part in stacks[id(array)][1]]
                self.stacked.add(name)
        return result


@dataclass
class Mixture:
    """A lazily loaded model, and the places of the experts of its switch layers."""

    model: Any
    config: dict[str, Any]
    files: list[Path]
    switches: dict[str, dict[str, ExpertTensor]]  # path in the model -> "up_proj.weight" -> places of its E parts
    sources: dict[str, list[str]]  # parameter -> the checkpoint's tensors that it consists of, if known
    entries: dict[str, tuple[int, TensorEntry]]  # the checkpoint's tensors -> (index of the file, entry in its header)
    tensors: dict[str, mx.array]  # the checkpoint's tensors, lazily loaded

    @property
    def experts(self) -> int:
        """The largest number of experts in a layer."""
        return max(len(next(iter(tensors.values())).offsets) for tensors in self.switches.values())

    @property
    def expert_bytes(self) -> int:
        """Bytes of all tensors of one expert, in the layer with the largest experts."""
        return max(sum(tensor.nbytes for tensor in tensors.values()) for tensors in self.switches.values())

    @property
    def table_bytes(self) -> int:
        """Bytes of all experts' small tensors (such as biases) in all layers, which are kept beside the slots."""
        tensors = [tensor for tensors in self.switches.values() for tensor in tensors.values()]
        return sum(tensor.nbytes * len(tensor.offsets) for tensor in tensors if tensor.is_table)

    @property
    def of_experts(self) -> set[str]:
        """The checkpoint's tensors that experts consist of."""
        prefixes = tuple(f"{path}." for path in self.switches)
        return {name for key, names in self.sources.items() if key.startswith(prefixes) for name in names}

    def resident(self) -> Iterator[tuple[str, mx.array]]:
        """(path in the model, array) of every parameter that is not an expert's, not yet read."""
        from mlx.utils import tree_flatten

        prefixes = tuple(f"{path}." for path in self.switches)
        parameters: Any = tree_flatten(self.model.parameters())
        for name, array in parameters:
            if not name.startswith(prefixes):
                yield name, array

    def stream(self, shared: ExpertFiles, slots: Sequence[int], window: int | None) -> None:
        """Replaces every switch layer with a streamed layer.

        slots: number of experts that each layer holds in memory, in the order of `switches`. window: tokens of the
        eviction window; None to evict the least used.
        """
        for (path, tensors), count in zip(self.switches.items(), slots, strict=True):
            parent, name = parent_of(self.model, path)
            parent[name] = StreamedExperts(parent[name], ExpertSlots(shared, tensors, count, window, path))
        trial, leads = LookAheadTrial(guessing=False), True  # short texts must not pay for useless guesses
        for path, following in pairwise(self.switches):
            (parent, name), (beside, next_name) = parent_of(self.model, path), parent_of(self.model, following)
            if (router := router_of(beside, next_name)) is not None:
                parent[name].look_ahead(beside[next_name], router, trial, leads)
                leads = False

    def layers(self) -> list[StreamedExperts]:
        """The layers that `stream` put into the model."""
        return [module for _, module in self.model.named_modules() if isinstance(module, StreamedExperts)]


def open_mixture(folder: Path, small: Path | None = None) -> Mixture:
    """Builds the model without reading a weight.

    small: the folder that its configuration and index are read from; None for `folder`. Raises CheckpointError or
    UnsupportedModelError.
    """
    from mlx_lm.utils import _get_classes

    small = small or folder
    counted = tensors_in(folder, small)
    files = sorted({file for file, _ in counted.values()})
    numbers = {file: number for number, file in enumerate(files)}
    entries = {name: (numbers[file], entry) for name, (file, entry) in counted.items()}
    provenance = Provenance()

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, args_class = _get_classes(config)

        class Watched(model_class):  # type: ignore[misc, valid-type]
            def sanitize(self, _: dict[str, Any]) -> dict[str, Any]:
                inherited = getattr(super(), "sanitize", lambda same: same)
                weights = provenance.watch(inherited, _lazy_tensors(counted))
                _check_scales(folder, self, weights)
                return weights

        return Watched, args_class

    quantised = _quantised(folder, small, {name: entry.dtype for name, (_, entry) in counted.items()})
    try:
        model, config = _load_by_mlx_lm(small, classes)
    except FlashError:
        raise
    except Exception as error:  # mlx-lm raises plain exceptions
        remedy = "Check that all shards are there and that config.json belongs to them."
        if quantised:
            remedy = f"It is quantised ({quantised}). {UNQUANTISED}"
        raise CheckpointError(f"mlx-lm cannot load {folder}: {error_line(error)}. {remedy}") from None
    switches = {}
    for path, module in switch_layers(model):
        parts = {}
        for projection, child in module.children().items():
            if not isinstance(child, nn.Module):
                continue
            for name, array in child.items():
                if isinstance(array, mx.array):
                    key = f"{path}.{projection}.{name}"
                    parts[f"{projection}.{name}"] = locate(folder, key, array, provenance, entries)
        switches[path] = parts
    if not switches:
        raise UnsupportedModelError(f"{folder} has no mixture-of-experts layers.")
    provenance.arrays.clear()  # each array keeps its file open
    tensors, provenance.tensors = provenance.tensors, {}
    return Mixture(model, config, files, switches, provenance.sources, entries, tensors)


def locate(
    folder: Path,
    key: str,
    array: mx.array,
    provenance: Provenance,
    entries: dict[str, tuple[int, TensorEntry]],
) -> ExpertTensor:
    """The places of a parameter's E parts in the files, one part per expert, all of the same size.

    Args:
        folder: the checkpoint's folder, for messages.
        key: the parameter's path in the model, "model.layers.0.mlp.switch_mlp.up_proj.weight".
        array: the parameter, (E, ...) of any dtype, as the loaded model has it; not read.
        provenance: the checkpoint's tensors behind the parameters.
        entries: name in the checkpoint -> (index of the file, entry in its header with bytes from begin to end).

    Raises UnsupportedModelError if the bytes in the files are not what the model computes with.
    """
    experts, shape = array.shape[0], tuple(array.shape[1:])
    part = int(np.prod(shape, dtype=np.int64)) * array.dtype.size
    found = [entries[name] for name in provenance.sources.get(key, []) if name in entries]
    whole = part * experts if key not in provenance.stacked else part
    wanted = experts if key in provenance.stacked else 1
    changed = provenance.arrays.get(key) is not array or not is_as_loaded(array)
    if changed or len(found) != wanted or any(entry.end - entry.begin != whole for _, entry in found):
        raise UnsupportedModelError(
            f"the experts of {folder} ({key}) are not stored in the form that the model computes with: mlx-lm changes "
            f"them when it loads them. Convert it once: `mlx_lm.convert --hf-path {folder} --mlx-path OUTPUT` (with -q "
            "--q-bits 4 for 4 bits), and run OUTPUT."
        )
    if key in provenance.stacked:
        file_of = np.array([number for number, _ in found], np.int64)
        offsets = np.array([entry.begin for _, entry in found], np.int64)
    else:
        number, entry = found[0]
        file_of = np.full(experts, number, np.int64)
        offsets = entry.begin + np.arange(experts, dtype=np.int64) * part
    return ExpertTensor(file_of, offsets, shape, array.dtype)


def is_as_loaded(array: mx.array) -> bool:
    """Whether evaluating an array would only read tensors of a file and stack them. The array is not evaluated."""
    primitives = primitives_of(array)
    return "Load" in primitives and primitives <= LOADED


def primitives_of(array: mx.array) -> set[str]:
    """Names of MLX's primitives that evaluating an array would run; empty if it is already evaluated."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return set(re.findall(r'label ="(\w+)", shape=rectangle', graph.getvalue()))


def _load_by_mlx_lm(folder: Path, classes: Callable[..., tuple[Any, Any]]) -> tuple[Any, dict[str, Any]]:
    """Calls mlx-lm's `load_model` lazily, for classes that bring their own tensors. Returns (model, configuration).

    folder: the folder with the configuration.
    mlx-lm takes every model*.safetensors of a folder, in the order of the file system. It is therefore given a folder
    with only the configuration and one file without tensors.
    """
    from mlx_lm.utils import load_model

    with temporary_folder() as alone:
        for name in CONFIGURATION.intersection(files_in(folder)):
            with reading(folder / name):
                content = (folder / name).read_bytes()
            if name == MODELOPT and (problem := _modelopt_problem(content)):
                raise CheckpointError(f"{folder / name}: {problem}. Download the checkpoint again.")
            try:
                (alone / name).write_bytes(content)
            except OSError as error:
                raise no_room(error) from None
        try:
            mx.save_safetensors(str(alone / "model.safetensors"), {})
        except RuntimeError as error:
            raise no_room(error) from None
        return load_model(alone, lazy=True, get_model_classes=classes, trust_remote_code=False)


def _modelopt_problem(content: bytes) -> str | None:
    try:
        return group_problem({"quantization_config": json.loads(content)})
    except (ValueError, RecursionError) as error:
        return error_line(error)


def _lazy_tensors(counted: dict[str, tuple[Path, TensorEntry]]) -> dict[str, mx.array]:
    """The tensors in `counted`, by name, not yet read. Raises CheckpointError or ReadError."""
    weights: dict[str, mx.array] = {}
    for file in sorted({file for file, _ in counted.values()}):
        try:
            loaded = lazily_loaded(file)
        except ValueError as error:
            raise malformed(file, error) from None
        for name, array in loaded.items():
            holder, entry = counted.get(name, (None, None))
            if entry is None or (holder == file and not is_as_entered(array, entry)):
                raise unreadable(file, ValueError(f"MLX finds a different tensor {name} in it"), "its header")
            if holder == file:
                weights[name] = array
    return weights


def _check_scales(folder: Path, model: nn.Module, weights: dict[str, mx.array]) -> None:
    """Raises CheckpointError for more scales than numbers. mlx-lm would infer groups of 0, and MLX divide by that."""
    for path, module in model.named_modules():
        scales, weight = weights.get(f"{path}.scales"), module.get("weight")
        if scales is not None and isinstance(weight, mx.array) and scales.shape[-1:] > weight.shape[-1:]:
            raise CheckpointError(
                f"{folder}: {path}.scales has {scales.shape[-1]} columns, but in config.json its matrix has only "
                f"{weight.shape[-1]}. Download the checkpoint again."
            )


def _quantised(folder: Path, small: Path, dtype_of: dict[str, str]) -> str | None:
    """The kind of quantisation if it is not MLX's own, else None. The error names it if mlx-lm cannot read it.

    Raises UnsupportedModelError for a quantisation whose experts mlx-lm unpacks or packs anew while it loads,
    CheckpointError for one that config.json describes wrongly.
    """
    config = read_config(small)
    if problem := group_problem(config):
        raise CheckpointError(f"{folder / 'config.json'}: {problem}. Download the checkpoint again.")
    kind = foreign_quantisation(config, files_in(small), dtype_of)
    if kind and any(name.endswith(".qweight") for name in dtype_of):
        raise UnsupportedModelError(
            f"{folder} is quantised ({kind}), and its experts are not stored in the form that the model computes with. "
            f"{UNQUANTISED}"
        )
    return kind


def router_of(parent: Any, name: str) -> nn.Module | None:
    """The module that scores the experts at `name` in `parent`, if it is a single product; else None."""
    width = (parent[name].experts,)
    for candidate in ("gate", "router"):
        router = getattr(parent, candidate, None)
        if isinstance(router, (nn.Linear, nn.QuantizedLinear)) and router.weight.shape[:1] == width:
            return router
    return None


def parent_of(model: Any, path: str) -> tuple[Any, Any]:
    """The module or list that holds the module at `path`, and its key there."""
    *parents, last = path.split(".")
    where = model
    for name in parents:
        where = where[int(name)] if isinstance(where, list) else where[name]
    return where, int(last) if isinstance(where, list) else last
