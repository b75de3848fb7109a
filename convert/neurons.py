"""Writing the bundle file: row i of the up projection and column i of the down projection side by side."""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flash.flash.files import CHECKSUM_BYTES, Manifest, NeuronLayout
from mlx_flash.flash.system import sync_to_disk

from .tensors import to_bytes


def bundle_layer(layout: NeuronLayout, rows: tuple[mx.array, ...]) -> np.ndarray:
    """The blocks of one layer: uint8 (blocks, block_bytes). rows: one (F, D) array per part."""
    blocks = np.zeros((layout.blocks, layout.block_bytes), np.uint8)
    per_block = layout.neurons_per_block * layout.row_bytes
    for part, matrix in enumerate(rows):
        lanes = np.zeros((layout.blocks * per_block,), np.uint8)
        lanes[: layout.neurons * layout.row_bytes] = to_bytes(matrix)
        blocks[:, part * per_block : (part + 1) * per_block] = lanes.reshape(layout.blocks, per_block)
    return blocks


def layer_checksums(blocks: np.ndarray) -> bytes:
    """CRC-32 of every block of a layer, as they stand in the table. blocks: uint8 (blocks, block_bytes)."""
    return np.array([zlib.crc32(block) for block in blocks], "<u4").tobytes()


def write_neurons(
    folder: Path,
    layout: NeuronLayout,
    load_layer: Callable[[int], tuple[mx.array, ...]],
    progress: Callable[[int], None],
) -> None:
    """Writes `neurons.bin` and `neurons.crc32` in `folder`, going on after the last whole layer found there.

    A layer counts as written when its checksums are; those are written after its bytes are on the disk.
    """
    neurons_path, sums_path = folder / Manifest.neurons_file, folder / Manifest.neurons_checksums_file
    sums_bytes = layout.blocks * CHECKSUM_BYTES
    neurons_path.touch()
    sums_path.touch()
    done = min(sums_path.stat().st_size // sums_bytes, neurons_path.stat().st_size // layout.layer_bytes)
    with neurons_path.open("r+b") as neurons, sums_path.open("r+b") as sums:
        if done:
            # Of the last table a power cut may have kept the length and lost the content.
            neurons.seek((done - 1) * layout.layer_bytes)
            sums.seek((done - 1) * sums_bytes)
            last = np.frombuffer(neurons.read(layout.blocks * layout.block_bytes), np.uint8)
            if layer_checksums(last.reshape(layout.blocks, layout.block_bytes)) != sums.read(sums_bytes):
                done -= 1
        sums.truncate(done * sums_bytes)
        sums.seek(0, os.SEEK_END)
        neurons.truncate(done * layout.layer_bytes)
        neurons.seek(0, os.SEEK_END)
        progress(done * layout.layer_bytes)
        for layer in range(done, layout.layers):
            blocks = bundle_layer(layout, load_layer(layer))
            neurons.write(blocks.reshape(-1).data)
            neurons.write(bytes(layout.layer_bytes - blocks.size))
            neurons.flush()
            sync_to_disk(neurons.fileno())
            sums.write(layer_checksums(blocks))
            sums.flush()
            sync_to_disk(sums.fileno())
            progress(layout.layer_bytes)
