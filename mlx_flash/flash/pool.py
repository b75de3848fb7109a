"""Memory that the reader fills and MLX reads: one evaluated MLX array with an aligned start, never reallocated."""

from __future__ import annotations

import ctypes

import mlx.core as mx
import numpy as np

from ..errors import FlashError, UsageError
from .system import POOL_ALIGNMENT, use_huge_pages

_WORD = 8  # bytes per element of the base array; an MLX axis is below 2**31, so a byte array would end at 2 GiB


class AlignedPool:
    """`nbytes` of zeros in an MLX buffer, for host writes at `address`.

    array: mx.uint8, (nbytes,) or, with `row_bytes`, (nbytes / row_bytes, row_bytes); evaluated, shares the buffer.
    Make typed views with `array.view(dtype)` once and keep them. Never assign to the array: `array[...] = v` may move
    it to another buffer. Write to `address` only while no unevaluated or running graph reads it.
    address: address of the first byte, a multiple of `alignment` (a power of two). nbytes: size without the overhead
    of the alignment. Pages are resident from the start.
    Raises UsageError for impossible sizes, FlashError if this version of MLX allocates or copies in another way.
    """

    def __init__(
        self, nbytes: int, alignment: int = POOL_ALIGNMENT, row_bytes: int | None = None, hurry: bool = False
    ) -> None:
        """hurry: whether huge pages may come later, in the kernel's own time."""
        shape = (nbytes,) if row_bytes is None else _rows(nbytes, row_bytes)
        if nbytes < 1 or alignment < _WORD or alignment & (alignment - 1):
            raise UsageError(
                f"A pool has {nbytes} bytes aligned to {alignment}; expected at least 1 byte and a power of two >= 8."
            )
        words = -(-nbytes // _WORD)
        if max(*shape, words + alignment // _WORD) >= 2**31 or (nbytes >= 2**31 and shape[-1] % _WORD):
            raise UsageError(
                f"A pool of {nbytes} bytes in rows of {shape[-1]} exceeds MLX's axes of 2**31 - 1 elements. From 2 GiB "
                "on, use rows of a multiple of 8 bytes; the limit is 16 GiB."
            )
        self._base = mx.zeros((words + alignment // _WORD,), mx.uint64)
        mx.eval(self._base)
        # Held for the pool's life: MLX never donates an array with an exported buffer to a result.
        self._memory = memoryview(self._base)  # type: ignore[arg-type]  # mx.array is a buffer; its stub lacks that
        base_address = _address(self._memory)
        skip = -base_address % alignment
        if skip % _WORD:
            raise FlashError(
                f"MLX allocated at {base_address:#x}, expected a multiple of {_WORD}. "
                "This version of MLX is unsupported."
            )
        self.address = base_address + skip
        self.nbytes = nbytes
        self.alignment = alignment
        array = self._base[skip // _WORD : skip // _WORD + words]
        if len(shape) == 2 and shape[1] % _WORD == 0:
            array = array.reshape(shape[0], -1).view(mx.uint8)  # MLX has no flat byte arrays beyond 2 GiB
        else:
            array = array.view(mx.uint8)[:nbytes].reshape(shape)
        mx.eval(array)
        self.array = array
        self.must_hold(array, 0)
        use_huge_pages(self.address, nbytes, now=not hurry)

    def host_rows(self, row_bytes: int) -> np.ndarray:
        """The pool as a host array that may be written to: uint8 (nbytes / row_bytes, row_bytes). It does not keep the
        pool."""
        raw = (ctypes.c_uint8 * self.nbytes).from_address(self.address)
        return np.ctypeslib.as_array(raw).reshape(-1, row_bytes)

    def must_hold(self, view: mx.array, begin: int) -> None:
        """Raises FlashError unless an evaluated array shares the pool's memory, from byte `begin` on."""
        seen = view.view(mx.uint8)  # NumPy lacks bfloat16
        mx.eval(seen)
        if _address(memoryview(seen)) != self.address + begin:  # type: ignore[arg-type]
            raise FlashError("MLX copied the pool where a view was expected. This version of MLX is unsupported.")


def copy_rows(source: AlignedPool, target: AlignedPool, row_bytes: int, rows: np.ndarray) -> None:
    """Copies `rows` of a pool to the beginning of another one, in this order. No running graph may use them."""
    into = target.host_rows(row_bytes)[: len(rows)]
    source.host_rows(row_bytes).take(rows, axis=0, out=into, mode="clip")  # the default mode makes another copy


def _rows(nbytes: int, row_bytes: int) -> tuple[int, int]:
    if row_bytes < 1 or nbytes % row_bytes:
        raise UsageError(f"A pool has {nbytes} bytes, expected a multiple of its row size of {row_bytes} bytes.")
    return nbytes // row_bytes, row_bytes


def _address(memory: memoryview) -> int:
    return int(np.asarray(memory).ctypes.data)
