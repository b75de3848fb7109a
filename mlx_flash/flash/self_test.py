"""Tests that run on this machine before a model does. They cover shared memory, through the views that a model computes
with, and products with packed rows, in the shapes that occur."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

import mlx.core as mx
import numpy as np

from ..errors import FlashError
from .files import NeuronLayout
from .host_arrays import to_numpy
from .pool import AlignedPool
from .rows import BlockRows, PackedRows

SEEDS = (1, 2)  # two rounds, because a device's cache may hold the bytes of the first
EDGE_BYTES = 4096  # bytes tested at either end of an expert's part; a short part is tested whole
# Rows of a product. MLX's kernels treat a remainder of 8 (or 64) rows apart, and sum in parts from 1024 and 8192 on.
NEURONS_TRIED = (1, 7, 63, 64, 1025, 9000)
TOLERANCE = 0.02  # relative to the largest number of a result


def check_neuron_pool(pool: AlignedPool, rows: BlockRows) -> None:
    """Writes blocks from the host and takes their rows on the device. Raises FlashError if they differ.

    This overwrites the first and the last block of the pool.
    """
    layout = rows.layout
    places = np.unique([0, pool.nbytes // rows.block_bytes - 1])
    blocks = np.repeat(places, 2)
    lanes = np.tile([0, layout.neurons_per_block - 1], len(places))
    for seed in SEEDS:
        written = np.random.default_rng(seed).integers(0, 256, (len(places), rows.block_bytes), np.uint8)
        for place, contents in zip(places.tolist(), written, strict=True):
            ctypes.memmove(pool.address + place * rows.block_bytes, contents.ctypes.data, rows.block_bytes)
        taken = [
            [component.view(mx.uint8) for component in (part.components if isinstance(part, PackedRows) else (part,))]
            for part in rows.take_stored(blocks, lanes, rows.parts)
        ]
        mx.eval(taken)
        for index, components in enumerate(taken):
            begins = (index * layout.neurons_per_block + lanes) * layout.row_bytes  # byte offsets in the block
            expected = [
                contents[begin : begin + layout.row_bytes]
                for contents, begin in zip(np.repeat(written, 2, axis=0), begins, strict=True)
            ]
            _must_be_equal(np.concatenate([to_numpy(each) for each in components], axis=1), np.stack(expected))


def check_expert_pools(memory: Mapping[str, AlignedPool], pools: Mapping[str, mx.array]) -> None:
    """Writes into slots from the host and reads them on the device. Raises FlashError if they differ.

    pools: a layer's arrays (slots, ...) over `memory`, by name. This overwrites parts of their first and last slots.
    """
    for seed in SEEDS:
        random = np.random.default_rng(seed)
        seen, expected = [], []
        for name, view in pools.items():
            rows = view.reshape(len(view), -1)
            row_bytes = memory[name].nbytes // len(view)
            count = rows.shape[1] if row_bytes <= 2 * EDGE_BYTES else EDGE_BYTES // view.dtype.size
            edge = count * view.dtype.size
            slots = np.unique([0, len(view) - 1])
            for begin, columns in ((0, rows[:, :count]), (row_bytes - edge, rows[:, rows.shape[1] - count :])):
                written = random.integers(0, 256, (len(slots), edge), np.uint8)
                for slot, contents in zip(slots.tolist(), written, strict=True):
                    ctypes.memmove(memory[name].address + slot * row_bytes + begin, contents.ctypes.data, edge)
                seen.append(mx.take(columns, mx.array(slots), axis=0).view(mx.uint8))
                expected.append(written)
                if edge == row_bytes:
                    break  # the edge is the whole part
        mx.eval(seen)
        for found, written in zip(seen, expected, strict=True):
            _must_be_equal(to_numpy(found), written)


def _must_be_equal(seen: np.ndarray, written: np.ndarray) -> None:
    if not np.array_equal(seen, written):
        raise FlashError(
            "self-test failed: the device does not see what the host writes into shared memory. This machine "
            "or this version of MLX cannot stream safely. Please report this with the output of `pip show mlx`."
        )


def check_packed_products(layout: NeuronLayout) -> None:
    """Compares this device's products of packed rows with those of dequantised rows, for the row counts that occur.

    Kernels for such products have been wrong on some GPUs (ml-explore/mlx issue 4201). Raises FlashError.
    """
    dtype = getattr(mx, layout.dtype)
    some = mx.random.normal((64, layout.width), key=mx.random.key(0)).astype(dtype)
    packed = mx.quantize(some, group_size=layout.group_size, bits=layout.bits)
    one_of_each = PackedRows(*packed, layout.group_size, layout.bits)  # type: ignore[call-arg, arg-type]
    numbers = one_of_each.dequantised(dtype).astype(mx.float32)  # (64, width)
    most = min(layout.neurons, layout.piece_neurons)
    for count in sorted({min(count, most) for count in (*NEURONS_TRIED, most)}):
        which = mx.arange(count) % 64  # repeats 64 rows, since different ones would take too much memory
        rows = PackedRows(*(mx.take(part, which, axis=0) for part in packed), layout.group_size, layout.bits)  # type: ignore[call-arg, arg-type]
        for tokens in (1, 2):
            x = mx.random.normal((tokens, layout.width), key=mx.random.key(tokens)).astype(dtype)
            h = mx.random.normal((tokens, count), key=mx.random.key(tokens)).astype(dtype)
            padded = mx.pad(h.astype(mx.float32), [(0, 0), (0, -count % 64)])
            products = (
                (rows.project(x), mx.take(x.astype(mx.float32) @ numbers.T, which, axis=1)),
                (rows.combine(h), padded.reshape(tokens, -1, 64).sum(axis=1) @ numbers),
            )
            for found, expected in products:
                error = mx.abs(found.astype(mx.float32) - expected).max()
                if not mx.isfinite(error).item() or (error > TOLERANCE * mx.abs(expected).max()).item():
                    raise FlashError(
                        "self-test failed: products with quantised rows are wrong on this device with this version of "
                        "MLX. Use a 16-bit store, and please report this with the output of `pip show mlx`."
                    )
