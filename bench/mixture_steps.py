"""What each step brings on a mixture of experts, one after another, from every layer whole to the whole method."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from mlx_flash.defaults import THREADS

from . import compare, mixture_model
from .baselines.mixture_contenders import Side
from .compare import times
from .tools import disk
from .tools.report import describe, finish

OUTPUT = "steps-mixture"
LEAST_RECENT = 1_000_000  # calls: a window longer than any text here
BASELINE = "every layer whole"
FIRST = Side("flash", threads=1, window=LEAST_RECENT, keep=False, overlap=False, look_ahead="never")
# What each step changes in the side of the step before.
STEPS: dict[str, dict[str, Any]] = {
    "only the chosen experts, 1 thread": {},
    f"+ {THREADS} threads, experts in pieces": {"threads": THREADS},
    "+ slots, least-recent use": {"keep": True},
    "+ eviction by fading use": {"window": None},
    "+ products while others are read": {"overlap": True},
    "+ look-ahead, always": {"look_ahead": "always"},
}


def main(arguments: argparse.Namespace, folder: Path) -> None:
    subject = mixture_model.opened(arguments, folder)
    budget = subject.budget(arguments.memory, arguments.force)
    # Where nothing is kept, slots for one token do.
    bare = min(budget, subject.budget_for(subject.about["choices"]))
    result: dict[str, Any] = {
        **subject.describe(),
        "budget_bytes": budget,
        "disk_first": disk.prepare(subject.files),
    }
    few = min(arguments.baseline_tokens, arguments.tokens)
    limit = subject.limit_for_whole_layers(budget)
    result["steps"] = [{"step": BASELINE} | subject.run(Side("naive"), few, limit, BASELINE)]
    side = FIRST
    for step, change in STEPS.items():
        side = replace(side, **change)
        side = replace(side, memory=budget if side.keep else bare)
        result["steps"].append({"step": step} | subject.run(side, arguments.tokens, budget, step))
    finish(
        arguments.output, OUTPUT, result, lambda figure: draw(figure, result), size=(9, 4), show=lambda: show(result)
    )


def show(result: dict[str, Any]) -> None:
    mixture_model.show_head(result)
    mixture_model.table(result["steps"], labels(result))
    print(describe(result["environment"]))


def labels(result: dict[str, Any]) -> list[str]:
    return [row["step"] for row in result["steps"]]


def ratio(values: dict[str, float]) -> float | None:
    """The first by the last."""
    first, *_, last = values.values()
    return first / last if last else None


def draw(figure: Any, result: dict[str, Any]) -> None:
    done = [row for row in result["steps"] if not row["killed"]]
    read, total = ({row["step"]: row[key] for row in (done[0], done[-1])} for key in ("bytes", "total_s"))
    finding = f"A token comes {times(ratio(total))} as fast as in the first row, with {times(ratio(read))} fewer bytes"
    compare.title(figure, finding, f"{result['model']}; {result['budget_bytes'] / 1e9:.2f} GB of memory")
    mixture_model.stack(figure.subplots(), result["steps"], labels(result))
