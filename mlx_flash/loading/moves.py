"""Follows a checkpoint's bytes through the operations that only move them. Nothing is read.

A zoo's `sanitize` renames, stacks, splits and reshapes tensors. It is traced once with placeholders. Every tensor then
stands for a NumPy view of memory that is mapped, but never written, so that it takes none. The view's address and
strides are those of the tensor's bytes: NumPy itself works out what a slice, a transposition or a reshape does to them.
"""

from __future__ import annotations

import io
import mmap
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

REPLACING = threading.Lock()  # held while a function of MLX is replaced
# MLX's primitives that change where numbers lie, but not the numbers. A Gather moves if its index is a constant.
# fmt: off
MOVES = frozenset((
    "Concatenate", "Copy", "ExpandDims", "Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Stack",
    "StopGradient", "Transpose", "Unflatten", "View",
))
# fmt: on
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}  # bytes of a number -> its stand-in's type


@dataclass(frozen=True)
class TensorPiece:
    """A part of one tensor of a checkpoint: where it lies in the tensor, and in which order it is taken."""

    source: str  # name of the tensor
    view: np.ndarray  # stands for the part: it has the part's shape, strides and item size
    start: int  # address that stands for the tensor's first byte

    @property
    def offset(self) -> int:
        """Bytes from the tensor's start to the part's first number."""
        return int(self.view.ctypes.data) - self.start

    def seen(self, view: np.ndarray) -> TensorPiece:
        """The part of the same tensor that a view of `view` stands for."""
        return TensorPiece(self.source, view, self.start)


Moved = tuple[TensorPiece, ...]  # pieces (n, ...), which follow each other along the first axis


def whole(tensors: dict[str, mx.array]) -> dict[str, Moved]:
    """The only piece of each tensor, which is used as it is."""
    largest = max((array.nbytes for array in tensors.values()), default=0)
    memory = mmap.mmap(-1, max(1, largest), flags=mmap.MAP_PRIVATE | mmap.MAP_ANON, prot=mmap.PROT_READ)
    raw = np.frombuffer(memory, np.uint8)
    start = int(raw.ctypes.data)
    return {
        name: (TensorPiece(name, raw[: array.nbytes].view(_UNSIGNED[array.dtype.size]).reshape(array.shape), start),)
        for name, array in tensors.items()
    }


@dataclass(frozen=True)
class Followed:
    """An array that was made by moves alone. primitives: the names of all of them, sorted."""

    pieces: Moved
    primitives: tuple[str, ...] = ()


def follow(function: Callable[[dict[str, Any]], dict[str, Any]], tensors: dict[str, mx.array]) -> dict[str, Followed]:
    """What `function` makes of `tensors` by moves alone, by the names in its result.

    A result that is computed, or whose bytes cannot be followed, is left out. If `function` cannot be traced, because
    it evaluates an array or raises an error, nothing is returned.
    """
    found: dict[str, Moved | None] = {}  # name in the trace -> pieces
    pieces_of = whole(tensors)
    constants: dict[str, mx.array] = {}
    results: list[str] = []
    primitives: dict[str, tuple[str, ...]] = {}  # name in the result -> its moves

    def traced(*placeholders: mx.array) -> list[mx.array]:
        made = function(dict(zip(tensors, placeholders, strict=True)))
        for name, array in made.items():
            if MOVES.issuperset(moves := primitives_of(array)):
                primitives[name] = tuple(sorted(moves))
        return [made[name] for name in primitives]

    def note(event: dict[str, Any]) -> None:
        kind = event["type"]
        if kind == "inputs":
            found.update(zip([label for label, _, _ in event["inputs"]], pieces_of.values(), strict=True))
        elif kind == "outputs":
            results.extend(label for label, _, _ in event["outputs"])
        elif kind == "constants":
            constants.update(event["constants"])
        elif kind == "primitive":
            for (label, shape, _), made in zip(event["outputs"], _moved(event, found, constants), strict=True):
                found[label] = made if made and _shape_of(made) == tuple(shape) else None

    def same(array: mx.array, *_: Any, **__: Any) -> mx.array:
        """MLX cannot describe `mx.contiguous`. It makes a copy of the same numbers."""
        return array

    try:
        with _replaced("contiguous", lambda _: same):
            mx.export_function(note, traced, *tensors.values())  # type: ignore[arg-type]
    except Exception:
        return {}
    return {
        name: Followed(pieces, moves)
        for (name, moves), label in zip(primitives.items(), results, strict=True)
        if (pieces := found.get(label))
    }


@contextmanager
def noting_stacks() -> Iterator[dict[int, tuple[mx.array, list[mx.array]]]]:
    """Yields a dictionary that gets every array that this thread stacks along a new first axis, by its identity, with
    the arrays that it is made of."""
    stacks: dict[int, tuple[mx.array, list[mx.array]]] = {}

    def noting(stack: Callable[..., mx.array]) -> Callable[..., mx.array]:
        def noted(arrays: Sequence[mx.array], axis: int = 0, **options: Any) -> mx.array:
            parts = list(arrays)
            result = stack(parts, axis, **options)
            if axis == 0:
                stacks[id(result)] = (result, parts)
            return result

        return noted

    with _replaced("stack", noting):
        yield stacks


