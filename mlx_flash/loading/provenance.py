"""Finds where the bytes of a model's parameters lie in the checkpoint's files.

The places are found by watching the `sanitize` of the zoo's model. A tensor that `sanitize` passes on is found by its
identity; a tensor that it makes with `mx.stack` is found by the stacked tensors. An operator such as `a *= 2` keeps the
identity, but shows in the graph. No family is named here.
"""

from __future__ import annotations

import io
import re
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UnsupportedModelError
from ..flash.in_place import TensorParts
from ..flash.safetensors_file import TensorEntry

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


def locate(
    folder: Path,
    key: str,
    array: mx.array,
    provenance: Provenance,
    entries: dict[str, tuple[int, TensorEntry]],
) -> TensorParts:
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
    return TensorParts(file_of, offsets, shape, array.dtype)


def is_as_loaded(array: mx.array) -> bool:
    """Whether evaluating an array would only read tensors of a file and stack them. The array is not evaluated."""
    primitives = primitives_of(array)
    return "Load" in primitives and primitives <= LOADED


def primitives_of(array: mx.array) -> set[str]:
    """Names of MLX's primitives that evaluating an array would run; empty if it is already evaluated."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return set(re.findall(r'label ="(\w+)", shape=rectangle', graph.getvalue()))
