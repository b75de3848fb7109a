"""Measures the cost of block checksums: pairs of reads with and without the comparison.

Each turn reads random blocks of random layers, as a token does: once with the comparison and once without, in random
order. With `--tokens`, the model then decodes pairs of tokens in the same way. On a busy machine only the ratios mean
something. The shortest times come nearest to those of an idle machine.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import THREADS
from mlx_flash.flash.files import Manifest, read_manifest
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.flash.unit_sums import read_block_sums

from .tools.report import environment

LAYERS_PER_TURN = 6
BEGINNING = 32  # tokens before the measured ones: they fill the slots and complete the look-ahead trial

Times = dict[bool, list[tuple[float, float]]]  # compared? -> (wall, processor) seconds


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--store", required=True, type=Path, help="folder of a store; `bench synthetic` makes one")
    parser.add_argument(
        "--blocks", type=whole_number(1), default=600, help="blocks of a layer to read at once (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=whole_number(1), default=60, help="seconds to read for (default: %(default)s)"
    )
    parser.add_argument(
        "--threads", type=whole_number(1), default=THREADS, help="reader threads (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=whole_number(0), default=0, help="tokens to decode after the reads (default: %(default)s)"
    )
    parser.add_argument("--memory", help="memory budget for decoding (default: as for `generate`)")


def main(arguments: argparse.Namespace) -> None:
    manifest = read_manifest(arguments.store)
    layout = manifest.layout
    count = min(arguments.blocks, layout.blocks)
    sums = read_block_sums(arguments.store, manifest)
    pool = AlignedPool(count * layout.block_bytes)
    addresses = pool.address + np.arange(count, dtype=np.int64) * layout.block_bytes
    rng = np.random.default_rng(0)
    took: Times = {True: [], False: []}
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
    figures: dict[str, Any] = {"bytes_per_turn": nbytes, "block_bytes": layout.block_bytes}
    print(f"{len(took[True])} pairs of {nbytes / 1e6:.0f} MB in blocks of {layout.block_bytes} bytes")
    figures["reads"] = show(took)
    if arguments.tokens:
        print(f"{arguments.tokens} tokens decoded")
        figures["tokens"] = show(decode(arguments))
    print(json.dumps({**figures, **environment(arguments.store)}))


def show(took: Times) -> dict[str, Any]:
    """Prints a table of the times with and without the comparison, and returns its figures."""
    on, off = np.array([took[True], took[False]])  # (n, 2) each
    figures: dict[str, Any] = {"pairs": len(on)}
    print("           compared   not     median of ratios   least compared   least not")
    for column, name in enumerate(("wall", "processor")):
        with_sums, without = on[:, column], off[:, column]
        row = [np.median(with_sums), np.median(without), np.median(with_sums / without), with_sums.min(), without.min()]
        print(
            f"{name:9} {row[0] * 1e3:7.1f} ms {row[1] * 1e3:7.1f} ms {row[2]:10.3f} {row[3] * 1e3:14.1f} ms "
            f"{row[4] * 1e3:8.1f} ms"
        )
        figures[f"{name}_s"] = [float(value) for value in row]
    return figures


def decode(arguments: argparse.Namespace) -> Times:
    """Decodes `BEGINNING` tokens, then times tokens with and without the comparison."""
    import mlx.core as mx
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_flash.loading.load import load

    context = BEGINNING + arguments.tokens
    model, _ = load(arguments.store, memory=arguments.memory, context=context, threads=arguments.threads)
    file = model.flash.streamer.file
    sums, cache = file.sums, make_prompt_cache(model)
    rng = np.random.default_rng(0)
    took: Times = {True: [], False: []}
    order = [True] * BEGINNING + [on for _ in range(arguments.tokens // 2) for on in rng.permutation([True, False])]
    for position, compared in enumerate(order):
        file.sums = sums if compared else None
        wall, processor = time.perf_counter(), time.process_time()
        mx.eval(model(mx.array([[int(rng.integers(model.flash.vocabulary))]]), cache=cache))
        if position >= BEGINNING:
            took[bool(compared)].append((time.perf_counter() - wall, time.process_time() - processor))
    model.flash.close()
    return took
