"""A mixture of experts within memory budgets: mlx-lm, every layer streamed whole, and expert by expert.

Each side runs in a process of its own, in a memory cgroup of its budget; tokens are given, so all do the same work.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from statistics import mean
from typing import Any

from mlx_flash.commands import whole_number
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.mixture import open_mixture
from mlx_flash.plan import parse_memory

from . import compare, disk
from .cgroup import memory_group
from .report import (
    COLOURS,
    add_output_argument,
    cached_share,
    environment,
    finish,
    refuse_to_swap,
    require_plots,
    spread,
)

NAMES = {"resident": "mlx-lm, all in memory", "lazy": "mlx-lm, lazily", "naive": "every layer whole", "flash": "flash"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, type=Path, help="folder of a mixture-of-experts checkpoint")
    parser.add_argument("--memory", default="4GB", metavar="SIZES", help="budgets, by commas (default: %(default)s)")
    parser.add_argument("--prompt", type=whole_number(1), default=32, help="tokens (default: %(default)s)")
    parser.add_argument("--tokens", type=whole_number(2), default=64, help="decoded one by one (default: %(default)s)")
    parser.add_argument(
        "--baseline-tokens", type=whole_number(1), default=4, help="of the slow baseline (default: %(default)s)"
    )
    parser.add_argument(
        "--sides", default="naive,flash", help=f"of {', '.join(NAMES)}, by commas (default: %(default)s)"
    )
    parser.add_argument("--io", choices=("direct", "buffered"), default="direct", help="default: %(default)s")
    parser.add_argument("--text", type=Path, help="plain text to feed (default: the packaged calibration text)")
    parser.add_argument("--no-cgroup", action="store_true", help="do not enforce the budgets by a memory cgroup")
    parser.add_argument("--force", action="store_true", help="go on where the machine would swap")
    add_output_argument(parser)


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    sides = arguments.sides.split(",")
    if unknown := [side for side in sides if side not in NAMES]:
        raise UsageError(f"--sides: {', '.join(unknown)} unknown, expected of {', '.join(NAMES)}.")
    budgets = [parse_memory(text) for text in arguments.memory.split(",")]
    mixture = open_mixture(arguments.model)
    experts_bytes = len(mixture.switches) * mixture.experts * mixture.expert_bytes
    weights_bytes = experts_bytes + sum(array.nbytes for _, array in mixture.resident())
    vocabulary = int(mixture.config["vocab_size"])
    ids = compare.read_ids(arguments.text, arguments.model, arguments.prompt + arguments.tokens, vocabulary)
    if "resident" in sides:
        refuse_to_swap(weights_bytes, NAMES["resident"], arguments.force)
    files = mixture.files
    result: dict[str, Any] = {
        "environment": environment(arguments.model),
        "model": label(arguments.model, mixture.config),
        "weights_bytes": weights_bytes,
        "experts_bytes": experts_bytes,
        "expert_bytes": mixture.expert_bytes,
        "layers": len(mixture.switches),
        "prompt": arguments.prompt,
        "disk_first": disk.prepare(files),
        "rows": [],
    }
    del mixture
    for side in sides:
        for budget in budgets if side in ("flash", "lazy") else [None]:
            rate = disk.sequential_rate(files[:1], disk.RATE_BYTES)
            count = arguments.tokens if side in ("flash", "resident") else arguments.baseline_tokens
            task = {
                "side": side,
                "model": str(arguments.model),
                "memory": budget,
                "io": arguments.io,
                "ids": ids[: arguments.prompt + count],
                "prompt": arguments.prompt,
            }
            row = run(task, None if arguments.no_cgroup else budget)
            row |= {"side": side, "budget": budget, "sequential_gb_s": rate["bytes"] / rate["seconds"] / 1e9}
            result["rows"].append(row)
    result["cached"] = {file.name: cached_share(file) for file in files}
    show(result)
    finish(arguments.output, "mixture", result, lambda figure: draw(figure, result))


def label(folder: Path, config: dict[str, Any]) -> str:
    name = folder.resolve().name
    return f"{name} (synthetic weights and routing)" if "synthetic" in config else name


def run(task: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """One side's figures; {"killed": True} if the kernel stopped it for memory."""
    command = [sys.executable, "-m", "mlx_flash.bench.mixture_side", json.dumps(task)]
    with nullcontext() if limit is None else memory_group(limit) as group:
        if group is None:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        else:
            done = group.run(command, dict(os.environ))
            if group.kills():
                return {"killed": True}
    if done.returncode:
        raise FlashError(f"the side {task['side']} failed (see above).")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    samples = row["samples"]
    row["killed"] = False
    row["mean"] = {key: mean(sample[key] for sample in samples) for key in samples[0]}
    row["spread_s"] = spread(sample["total_s"] for sample in samples)
    return row


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['model']}: {result['weights_bytes'] / 1e9:.2f} GB, {result['layers']} layers of experts, "
          f"{result['expert_bytes'] / 1e6:.2f} MB each")  # fmt: skip
    print(f"disk: {result['disk_first']['state']}")
    head = [
        *("side", "budget MB", "peak MB", "slots", "hits", "MB", "reads", "GB/s", "sequential", "read", "wait"),
        *("manage", "compute", "mean ms", "median", "p90", "prompt s", "load s"),
    ]
    rows = []
    for row in result["rows"]:
        budget = "-" if row["budget"] is None else f"{row['budget'] / 1e6:,.0f}"
        if row["killed"]:
            rows.append([NAMES[row["side"]], budget, "killed for memory", *[""] * (len(head) - 3)])
            continue
        m, spread_s = row["mean"], row["spread_s"]
        needed = m["hits"] + m["misses"]
        rows.append([
            NAMES[row["side"]], budget, f"{row['peak_bytes'] / 1e6:,.0f}",
            f"{row['plan']['slots_per_layer']} of {row['plan']['experts']}" if row["plan"] else "-",
            f"{m['hits'] / needed:.1%}" if needed else "-",
            f"{m['bytes'] / 1e6:,.0f}", f"{m['reads']:,.0f}",
            f"{m['bytes'] / m['read_s'] / 1e9:.2f}" if m["read_s"] else "-", f"{row['sequential_gb_s']:.2f}",
            *(f"{1e3 * m[key]:.1f}" for key in ("read_s", "wait_s", "manage_s")),
            f"{1e3 * compute(m):.0f}", f"{1e3 * m['total_s']:.0f}",
            *(f"{1e3 * spread_s[key]:.0f}" for key in ("median", "p90")),
            f"{row['prompt']['total_s']:.2f}", f"{row['load_s']:.1f}",
        ])  # fmt: skip
    compare.table(head, rows)
    done = [row for row in result["rows"] if not row["killed"]]
    for row in done[1:]:
        pairs = list(zip(row["likeliest"], done[0]["likeliest"], strict=False))
        same = sum(a == b for a, b in pairs)
        print(f"likeliest token as in {NAMES[done[0]['side']]}: {NAMES[row['side']]} {same} of {len(pairs)}")