@contextmanager
def _replaced(name: str, replacement: Callable[[Callable[..., mx.array]], Callable[..., mx.array]]) -> Iterator[None]:
    """Replaces a function of MLX for this thread. replacement: gets the function itself, returns the one to call."""
    with REPLACING:
        own, here = getattr(mx, name), threading.get_ident()
        other = replacement(own)
        setattr(mx, name, lambda *a, **k: (other if threading.get_ident() == here else own)(*a, **k))
        try:
            yield
        finally:
            setattr(mx, name, own)


def primitives_of(array: mx.array) -> list[str]:
    """Names of MLX's primitives that evaluating an array would run; empty if it is already evaluated."""
    graph = io.StringIO()
    mx.export_to_dot(graph, array)
    return re.findall(r'label ="(\w+)", shape=rectangle', graph.getvalue())


def _moved(
    event: dict[str, Any], found: dict[str, Moved | None], constants: dict[str, mx.array]
) -> Sequence[Moved | None]:
    """The pieces of each output of a primitive; None for an output that cannot be followed."""
    inputs = [found.get(label) for label, _, _ in event["inputs"]]
    shapes = [tuple(shape) for _, shape, _ in event["outputs"]]
    unknown: list[Moved | None] = [None] * len(shapes)
    try:
        if event["name"] == "Concatenate":
            (axis,) = event["arguments"]
            if axis or None in inputs:
                return unknown
            return [tuple(piece for pieces in inputs if pieces for piece in pieces if piece.view.shape[0])]
        if (pieces := inputs[0]) is None:
            return unknown
        if event["name"] == "Split":
            return _split(pieces, event["arguments"][1], shapes)
        if event["name"] == "Gather":
            index = constants.get(event["inputs"][1][0])
            axes, sizes = event["arguments"]
            if index is None or index.ndim or len(axes) != 1:
                return unknown
            at = index.item() % _shape_of(pieces)[axes[0]]
            return [_cut(pieces, axes[0], at, sizes[axes[0]], 1)]
        return [_one(event["name"], event["arguments"], pieces, shapes[0], event["outputs"][0][2].size)]
    except (ValueError, TypeError):  # NumPy would have to copy, or the operation has other arguments than expected
        return unknown


def _one(name: str, arguments: Sequence[Any], pieces: Moved, shape: tuple[int, ...], item_bytes: int) -> Moved | None:
    """The pieces of a primitive's only output, (shape) with items of so many bytes. Raises ValueError."""
    if name in ("Copy", "StopGradient"):
        return pieces
    if name in ("Reshape", "Flatten", "Unflatten", "ExpandDims", "Squeeze"):
        return _reshaped(pieces, shape)
    if name == "View":
        return tuple(piece.seen(piece.view.view(_UNSIGNED[item_bytes])) for piece in pieces)
    if name == "Transpose":
        (axes,) = arguments
        if len(pieces) > 1 and axes[0] != 0:
            return None
        return tuple(piece.seen(piece.view.transpose(axes)) for piece in pieces)
    if name == "Slice":
        starts, _, steps = arguments
        for axis, (start, length, step) in enumerate(zip(starts, shape, steps, strict=True)):
            pieces = _cut(pieces, axis, start, length, step)
        return pieces
    return None


def _reshaped(pieces: Moved, shape: tuple[int, ...]) -> Moved | None:
    """The pieces, each in its share of `shape`. Raises ValueError if a piece would have to be copied."""
    if len(pieces) == 1:
        return (pieces[0].seen(np.reshape(pieces[0].view, shape, copy=False)),)
    part = int(np.prod(shape[1:], dtype=np.int64))
    if not shape or not part or any(piece.view.size % part for piece in pieces):
        return None
    return tuple(
        piece.seen(np.reshape(piece.view, (piece.view.size // part, *shape[1:]), copy=False)) for piece in pieces
    )


def _split(pieces: Moved, axis: int, shapes: Sequence[tuple[int, ...]]) -> list[Moved | None]:
    starts = np.cumsum([0, *(shape[axis] for shape in shapes)]).tolist()
    return [_cut(pieces, axis, start, shape[axis], 1) for start, shape in zip(starts, shapes, strict=False)]


def _cut(pieces: Moved, axis: int, start: int, length: int, step: int) -> Moved:
    """`length` entries of an axis from `start`, every `step`-th. Raises ValueError for a step between pieces."""
    if axis or len(pieces) == 1:
        stop = start + length * step
        entries = (slice(None),) * axis + (slice(start, None if stop < 0 else stop, step),)
        return tuple(piece.seen(piece.view[entries]) for piece in pieces)
    if step != 1:
        raise ValueError("a step over several pieces")
    result, begin = [], 0
    for piece in pieces:
        end = begin + piece.view.shape[0]
        first, last = max(start, begin), min(start + length, end)
        if first < last:
            result.append(piece.seen(piece.view[first - begin : last - begin]))
        begin = end
    return tuple(result)


def _shape_of(pieces: Moved) -> tuple[int, ...]:
    """The shape of the pieces together."""
    shape: tuple[int, ...] = pieces[0].view.shape
    return shape if len(pieces) == 1 else (sum(piece.view.shape[0] for piece in pieces), *shape[1:])
