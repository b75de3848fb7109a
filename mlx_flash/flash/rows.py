"""Rows of neurons that MLX gathers from a pool of blocks; packed if the store is quantised."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .files import NeuronLayout
from .pool import AlignedPool


@dataclass(frozen=True)
class PackedRows:
    """Quantised rows (n, width) as stored, grouped along the width.

    packed: uint32 (n, width * bits / 32); scales, biases: (n, width / group_size). A number is q * scale + bias.
    """

    packed: mx.array
    scales: mx.array
    biases: mx.array
    group_size: int
    bits: int

    @property
    def components(self) -> tuple[mx.array, mx.array, mx.array]:
        return self.packed, self.scales, self.biases

    def dequantised(self, dtype: mx.Dtype, stream: mx.ThreadLocalStream | None = None) -> mx.array:
        """The dequantised rows, (n, width) in `dtype`."""
        scales, biases = (part.astype(dtype, stream=stream) for part in (self.scales, self.biases))
        return mx.dequantize(self.packed, scales, biases, group_size=self.group_size, bits=self.bits, stream=stream)

    def project(self, x: mx.array) -> mx.array:
        """x @ rows.T: (N, width) -> (N, n)"""
        return self._product(x, transpose=True)

    def combine(self, h: mx.array) -> mx.array:
        """h @ rows: (N, n) -> (N, width)"""
        return self._product(h, transpose=False)

    def _product(self, x: mx.array, transpose: bool) -> mx.array:
        scales, biases = self.scales.astype(x.dtype), self.biases.astype(x.dtype)
        return mx.quantized_matmul(
            x, self.packed, scales, biases, transpose=transpose, group_size=self.group_size, bits=self.bits
        )


StoredRows = tuple[mx.array | PackedRows, ...]
"""Rows of each part: (n, width), or packed if the store is quantised."""


class BlockRows:
    """The rows of neurons in a pool of blocks, as strided views. Rows are gathered from them without another copy.

    A block may be padded, so rows have no common stride. A view therefore overlaps itself: its row r begins at byte
    r * grain_bytes of the pool. A quantised row has three views, of its packed numbers, scales and biases. Gathered one
    by one, they have the layout that `mx.dequantize` needs; it would first copy slices of a row.
    """

    def __init__(
        self, pool: AlignedPool, layout: NeuronLayout, parts: tuple[str, ...], side: mx.ThreadLocalStream | None
    ) -> None:
        self.side = side
        self.pool = pool
        self.layout = layout
        self.parts = parts
        self.block_bytes = layout.part_range(parts)[1]
        self.grain_bytes = math.gcd(self.block_bytes, layout.row_bytes)
        rows = (pool.nbytes - layout.row_bytes) // self.grain_bytes + 1
        self.views = []
        begin = 0  # byte offset of a component within its row
        for name, elements in layout.components:
            dtype = getattr(mx, name)
            typed = pool.array.view(dtype)
            strides = (self.grain_bytes // dtype.size, 1)
            self.views.append(mx.as_strided(typed, (rows, elements), strides, begin // dtype.size))
            begin += elements * dtype.size
        mx.eval(self.views)
        # The CPU backend takes five times as long to dequantise to 16 bits as to 32 (bench/results/bits.md).
        self.dtype = mx.float32 if layout.quantised and side is not None else getattr(mx, layout.dtype)

    def take(self, blocks: np.ndarray, lanes: np.ndarray, parts: tuple[str, ...]) -> tuple[mx.array, ...]:
        """Copies of the rows of `parts`, each (n, width).

        blocks: int (n,), places in the pool. lanes: int (n,), positions of the neurons in these blocks. The rows have
        the layout's dtype, or float32 if they are dequantised on the CPU backend.
        """
        return self.widened(self.take_stored(blocks, lanes, parts))

    def widened(self, stored: StoredRows) -> tuple[mx.array, ...]:
        """The rows that `take_stored` returned, dequantised: (n, width) for each part."""
        streams = self._streams(len(stored))
        return tuple(
            each.dequantised(self.dtype, stream) if isinstance(each, PackedRows) else each
            for each, stream in zip(stored, streams, strict=True)
        )

    def take_stored(self, blocks: np.ndarray, lanes: np.ndarray, parts: tuple[str, ...]) -> StoredRows:
        """Like `take`, without dequantising."""
        layout = self.layout
        start = (blocks.astype(np.int64) * self.block_bytes + lanes * layout.row_bytes) // self.grain_bytes
        part_step = layout.neurons_per_block * layout.row_bytes // self.grain_bytes
        begins = [mx.array((start + self.parts.index(part) * part_step).astype(np.int32)) for part in parts]
        result: list[mx.array | PackedRows] = []
        for begin, stream in zip(begins, self._streams(len(parts)), strict=True):
            first, *others = (mx.take(view, begin, axis=0, stream=stream) for view in self.views)
            if layout.quantised:
                scales, biases = others
                result.append(PackedRows(first, scales, biases, layout.group_size, layout.bits))
            else:
                result.append(first)
        return tuple(result)

    def _streams(self, parts: int) -> list[mx.ThreadLocalStream | None]:
        """The stream of each part. Parts are gathered in parallel."""
        return [None] + [self.side] * (parts - 1)
