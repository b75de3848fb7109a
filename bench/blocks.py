"""Which block layout suits small neurons? Reads the same random neurons under several layouts."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import BITS, THREADS
from mlx_flash.errors import UsageError
from mlx_flash.flash.files import ALIGNMENT, LAYER_ALIGNMENT, NeuronLayout, round_up
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.unit_file import UnitFile

from .reads import add_file_arguments, opened_file
from .tools.report import cached_share, environment, spread

MOST_PER_BLOCK = 8


@dataclass
class Way:
    """A layout with `count` neurons in a block of `block_bytes`, and its measurements."""

    name: str
    count: int
    block_bytes: int
    seconds: list[float] = field(default_factory=list)  # one entry per layer read
    used_bytes: int = 0  # bytes of a block that are read; 0: all
    bytes: int = 0  # total requested from the disk
    reads: int = 0


def ways_of(bundle_bytes: int) -> list[Way]:
    """Layouts to compare: padded blocks of 1 to 8 neurons, and unpadded ones.

    A padded layout is left out if it wastes at least as much as a smaller one.
    """
    ways, least = [], 1.0
    for count in range(1, MOST_PER_BLOCK + 1):
        block = round_up(count * bundle_bytes, ALIGNMENT)
        waste = 1 - count * bundle_bytes / block
        if waste < least:
            ways.append(Way("padded", count, block))
            least = waste
    if bundle_bytes % ALIGNMENT:
        ways.append(Way("unpadded", 1, round_up(bundle_bytes, ALIGNMENT), used_bytes=bundle_bytes))
        ways.append(Way("tight", 1, bundle_bytes))
    return ways


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_file_arguments(parser)
    parser.add_argument(
        "--width", type=whole_number(32, 1 << 16), default=4096, help="hidden size of the model (default: %(default)s)"
    )
    parser.add_argument(
        "--neurons", type=whole_number(8), default=16384, help="neurons per layer (default: %(default)s)"
    )
    parser.add_argument(
        "--parts", type=int, choices=(2, 3), default=2, help="matrices that a neuron spans (default: %(default)s)"
    )
    parser.add_argument("--bits", type=int, choices=BITS, default=4, help="bits per FFN weight (default: %(default)s)")
    parser.add_argument(
        "--percent",
        type=whole_number(1, 100),
        default=3,
        help="percentage of a layer's neurons to read (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=whole_number(1), default=20, help="rounds over all layouts (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    parts = ("gate", "up", "down")[-arguments.parts :]
    layout = NeuronLayout.plan("float16", 1, arguments.neurons, arguments.width, parts, arguments.bits)
    ways = ways_of(layout.bundle_bytes)
    layer_bytes = {
        id(way): round_up(-(-layout.neurons // way.count) * way.block_bytes, LAYER_ALIGNMENT) for way in ways
    }
    with opened_file(arguments) as (path, file):
        layers = file.size // max(layer_bytes.values())
        if layers < 1:
            raise UsageError(
                f"{path} has {file.size} bytes, but one layer has {max(layer_bytes.values())}. Raise --size."
            )
        needed = layout.neurons * arguments.percent // 100
        measure(file, ways, layer_bytes, layers, layout.neurons, needed, arguments.rounds)
        share, direct = cached_share(path), file.direct
        where = environment(path)
    print(f"{needed} of {layout.neurons} neurons per layer, {layout.bundle_bytes} bytes each; direct: {direct}")
    heads = ("neurons", "bytes", "file", "reads", "MB", "ms/layer", "p90", "ratio")
    print(f"{'block':<10}" + "".join(f"{head:>10}" for head in heads))
    rows: list[dict[str, Any]] = []
    for way in ways:
        n = len(way.seconds)
        ratio = np.array(list(way.seconds)) / np.array(list(ways[0].seconds))
        times = spread(way.seconds)
        file_share = way.block_bytes / way.count / layout.bundle_bytes
        rows.append(
            {
                "block": way.name,
                "neurons_per_block": way.count,
                "block_bytes": way.block_bytes,
                "file_share": file_share,
                "reads": way.reads / n,
                "bytes": way.bytes / n,
                "seconds": times,
                "ratio": float(np.median(ratio)),
            }
        )
        print(
            f"{way.name:<10}{way.count:>10}{way.block_bytes:>10}{file_share:>10.2f}{way.reads / n:>10.0f}"
            f"{way.bytes / n / 1e6:>10.2f}{times['median'] * 1e3:>10.2f}{times['p90'] * 1e3:>10.2f}"
            f"{np.median(ratio):>10.2f}"
        )
    result = {"command": "blocks", "bundle_bytes": layout.bundle_bytes, "needed": needed, "direct": direct}
    print(json.dumps({**result, "cached_share": share, "environment": where, "rows": rows}))


def measure(
    file: UnitFile,
    ways: list[Way],
    layer_bytes: dict[int, int],
    layers: int,
    neurons: int,
    needed: int,
    rounds: int,
) -> None:
    """Draws new neurons of one layer in every round and reads them under every layout, each layout first in turn.

    The time covers one layer of a token: from the ids to the last byte in its slot.
    """
    rng = np.random.default_rng(0)
    pool = AlignedPool(max(needed * way.block_bytes for way in ways))
    with Reader(THREADS) as reader:
        for turn in tqdm(range(rounds + 1), desc="reading", unit="round", dynamic_ncols=True):
            ids = np.sort(rng.choice(neurons, needed, replace=False))
            layer = int(rng.integers(layers))
            for i in range(len(ways)):
                way = ways[(i + turn) % len(ways)]
                began = time.perf_counter()
                blocks = np.unique(ids // way.count).astype(np.int64)
                offsets = layer * layer_bytes[id(way)] + blocks * way.block_bytes
                addresses = pool.address + np.arange(len(blocks), dtype=np.int64) * (way.used_bytes or way.block_bytes)
                report = reader.wait(reader.submit(file, offsets, addresses, way.used_bytes or way.block_bytes))
                seconds = time.perf_counter() - began
                if turn:  # the first round warms up
                    way.seconds.append(seconds)
                    way.bytes += report.bytes
                    way.reads += report.requests
