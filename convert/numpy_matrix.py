"""Matrices for calibration on the host, in NumPy. They are kept as stored, and converted to float32 piece by piece.

NumPy's BLAS is some 30 times faster at this than that of MLX's Linux wheel, and these weights are used only a few
times. Converted as a whole, a layer of a 16-bit model would take twice its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.plain_files import read_at, reading
from mlx_flash.flash.safetensors_file import TensorEntry

PIECE_BYTES = 32 << 20


def row_pieces(shape: tuple[int, ...], item_bytes: int) -> Iterator[tuple[int, int]]:
    """Yields (begin, end) of pieces of rows. Each has as many rows as fit into PIECE_BYTES, but at least one."""
    row_bytes = int(np.prod(shape[1:], dtype=np.int64)) * item_bytes
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for begin in range(0, shape[0], step):
        yield begin, min(begin + step, shape[0])


class NumpyMatrix:
    """A matrix W, (R, C), kept in its stored type."""

    def __init__(self, weight: mx.array) -> None:
        self.weight = weight
        self.shape = weight.shape

    def pieces(self) -> Iterator[tuple[int, int, np.ndarray]]:
        """Yields (begin, end, rows begin to end in float32)."""
        for begin, end in row_pieces(self.shape, 4):
            yield begin, end, self.rows(begin, end)

    def rows(self, begin: int, end: int) -> np.ndarray:
        """Rows begin to end, float32 (end - begin, C)."""
        return to_numpy(self.weight[begin:end], np.float32)

    def rows_dot(self, x: np.ndarray) -> np.ndarray:
        """x W^T: (N, C) -> (N, R)"""
        result = np.empty((len(x), self.shape[0]), np.float32)
        for begin, end, rows in self.pieces():
            result[:, begin:end] = x @ rows.T
        return result

    def sum_of_rows(self, h: np.ndarray) -> np.ndarray:
        """h W: (N, R) -> (N, C)"""
        result = np.zeros((len(h), self.shape[1]), np.float32)
        for begin, end, rows in self.pieces():
            result += h[:, begin:end] @ rows
        return result


class PackedNumpyMatrix(NumpyMatrix):
    """A matrix that is quantised along its rows: packed numbers, scales and biases of `mx.quantize`."""

    def __init__(self, packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> None:
        super().__init__(packed)
        self.scales, self.biases, self.group_size, self.bits = scales, biases, group_size, bits
        self.shape = packed.shape[0], packed.shape[1] * 32 // bits

    def rows(self, begin: int, end: int) -> np.ndarray:
        scales, biases = (part[begin:end].astype(mx.float32) for part in (self.scales, self.biases))
        packed = self.weight[begin:end]
        numbers = mx.dequantize(packed, scales, biases, group_size=self.group_size, bits=self.bits)
        return to_numpy(numbers, copy=False)


class HostLinear:
    """Replaces a linear layer, quantised or not, and computes in NumPy."""

    def __init__(self, linear: nn.Linear | nn.QuantizedLinear) -> None:
        if isinstance(linear, nn.QuantizedLinear):
            scales, biases = linear["scales"], linear["biases"]
            self.matrix: NumpyMatrix = PackedNumpyMatrix(linear.weight, scales, biases, linear.group_size, linear.bits)
        else:
            self.matrix = NumpyMatrix(linear.weight)
        self.bias = to_numpy(linear.bias, np.float32) if "bias" in linear else np.float32(0)

    def __call__(self, x: mx.array) -> mx.array:
        flat = to_numpy(x, np.float32).reshape(-1, x.shape[-1])
        return mx.array(self.matrix.rows_dot(flat) + self.bias).reshape(*x.shape[:-1], -1).astype(x.dtype)


class FileEmbedding:
    """Replaces an embedding, and reads only the requested rows from a safetensors file.

    entry: the entry of the tensor (R, D), or (R, ...) packed, in the file. dtype: type of its elements.
    """

    def __init__(self, path: Path, name: str, entry: TensorEntry, dtype: mx.Dtype) -> None:
        self.path, self.name, self.entry, self.dtype = path, name, entry, dtype
        self.count = entry.shape[0]
        self.row_bytes = (entry.end - entry.begin) // self.count

    def __call__(self, ids: mx.array) -> mx.array:
        """ids (...) -> float32 (..., D). Raises ReadError."""
        return self.stored(ids).astype(mx.float32)

    def stored(self, ids: mx.array) -> mx.array:
        """The rows in their stored type."""
        wanted = to_numpy(ids).reshape(-1)
        rows = np.empty((len(wanted), self.row_bytes), np.uint8)
        # Runs of neighbouring rows, each of which is read at once.
        runs = [0, *(np.flatnonzero(np.diff(wanted) != 1) + 1).tolist(), len(wanted)]
        with reading(self.path, f"tensor {self.name}"), self.path.open("rb", buffering=0) as file:
            for begin, end in pairwise(runs):
                read_at(file, self.entry.begin + int(wanted[begin]) * self.row_bytes, rows[begin:end])
        return mx.array(rows).view(self.dtype).reshape(*ids.shape, -1)

    def as_linear(self, x: mx.array) -> mx.array:
        """The products with all rows, for models whose output matrix is the embedding. x (..., D) -> (..., R)."""
        return _products(x, self, self.count)


class PackedFileEmbedding:
    """A FileEmbedding for a quantised matrix, made of its packed numbers, scales and biases."""

    def __init__(self, parts: Sequence[FileEmbedding], group_size: int, bits: int) -> None:
        self.packed, self.scales, self.biases = parts
        self.group_size, self.bits = group_size, bits

    def __call__(self, ids: mx.array) -> mx.array:
        """ids (...) -> float32 (..., D)"""
        packed, scales, biases = self.packed.stored(ids), self.scales(ids), self.biases(ids)
        return mx.dequantize(packed, scales, biases, group_size=self.group_size, bits=self.bits)

    def as_linear(self, x: mx.array) -> mx.array:
        """The same as in FileEmbedding."""
        return _products(x, self, self.packed.count)


def _products(x: mx.array, embedding: FileEmbedding | PackedFileEmbedding, count: int) -> mx.array:
    """The products of x (..., D) with each row of the embedding, (..., count). Reads one piece of rows at a time."""
    flat = to_numpy(x, np.float32).reshape(-1, x.shape[-1])
    result = np.empty((len(flat), count), np.float32)
    for begin, end in row_pieces((count, flat.shape[1]), 4):
        result[:, begin:end] = flat @ to_numpy(embedding(mx.arange(begin, end)), copy=False).T
    return mx.array(result).reshape(*x.shape[:-1], -1).astype(x.dtype)
