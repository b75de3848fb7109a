"""The file of one context: its tokens, the places to cut it back to, and the arrays of its caches, bit by bit.

It is a safetensors file. The tensor `tokens` is first. Then come the arrays of the parts of the cache, without the
steps that hold no token, and those of the snapshots. The metadata has `format`, `about` (JSON: the numbers of a
CachedContext, and the values of the attributes of each part), and `sums`: the CRC-32 of every tensor but the last,
eight hexadecimal digits each. The last tensor, `header_sha256`, is the SHA-256 of the bytes before the first tensor.
So every byte is compared before it is used.

Whatever a part of a cache has as an attribute is written: arrays, numbers, text, None, and lists of them. A part that
has anything else cannot be written. written_context.py reads the file.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import mlx.core as mx
import numpy as np

from ..flash.host_arrays import to_numpy
from ..flash.stored_tensors import SAFETENSORS_NAMES
from ..layers.cache_parts import parts_of
from .cached_context import CachedContext, grows

FORMAT = "mlx_flash conversation 1"
MOST_HEADER_BYTES = 4 << 20
PIECE_BYTES = 8 << 20  # bytes that are written between two looks at the clock
TOKENS, HEADER_SUM = "tokens", "header_sha256"


class UnwritableError(Exception):
    """A cache has something that cannot be written faithfully. The message names it."""


class TooSlowError(Exception):
    """Writing took longer than it may."""


@dataclass
class _Tensor:
    """An array to write. rows: how many of its axis before the last are written; None for all."""

    array: mx.array
    rows: int | None

    @property
    def shape(self) -> list[int]:
        shape = list(self.array.shape)
        return shape if self.rows is None else [*shape[:-2], self.rows, shape[-1]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.array.dtype.size

    def seen(self) -> np.ndarray:
        """The numbers that are written, in MLX's own memory."""
        bare = self.array.view(mx.uint16) if self.array.dtype == mx.bfloat16 else self.array
        seen = to_numpy(bare, copy=False)
        return seen if self.rows is None else seen[..., : self.rows, :]


class ContextToWrite:
    """A context, ready to be written. name: of its file. It depends on all that the context may be used for.

    Raises UnwritableError.
    """

    def __init__(self, context: CachedContext) -> None:
        self._tensors: list[_Tensor] = []
        self._tokens = np.fromiter(context.tokens, np.int32)
        numbers = {name: getattr(context, name) for name in ("step", "stops", "ends", "as_read", "decoded")}
        about: dict[str, Any] = {**numbers, "trims": all(part.is_trimmable() for part in parts_of(context.cache))}
        about["parts"] = [
            self._spec(part, len(context.tokens) if grows(part) else None) for part in parts_of(context.cache)
        ]
        for layer in context.cache:
            if hasattr(layer, "caches") and vars(layer).keys() != {"caches"}:
                raise UnwritableError(f"{type(layer).__name__} has more than its parts")
        about["snapshots"] = {
            str(place): [None if part is None else self._spec(part, None) for part in snapshot.parts]
            for place, snapshot in sorted(context.snapshots.items())
        }
        mx.eval([tensor.array for tensor in self._tensors])
        self._header = self._make_header(about)
        self.nbytes = len(self._header) + self._tokens.nbytes + sum(tensor.nbytes for tensor in self._tensors) + 32
        same = json.dumps({**numbers, "snapshots": sorted(context.snapshots)}).encode() + self._tokens.tobytes()
        self.name = hashlib.sha256(same).hexdigest()[:32]

    def write(self, file: BinaryIO, seconds: float) -> None:
        """Writes an unbuffered file of `nbytes`. Raises TooSlowError after so many seconds, and OSError."""
        deadline = time.monotonic() + seconds
        sums = [zlib.crc32(self._tokens.tobytes())]
        file.seek(len(self._header))
        _write_all(file, self._tokens)
        for tensor in self._tensors:
            crc = 0
            for piece in _pieces(tensor.seen()):
                crc = zlib.crc32(memoryview(piece), crc)  # type: ignore[arg-type]  # np.ndarray is a buffer
                _write_all(file, piece)
                if time.monotonic() > deadline:
                    raise TooSlowError
            sums.append(crc)
        header = self._header.replace(_digits([0] * len(sums)), _digits(sums), 1)
        _write_all(file, np.frombuffer(hashlib.sha256(header).digest(), np.uint8))
        file.seek(0)
        _write_all(file, np.frombuffer(header, np.uint8))

    def _spec(self, part: Any, rows: int | None) -> dict[str, Any]:
        """The values of a part's attributes as JSON, with the numbers of arrays. rows: tokens of a growing part."""
        return {
            name: self._value(value, rows if name in ("keys", "values") else None, f"{type(part).__name__}.{name}")
            for name, value in vars(part).items()
        }

    def _value(self, value: Any, rows: int | None, where: str) -> Any:
        if isinstance(value, mx.array):
            self._tensors.append(_Tensor(value, rows))
            return {"array": len(self._tensors) - 1, "grows": rows is not None}
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        if type(value) in (list, tuple):
            return {type(value).__name__: [self._value(item, rows, where) for item in value]}
        raise UnwritableError(f"{where} is a {type(value).__name__}")

    def _make_header(self, about: dict[str, Any]) -> bytes:
        """The header with zeros as checksums."""
        sizes: list[tuple[str, str, list[int], int]] = [(TOKENS, "I32", [len(self._tokens)], self._tokens.nbytes)]
        for number, tensor in enumerate(self._tensors):
            sizes.append((f"t{number}", SAFETENSORS_NAMES[tensor.array.dtype], tensor.shape, tensor.nbytes))
        known = {"format": FORMAT, "about": json.dumps(about), "sums": _digits([0] * len(sizes)).decode()}
        header: dict[str, Any] = {"__metadata__": known}
        position = 0
        for name, dtype, shape, nbytes in [*sizes, (HEADER_SUM, "U8", [32], 32)]:
            header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
            position += nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        if len(text) > MOST_HEADER_BYTES:
            raise UnwritableError(f"its description takes {len(text)} bytes")
        return len(text).to_bytes(8, "little") + text


def _digits(sums: list[int]) -> bytes:
    return "".join(f"{crc:08x}" for crc in sums).encode()


def _pieces(seen: np.ndarray) -> Iterator[np.ndarray]:
    """The bytes of an array in row-major order, a few MB at a time; copied only where they lie apart."""
    if seen.flags.c_contiguous or seen.ndim <= 2:
        flat = np.asarray(seen, order="C").reshape(-1).view(np.uint8)
        for begin in range(0, len(flat), PIECE_BYTES):
            yield flat[begin : begin + PIECE_BYTES]
    else:
        for each in seen:
            yield from _pieces(each)


def _write_all(file: BinaryIO, data: np.ndarray) -> None:
    left = memoryview(data.reshape(-1).view(np.uint8))  # type: ignore[arg-type]  # np.ndarray is a buffer
    while left:
        left = left[file.write(left) :]