def compute(m: dict[str, float]) -> float:
    return max(0.0, m["total_s"] - m["wait_s"] - m["manage_s"])


def draw(figure: Any, result: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    rows = [row for row in result["rows"] if not row["killed"]]
    parts = (("wait_s", "waiting for reads", "reading"), ("manage_s", "management", "management"))
    for i, row in enumerate(rows):
        m, left = row["mean"], 0.0
        for key, name, colour in parts:
            axes.barh(i, 1e3 * m[key], left=left, color=COLOURS[colour], label=name if i == 0 else None)
            left += 1e3 * m[key]
        axes.barh(i, 1e3 * compute(m), left=left, color=COLOURS["compute"], label="compute" if i == 0 else None)
        note = f" {1e3 * m['total_s']:.0f} ms, {m['bytes'] / 1e6:,.0f} MB"
        axes.text(1e3 * m["total_s"], i, note, va="center", fontsize=8)
    names = [NAMES[r["side"]] + ("" if r["budget"] is None else f", {r['budget'] / 1e9:.1f} GB") for r in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * max(1e3 * row["mean"]["total_s"] for row in rows))
    axes.set_xlabel("ms per token")
    axes.legend(loc="lower right", fontsize=8)
    compare.title(figure, "A token of a mixture of experts", result["model"])
