"""Measures the time to the first token by length of the prompt, beside a lower bound.

Flash loading runs in a budget that holds a part of the model. The bound is the longer of two times: reading the
streamed bytes once at the disk's sequential rate, and computing the same prompt with the whole model in memory.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from statistics import median
from typing import Any

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import PREFILL_TOKENS
from mlx_flash.errors import UsageError

from . import compare
from .baselines.contenders import Contender
from .bench_model import BenchModel
from .tools import disk, figures
from .tools.report import COLOURS, finish, require_plots


def add_arguments(parser: argparse.ArgumentParser) -> None:
    compare.add_model_arguments(parser)
    compare.add_share_argument(parser)
    parser.add_argument(
        "--lengths", default="32,512", help="comma-separated list of prompt lengths in tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=whole_number(1, 20), default=3, help="rounds to take the median of (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    try:
        lengths = [int(length) for length in arguments.lengths.split(",")]
    except ValueError:
        raise UsageError(f"--lengths is {arguments.lengths!r}, expected numbers separated by commas.") from None
    if not all(9 <= length <= PREFILL_TOKENS for length in lengths):
        raise UsageError(f"--lengths: expected 9 to {PREFILL_TOKENS} tokens, the size of one prompt chunk.")
    arguments.prompt, arguments.tokens = max(lengths), 1
    with compare.opened(arguments) as model:
        result: dict[str, Any] = {**model.describe(), **model.budget(arguments)}
        result |= model.prepare_disk()
        result["rows"] = [measure(model, length, result["budget_bytes"], arguments.rounds) for length in lengths]
    finish(arguments.output, "prompts", result, lambda figure: draw(figure, result), show=lambda: show(result))


KEYS = {"first token s": "first_token_s", "prompt s": "prompt_s", "waited s": "wait_s", "disk busy s": "read_s"}
KEYS |= {"read once s": "read_once_s", "compute alone s": "compute_s", "x bound": "ratio"}


def show(result: dict[str, Any]) -> None:
    rows = result["rows"]
    print(f"\n{result['model']}, {result['share']:.0%} of the weights' bytes in memory")
    columns = [(heading, key, figures.two_digits) for heading, key in KEYS.items()]
    figures.columns_table("prompt", columns, rows, [str(row["length"]) for row in rows])
    print("x bound: prompt s / max(read once, compute alone)")


def measure(model: BenchModel, length: int, budget: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds in which reading, flash loading and the dense model take turns."""
    prompted = replace(model, prompt=length)
    samples: list[dict[str, float]] = []
    for turn in range(rounds):
        rate = disk.sequential_rate(model.streamed[-1:], disk.RATE_BYTES)
        label = f"{length} tokens, round {turn + 1} of {rounds}"
        flash = prompted.run(Contender("flash", budget), 1, budget, f"flash, {label}")
        dense = prompted.run(Contender("dense"), 1, None, f"all in memory, {label}")
        samples.append(
            {
                "prompt_s": flash["prompt"]["total_s"],
                "first_token_s": flash["prompt"]["total_s"] + flash["samples"][0]["total_s"],
                "wait_s": flash["prompt"]["wait_s"],
                "read_s": flash["prompt"]["read_s"],
                "read_once_s": model.about["streamed_bytes"] * rate["seconds"] / rate["bytes"],
                "compute_s": dense["prompt"]["total_s"],
            }
        )
    medians = {key: median(sample[key] for sample in samples) for key in samples[0]}
    bound = max(medians["read_once_s"], medians["compute_s"])
    return {"length": length, **medians, "ratio": medians["prompt_s"] / bound, "samples": samples}


def draw(figure: Any, result: dict[str, Any]) -> None:
    axes = figure.add_subplot()
    rows = result["rows"]
    bars = (
        ("read_once_s", "reading once", "reading"),
        ("compute_s", "compute alone", "compute"),
        ("prompt_s", "flash loading", "good"),
    )
    for i, row in enumerate(rows):
        for j, (key, name, colour) in enumerate(bars):
            place = i + (j - 1) * 0.26
            axes.barh(place, row[key], height=0.24, color=COLOURS[colour], label=name if i == 0 else None)
            note = f" {row[key]:.2f} s" + (f", {row['ratio']:.2f}x the bound" if key == "prompt_s" else "")
            axes.text(row[key], place, note, va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{row['length']} tokens" for row in rows])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * max(max(row[key] for key, _, _ in bars) for row in rows))
    axes.set_xlabel("seconds")
    axes.legend(loc="upper right", fontsize=8)
    figures.title(figure, "Reading a prompt, beside its two bounds", result["model"])
