"""What comparing a store's blocks with their checksums costs: the same reads with and without, in pairs.

Each turn reads random blocks of random layers, as a token does, once with the comparison and once without, in random
order. On a busy machine only the ratios mean something; the least times come nearest to a quiet one.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.commands import whole_number
from mlx_flash.defaults import THREADS
from mlx_flash.flash.files import Manifest, read_manifest
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import Reader, UnitFile
from mlx_flash.flash.unit_sums import read_block_sums

from .report import environment

LAYERS_PER_TURN = 6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", required=True, type=Path, help="folder of a store; `bench synthetic` makes one")
    parser.add_argument(
        "--blocks", type=whole_number(1), default=600, help="of a layer, at once (default: %(default)s)"
    )
    parser.add_argument("--seconds", type=whole_number(1), default=60, help="default: %(default)s")
    parser.add_argument(
        "--threads", type=whole_number(1), default=THREADS, help="reader threads (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    manifest = read_manifest(arguments.store)
    layout = manifest.layout
    count = min(arguments.blocks, layout.blocks)
    sums = read_block_sums(arguments.store, manifest)
    pool = AlignedPool(count * layout.block_bytes)
    addresses = pool.address + np.arange(count, dtype=np.int64) * layout.block_bytes
    rng = np.random.default_rng(0)
    took: dict[bool, list[tuple[float, float]]] = {True: [], False: []}  # compared? -> (wall, processor) seconds
    with UnitFile(arguments.store / Manifest.neurons_file) as file, Reader(arguments.threads) as reader:
        end = time.monotonic() + arguments.seconds
        while time.monotonic() < end:
            for compared in rng.permutation([True, False]).tolist():
                file.sums = sums if compared else None
                wall, processor = time.perf_counter(), time.process_time()
                for _ in range(LAYERS_PER_TURN):
                    layer = int(rng.integers(layout.layers))
                    blocks = np.sort(rng.choice(layout.blocks, count, replace=False)).astype(np.int64)
                    offsets = layer * layout.layer_bytes + blocks * layout.block_bytes
                    reader.read(file, offsets, addresses, layout.block_bytes)
                took[compared].append((time.perf_counter() - wall, time.process_time() - processor))
    nbytes = LAYERS_PER_TURN * count * layout.block_bytes
    on, off = np.array([took[True], took[False]])  # (n, 2) each
    figures: dict[str, Any] = {"pairs": len(on), "bytes_per_turn": nbytes, "block_bytes": layout.block_bytes}
    print(f"{len(on)} pairs of {nbytes / 1e6:.0f} MB in blocks of {layout.block_bytes} bytes")
    print("           compared   not     median of ratios   least compared   least not")
    for column, name in enumerate(("wall", "processor")):
        with_sums, without = on[:, column], off[:, column]
        row = [np.median(with_sums), np.median(without), np.median(with_sums / without), with_sums.min(), without.min()]
        print(
            f"{name:9} {row[0] * 1e3:7.1f} ms {row[1] * 1e3:7.1f} ms {row[2]:10.3f} {row[3] * 1e3:14.1f} ms "
            f"{row[4] * 1e3:8.1f} ms"
        )
        figures[f"{name}_s"] = [float(value) for value in row]
    print(json.dumps({**figures, **environment(arguments.store)}))
