"""Writes the neurons' file, with row i of the up projection beside column i of the down projection."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flash.flash.files import CHECKSUM_BYTES, Manifest, NeuronLayout
from mlx_flash.flash.host_arrays import to_bytes
from mlx_flash.flash.plain_files import read_at, reading
from mlx_flash.flash.system import sync_to_disk

from .numpy_matrix import row_pieces
from .sums import WrittenSums


def row_bytes(layout: NeuronLayout, matrix: mx.array) -> np.ndarray:
    """The stored bytes of the rows. matrix: (F, D) in the layout's dtype -> uint8 (F, row_bytes)."""
    components = quantised(layout, matrix) if layout.quantised else (matrix,)
    return np.concatenate([to_bytes(part).reshape(len(matrix), -1) for part in components], axis=1)


def quantised(layout: NeuronLayout, matrix: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """The rows of a matrix (F, D) as packed numbers, scales and biases."""
    parts = mx.quantize(mx.contiguous(matrix), group_size=layout.group_size, bits=layout.bits)
    return parts  # type: ignore[return-value]


def bundle_layer(
    layout: NeuronLayout, rows: tuple[mx.array, ...], begin: int = 0, end: int | None = None
) -> np.ndarray:
    """Blocks begin to end of one layer (all by default), uint8 (n, block_bytes). rows: one (F, D) array per part."""
    count = (layout.blocks if end is None else end) - begin
    blocks = np.zeros((count, layout.block_bytes), np.uint8)
    each = layout.neurons_per_block
    per_block = each * layout.row_bytes
    for part, matrix in enumerate(rows):
        data = row_bytes(layout, matrix[begin * each : (begin + count) * each]).reshape(-1)
        lanes = np.zeros((count * per_block,), np.uint8)
        lanes[: len(data)] = data
        blocks[:, part * per_block : (part + 1) * per_block] = lanes.reshape(count, per_block)
    return blocks


def layer_checksums(blocks: np.ndarray) -> bytes:
    """The CRC-32 of every block of a layer, in the form of the table. blocks: uint8 (blocks, block_bytes)."""
    return np.array([zlib.crc32(block) for block in blocks], "<u4").tobytes()


def write_neurons(
    folder: Path,
    layout: NeuronLayout,
    load_layer: Callable[[int], tuple[mx.array, ...]],
    progress: Callable[[int], None],
    written: WrittenSums | None = None,
) -> str:
    """Writes `neurons.bin` and `neurons.crc32` in `folder`, and continues after the last complete layer found there.

    A layer's checksums are written after its bytes are on the disk, so a layer with checksums is complete. written:
    holds a checksum of each layer's checksums, to check those that are found.

    Returns the intended SHA-256 of `neurons.crc32`, in hex. Raises ReadError.
    """
    neurons_path, sums_path = folder / Manifest.neurons_file, folder / Manifest.neurons_checksums_file
    sums_bytes = layout.blocks * CHECKSUM_BYTES
    neurons_path.touch()
    sums_path.touch()
    with neurons_path.open("r+b") as neurons, sums_path.open("r+b") as sums:
        tables = _tables_found(neurons_path, sums_path, layout, written)
        sums.truncate(len(tables) * sums_bytes)
        sums.seek(0, os.SEEK_END)
        neurons.truncate(len(tables) * layout.layer_bytes)
        neurons.seek(0, os.SEEK_END)
        progress(len(tables) * layout.layer_bytes)
        digest = hashlib.sha256(b"".join(tables))
        for layer in range(len(tables), layout.layers):
            rows = load_layer(layer)
            table = b""
            for begin, end in row_pieces((layout.blocks, layout.block_bytes), 1):
                blocks = bundle_layer(layout, rows, begin, end)
                neurons.write(blocks.reshape(-1).data)
                table += layer_checksums(blocks)
            del rows
            neurons.write(bytes(layout.layer_bytes - layout.blocks * layout.block_bytes))
            neurons.flush()
            sync_to_disk(neurons.fileno())
            sums.write(table)
            sums.flush()
            sync_to_disk(sums.fileno())
            if written is not None:
                written.add(_line_of(layer), {"": zlib.crc32(table)})
            digest.update(table)
            progress(layout.layer_bytes)
    return digest.hexdigest()


def _line_of(layer: int) -> str:
    return f"{Manifest.neurons_checksums_file}, layer {layer}"


def _tables_found(
    neurons_path: Path, sums_path: Path, layout: NeuronLayout, written: WrittenSums | None
) -> list[bytes]:
    """The checksums of each layer that an earlier run completed. Raises ReadError."""
    sums_bytes = layout.blocks * CHECKSUM_BYTES
    with reading(sums_path):
        found = sums_path.read_bytes()
    done = min(len(found) // sums_bytes, neurons_path.stat().st_size // layout.layer_bytes)
    tables = [found[layer * sums_bytes : (layer + 1) * sums_bytes] for layer in range(done)]
    if written is not None:
        sound = [written.of(_line_of(layer)) == {"": zlib.crc32(table)} for layer, table in enumerate(tables)]
        tables = tables[: [*sound, False].index(False)]
    if tables:
        # After a power cut, the last layer may have its full length but not its content.
        last = np.empty((layout.blocks, layout.block_bytes), np.uint8)
        with reading(neurons_path, f"layer {len(tables) - 1}"), neurons_path.open("rb") as file:
            read_at(file, (len(tables) - 1) * layout.layer_bytes, last)
        if layer_checksums(last) != tables[-1]:
            tables.pop()
    return tables
