"""Finds where the bytes of a model's parameters lie in the checkpoint's files.

The places are found by following the tensors through the `sanitize` of the zoo's model (moves.py). What is then loaded
is checked: the graph of a parameter must consist of the same moves. No family is named here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import UnsupportedModelError
from ..flash.in_place import TensorParts
from ..flash.safetensors_file import TensorEntry
from ..source.zoos import MLX_LM
from .moves import Followed, Moved, follow, noting_stacks, primitives_of, whole


@dataclass
class Provenance:
    """The parts of the checkpoint's tensors that every parameter consists of."""

    followed: dict[str, Followed] = field(default_factory=dict)  # parameter -> its pieces, along its first axis
    sources: dict[str, list[str]] = field(default_factory=dict)  # parameter -> the pieces' tensors, each named once
    arrays: dict[str, Any] = field(default_factory=dict)  # as `sanitize` returned them, so that later changes show
    tensors: dict[str, Any] = field(default_factory=dict)  # the checkpoint's tensors, as `sanitize` got them
    zoo: str = MLX_LM  # the one whose model this is
    stacks: dict[str, list[Any]] = field(default_factory=dict)  # parameter (n, ...) that was not followed -> n arrays

    def watch(self, sanitize: Callable[[dict[str, Any]], dict[str, Any]], weights: dict[str, Any]) -> dict[str, Any]:
        """Calls `sanitize` twice, first with placeholders, and records what it makes of every tensor.

        weights: name in the checkpoint -> array, not yet read. Returns name in the model -> array.
        """
        self.tensors = dict(weights)  # kept alive, so that no other array gets the same identity
        moved = follow(sanitize, self.tensors)
        with noting_stacks() as stacks:
            result = sanitize(weights)
        self.arrays = dict(result)
        unmoved = whole(self.tensors)
        name_of = {id(array): name for name, array in self.tensors.items()}
        for name, array in result.items():
            if (source := name_of.get(id(array))) is not None:
                self.followed[name] = Followed(unmoved[source])
            elif name in moved:
                self.followed[name] = moved[name]
            elif id(array) in stacks:
                self.stacks[name] = stacks[id(array)][1]
        stacks.clear()
        self.sources = {
            name: list(dict.fromkeys(piece.source for piece in found.pieces)) for name, found in self.followed.items()
        }
        return result

    def rename(self, new_name: Callable[[str], str]) -> None:
        """Follows parameters whose modules were moved. new_name: from a parameter's path to its path now."""
        self.followed = {new_name(name): found for name, found in self.followed.items()}
        self.sources = {new_name(name): found for name, found in self.sources.items()}
        self.arrays = {new_name(name): found for name, found in self.arrays.items()}
        self.stacks = {new_name(name): found for name, found in self.stacks.items()}


def locate(
    folder: Path,
    key: str,
    array: mx.array,
    provenance: Provenance,
    entries: dict[str, tuple[int, TensorEntry]],
) -> TensorParts:
    """The places of a parameter's U parts in the files: experts of a stack, or rows of a table or a matrix.

    Args:
        folder: the checkpoint's folder, for messages.
        key: the parameter's path in the model, "model.layers.0.mlp.switch_mlp.up_proj.weight".
        array: the parameter, (U, ...) of any dtype, as the loaded model has it; not read.
        provenance: the checkpoint's tensors behind the parameters.
        entries: name in the checkpoint -> (index of the file, entry in its header with bytes from begin to end).

    Raises UnsupportedModelError if the bytes in the files are not what the model computes with.
    """
    found = _places(key, array, provenance, entries)
    if found is None:
        remedy = f"`mlxflash convert --model {folder} --output OUTPUT` (with --bits 4 for 4 bits)"
        if provenance.zoo != MLX_LM:
            remedy = f"`mlx_vlm.convert --hf-path {folder} --mlx-path OUTPUT` (with -q --q-bits 4 for 4 bits)"
        raise UnsupportedModelError(
            f"{folder} does not store {key} in the form that the model computes with: the model's own code changes it "
            f"while it loads it. Convert the checkpoint once, and run OUTPUT: {remedy}."
        )
    return found


def is_in_place(key: str, array: mx.array, provenance: Provenance, entries: dict[str, tuple[int, TensorEntry]]) -> bool:
    """Whether `locate` finds the places of a parameter's parts."""
    return _places(key, array, provenance, entries) is not None


def moved_pieces(key: str, array: mx.array, provenance: Provenance) -> Moved | None:
    """The pieces of a parameter that was only moved, wherever they lie; None for one that is computed."""
    followed = provenance.followed.get(key)
    if followed is None or provenance.arrays.get(key) is not array or not is_as_loaded(array, followed.primitives):
        return None
    return followed.pieces


def _places(
    key: str, array: mx.array, provenance: Provenance, entries: dict[str, tuple[int, TensorEntry]]
) -> TensorParts | None:
    """The places of a parameter's parts; None if its parts do not lie whole in the files."""
    if not array.ndim or (pieces := moved_pieces(key, array, provenance)) is None:
        return None
    count, shape = array.shape[0], tuple(array.shape[1:])
    part = int(np.prod(shape, dtype=np.int64)) * array.dtype.size
    if sum(piece.view.shape[0] for piece in pieces) != count:
        return None
    file_of, offsets = [], []
    for piece in pieces:
        view = piece.view
        alike = view.shape[1:] == shape and view.itemsize == array.dtype.size and view[:1].flags.c_contiguous
        if piece.source not in entries or not alike:
            return None
        number, entry = entries[piece.source]
        starts = entry.begin + piece.offset + np.arange(len(view), dtype=np.int64) * view.strides[0]
        if len(starts) and (starts.min() < entry.begin or starts.max() + part > entry.end):
            return None
        file_of.append(np.broadcast_to(np.int64(number), len(view)))  # takes no memory
        offsets.append(starts)
    alone = len(pieces) == 1
    return TensorParts(
        file_of[0] if alone else np.concatenate(file_of),
        offsets[0] if alone else np.concatenate(offsets),
        shape,
        array.dtype,
    )


def is_as_loaded(array: mx.array, moves: Sequence[str] = ()) -> bool:
    """Whether evaluating an array would only read tensors of a file, copy them, and run `moves` (names of primitives,
    sorted). The array is not evaluated."""
    primitives = primitives_of(array)
    return "Load" in primitives and [p for p in sorted(primitives) if p not in ("Load", "Contiguous")] == list(moves)
