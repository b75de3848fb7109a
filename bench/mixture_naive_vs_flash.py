"""A token of a mixture of experts: mlx-lm all in memory and lazily, every layer whole, and expert by expert."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mlx_flash.defaults import IO_MODES
from mlx_flash.errors import UsageError
from mlx_flash.flash.system import available_memory_bytes

from . import compare, mixture_model
from .baselines.mixture_contenders import Side
from .compare import times
from .mixture_model import NAMES
from .tools import disk
from .tools.report import describe, finish, refuse_to_swap

BASELINE_TOKENS = 4
OUTPUT = "naive-vs-flash-mixture"


def add_arguments(group: Any) -> None:
    group.add_argument("--sides", help=f"of {','.join(NAMES)}, by commas (default: all that fit in memory)")
    group.add_argument("--io", choices=IO_MODES, help=f"past the page cache or not (default: {IO_MODES[0]})")


def main(arguments: argparse.Namespace, folder: Path) -> None:
    wanted = arguments.sides.split(",") if arguments.sides else list(NAMES)
    if unknown := [side for side in wanted if side not in NAMES]:
        raise UsageError(f"--sides: {', '.join(unknown)} unknown, expected of {','.join(NAMES)}.")
    subject = mixture_model.opened(arguments, folder)
    budget = subject.budget(arguments.memory, arguments.force)
    names, left_out = those_that_fit(subject, wanted, bool(arguments.sides), arguments.force)
    result: dict[str, Any] = {
        **subject.describe(),
        "budget_bytes": budget,
        "left_out": left_out,
        "disk_first": disk.prepare(subject.files),
        "sides": {},
    }
    few = min(arguments.baseline_tokens or BASELINE_TOKENS, arguments.tokens)
    for name in names:
        side = Side(name, budget, arguments.io or IO_MODES[0]) if name == "flash" else Side(name)
        tokens = few if name in ("lazy", "naive") else arguments.tokens
        limit = {"resident": None, "naive": subject.limit_for_whole_layers(budget)}.get(name, budget)
        result["sides"][name] = subject.run(side, tokens, limit, NAMES[name])
    agree(result["sides"])
    finish(
        arguments.output, OUTPUT, result, lambda figure: draw(figure, result), size=(9, 4), show=lambda: show(result)
    )


def those_that_fit(
    subject: mixture_model.Subject, wanted: list[str], explicit: bool, force: bool
) -> tuple[list[str], dict[str, str]]:
    """The sides to run, and why others are not: nothing but a memory cgroup keeps mlx-lm from swapping.

    explicit: raises UsageError instead of leaving one out.
    """
    needed = subject.about["weights_bytes"]
    unbounded = [side for side in wanted if side == "resident" or (side == "lazy" and subject.fence)]
    if explicit:
        for side in unbounded:
            refuse_to_swap(needed, NAMES[side], force)
    if explicit or force or needed <= available_memory_bytes():
        return wanted, {}
    reason = f"needs {needed / 1e9:.1f} GB, and nothing else keeps the machine from swapping"
    return [side for side in wanted if side not in unbounded], dict.fromkeys(unbounded, reason)


def agree(rows: dict[str, Any]) -> None:
    """Adds to every row how often its likeliest token is the first side's."""
    done = {name: row for name, row in rows.items() if not row["killed"]}
    for row in done.values():
        first = next(iter(done.values()))
        pairs = list(zip(row["likeliest"], first["likeliest"], strict=False))
        row |= {"agreement": sum(a == b for a, b in pairs) / len(pairs), "agreement_tokens": len(pairs)}


# -- showing -------------------------------------------------------------------------------------------------


def labels(result: dict[str, Any]) -> list[str]:
    return [NAMES[name] for name in result["sides"]]


def show(result: dict[str, Any]) -> None:
    mixture_model.show_head(result)
    rows = result["sides"]
    mixture_model.table(list(rows.values()), labels(result))
    done = {name: row for name, row in rows.items() if not row["killed"]}
    if flash := done.get("flash"):
        ratios = [f"{NAMES[n]} {times(row['total_s'] / flash['total_s'])}" for n, row in done.items() if n != "flash"]
        print(f"times what a token takes with flash: {', '.join(ratios) or '-'}")
    if done:
        agreed = [f"{NAMES[n]} {row['agreement']:.1%} of {row['agreement_tokens']}" for n, row in done.items()]
        print(f"likeliest token as in {NAMES[next(iter(done))]}: {', '.join(agreed)}")
    for name, reason in result["left_out"].items():
        print(f"left out: {NAMES[name]}, which {reason}")
    print(describe(result["environment"]))


def draw(figure: Any, result: dict[str, Any]) -> None:
    share = result["budget_bytes"] / result["weights_bytes"]
    memory = f"{result['budget_bytes'] / 1e9:.2f} GB of memory, the weights being {1 / share:.1f} times that"
    compare.title(figure, finding(result), f"{result['model']}; {memory}")
    mixture_model.stack(figure.subplots(), list(result["sides"].values()), labels(result))


def finding(result: dict[str, Any]) -> str:
    """The plot's title."""
    done = {name: row["total_s"] for name, row in result["sides"].items() if not row["killed"]}
    found = []
    if "flash" in done and "naive" in done:
        found.append(f"comes {times(done['naive'] / done['flash'])} as fast as reading every layer whole")
    if "flash" in done and "resident" in done:
        found.append(f"takes {done['flash'] / done['resident']:.2f}x as long as all in memory")
    return f"A token {' and '.join(found)}" if found else "What a token's time is made of"
