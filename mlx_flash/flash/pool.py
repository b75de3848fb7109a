"""Memory that the reader fills and MLX reads: one evaluated MLX array with an aligned start, never reallocated."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from ..errors import FlashError, UsageError
from .system import POOL_ALIGNMENT, use_huge_pages

_WORD = 8  # bytes of the base's elements: an MLX axis is below 2**31, so bytes alone would end at 2 GiB


class AlignedPool:
    """`nbytes` of zeros in an MLX buffer, for host writes at `address`.

    array: mx.uint8, (nbytes,) or, with `row_bytes`, (nbytes / row_bytes, row_bytes); evaluated, shares the buffer.
    Make typed views with `array.view(dtype)` once and keep them. Never assign to the array (`array[...] = v` may move
    it to another buffer); write to `address` only while no unevaluated or running graph reads it.
    address: of its first byte, a multiple of `alignment` (a power of two). nbytes: without the alignment's overhead.
    Raises UsageError for impossible sizes. Pages are resident from the start.
    """

    def __init__(self, nbytes: int, alignment: int = POOL_ALIGNMENT, row_bytes: int | None = None) -> None:
        shape = (nbytes,) if row_bytes is None else _rows(nbytes, row_bytes)
        if nbytes < 1 or alignment < _WORD or alignment & (alignment - 1):
            raise UsageError(f"A pool of {nbytes} bytes aligned to {alignment}: at least 1 and a power of two >= 8.")
        words = -(-nbytes // _WORD)
        if max(*shape, words + alignment // _WORD) >= 2**31 or (nbytes >= 2**31 and shape[-1] % _WORD):
            raise UsageError(
                f"A pool of {nbytes} bytes in rows of {shape[-1]} is beyond MLX's axes of 2**31 - 1: from 2 GiB on, "
                "rows of a multiple of 8 bytes are needed, and 16 GiB is the end."
            )
        self._base = mx.zeros((words + alignment // _WORD,), mx.uint64)
        mx.eval(self._base)
        # Held for the pool's life: an array with a buffer exported is never donated to a result.
        self._memory = memoryview(self._base)  # type: ignore[arg-type]  # a buffer, which its stub does not say
        base_address = _address(self._memory)
        skip = -base_address % alignment
        if skip % _WORD:
            raise FlashError(f"MLX allocated at {base_address:#x}, not a multiple of {_WORD}; this MLX is unsupported.")
        self.address = base_address + skip
        self.nbytes = nbytes
        self.alignment = alignment
        array = self._base[skip // _WORD : skip // _WORD + words]
        if len(shape) == 2 and shape[1] % _WORD == 0:
            array = array.reshape(shape[0], -1).view(mx.uint8)  # beyond 2 GiB there is no flat array of bytes
        else:
            array = array.view(mx.uint8)[:nbytes].reshape(shape)
        mx.eval(array)
        self.array = array
        if _address(memoryview(array)) != self.address:  # type: ignore[arg-type]
            raise FlashError("MLX copied the pool where a view was expected; this version of MLX is unsupported.")
        use_huge_pages(self.address, nbytes)


def _rows(nbytes: int, row_bytes: int) -> tuple[int, int]:
    if row_bytes < 1 or nbytes % row_bytes:
        raise UsageError(f"A pool of {nbytes} bytes does not consist of whole rows of {row_bytes} bytes.")
    return nbytes // row_bytes, row_bytes


def _address(memory: memoryview) -> int:
    return int(np.asarray(memory).ctypes.data)
