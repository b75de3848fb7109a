"""What would several Macs cost and bring, by the link between them? Computed, from published figures; nothing is run.

For Qwen3-30B-A3B in 4 bits, with memory for a quarter of the experts on each machine, and every expert chosen equally
often. The formulas are those of tools/rank_costs.py. What rank 0 does alone takes as long as on one machine, and is
left out.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from .synthetic.mixture_checkpoint import SHAPES
from .tools import figures
from .tools.rank_costs import Link, exchange_seconds, largest_share, ring_seconds

LINKS = {
    # Round trips of 0.34 to 0.70 ms and 52 Gbit/s between two Macs: github.com/exo-explore/exo, pull request 2063.
    "Thunderbolt 5, TCP": Link(0.29e-3, 0.29e-3, 6.6e9),
    # 5 to 9 microseconds are reported for a message (techboards.net, thread 5374), and 3.5 GB/s (github.com/
    # ml-explore/mlx, issue 3207). The control connection is TCP all the same.
    "Thunderbolt 5, JACCL": Link(0.009e-3, 0.29e-3, 3.5e9),
    # An assumption: round trips of 0.2 ms. The rate is that of the wire.
    "10 GbE, TCP": Link(0.1e-3, 0.1e-3, 1.18e9),
}
OWN, RING = "own connections", "MLX's ring"
WAYS = {OWN: exchange_seconds, RING: ring_seconds}
ROWS = [
    ("Thunderbolt 5, TCP", OWN), ("Thunderbolt 5, TCP", RING), ("Thunderbolt 5, JACCL", RING),
    ("10 GbE, TCP", OWN), ("10 GbE, TCP", RING),
]  # fmt: skip
SHARE = 0.25  # of the experts, on each machine
HALF = 2  # bytes of a number of x and y
CHUNK = 512  # tokens of a prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--disk", type=float, default=3.0, metavar="GB", help="per second, of each machine (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    rows = [row_of(name, LINKS[name], way, ranks, arguments.disk * 1e9) for name, way in ROWS for ranks in (2, 4)]
    alone = row_of("one machine", Link(0, 0, 1), OWN, 1, arguments.disk * 1e9)
    head = ["link", "over", "ranks", "layer ms", "token: messages ms", "reading ms", "both ms", "prompt chunk s"]
    cells = [
        [
            row["link"], row["over"], str(row["ranks"]), f"{row['layer_ms']:.2f}", f"{row['messages_ms']:.1f}",
            f"{row['reading_ms']:.0f}", f"{row['messages_ms'] + row['reading_ms']:.0f}", f"{row['chunk_s']:.2f}",
        ]
        for row in [alone, *rows]
    ]  # fmt: skip
    print("computed, not measured")
    figures.table(head, cells)
    print(json.dumps({"command": "links", "disk_bytes_per_second": arguments.disk * 1e9, "rows": [alone, *rows]}))


def row_of(name: str, link: Link, way: str, ranks: int, disk: float) -> dict[str, Any]:
    """way: of WAYS. disk: bytes per second."""
    shape = SHAPES["qwen3-30b-a3b"]
    expert = 3 * shape.hidden * shape.neurons * (4 + 2 * 16 / 64) / 8  # 4 bits, and a scale and a bias for 64 numbers
    x_bytes = HALF * shape.hidden
    y_bytes = x_bytes * shape.choices / ranks
    if way == RING:  # A gather pads to the rank that has most.
        y_bytes = x_bytes * largest_share(shape.experts, shape.choices, ranks)
    layer = WAYS[way](link, ranks, x_bytes, y_bytes)
    missing = shape.choices * max(0.0, 1 - ranks * SHARE)
    read = expert / disk * largest_share(shape.experts, missing, ranks)
    pairs = CHUNK * shape.choices / ranks  # about even, because there are many
    return {
        "link": name,
        "over": way,
        "ranks": ranks,
        "layer_ms": 1e3 * layer,
        "messages_ms": 1e3 * layer * shape.layers,
        "reading_ms": 1e3 * read * shape.layers,
        "chunk_s": shape.layers * WAYS[way](link, ranks, CHUNK * x_bytes, pairs * x_bytes),
    }
