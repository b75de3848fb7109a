"""The price list of memory for a mixture of experts: budgets, read past the page cache and through it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mlx_flash.flash.system import available_memory_bytes

from . import compare, mixture_model
from .baselines.mixture_contenders import Side
from .compare import ms
from .tools import disk
from .tools.report import COLOURS, SERIES, describe, finish

OUTPUT = "memory-mixture"


@dataclass(frozen=True)
class Way:
    """How a budget is used. slots: True: all of it is slots; False: a token's experts have slots, and the operating
    system may keep pages of the checkpoint in the rest."""

    io: str
    slots: bool = True


WAYS = {
    "direct": Way("direct"),
    "buffered": Way("buffered"),
    "page cache": Way("buffered", slots=False),
}


def main(arguments: argparse.Namespace, folder: Path) -> None:
    subject = mixture_model.opened(arguments, folder)
    about = subject.about
    fits = 2**62 if arguments.force else available_memory_bytes()
    counts = [count for count in range(1, about["experts"] + 1) if subject.budget_for(count) <= fits]
    most = counts[-1] if counts else 1  # which the first run refuses in its own words
    with_resident = arguments.force or about["weights_bytes"] <= available_memory_bytes()
    result: dict[str, Any] = {**subject.describe(), "disk_first": disk.prepare(subject.files), "points": []}
    if with_resident:
        result["all_in_memory"] = subject.run(Side("resident"), arguments.tokens, None, mixture_model.NAMES["resident"])
    bare = subject.budget_for(about["choices"])
    for slots in slot_counts(about["choices"], most, arguments.points):
        budget = subject.budget(f"{subject.budget_for(slots)}B", arguments.force)
        for name, way in WAYS.items():
            if not way.slots and (subject.fence or budget <= bare):  # nothing would bound the page cache, or no room
                continue
            side = Side("flash", budget if way.slots else bare, way.io)
            label = f"{name}, {budget / 1e6:,.0f} MB"
            row = subject.run(side, arguments.tokens, budget, label)
            result["points"].append({"way": name, "budget_bytes": budget} | row)
    finish(
        arguments.output,
        OUTPUT,
        result,
        lambda figure: draw(figure, result),
        size=(8, 6),
        show=lambda: show(result),
    )


def slot_counts(choices: int, most: int, points: int) -> list[int]:
    """Slots of a layer: one, then from a token's experts to `most` by equal factors; fewer where there are few."""
    between = np.geomspace(most, min(choices, most), points - 1).round().astype(np.int64)
    return [int(count) for count in np.unique([1, *between])]


# -- showing -------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    mixture_model.show_head(result)
    rows, names = list(result["points"]), [row["way"] for row in result["points"]]
    if "all_in_memory" in result:
        rows.append(result["all_in_memory"])
        names.append(mixture_model.NAMES["resident"])
    mixture_model.table(rows, names)
    print(f"direct, buffered: all of the budget is slots; page cache: read through it, a token's {result['choices']} "
          "experts have slots,\nand the rest of the budget is the operating system's.")  # fmt: skip
    print(describe(result["environment"]))


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Above: median time of a token at every budget. Below: which share of the experts was in a slot already."""
    times, hits = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for name, colour in zip(WAYS, SERIES, strict=False):
        rows = [row for row in result["points"] if row["way"] == name and not row["killed"]]
        at = [row["budget_bytes"] / 1e9 for row in rows]
        times.plot(at, [row["total_spread_s"]["median"] * 1e3 for row in rows], "o-", color=colour, label=name)
        hits.plot(at, [100 * (row["hit_rate"] or 0) for row in rows], "o-", color=colour)
    if "all_in_memory" in result:
        value = result["all_in_memory"]["total_spread_s"]["median"] * 1e3
        name = f"{mixture_model.NAMES['resident']}: {value:.0f} ms"
        times.axhline(value, color=COLOURS["ceiling"], lw=1, ls=":", label=name)
    times.set_ylabel("ms per token (median)")
    times.set_ylim(0)
    times.legend(fontsize=8)
    hits.set_ylabel("hits in slots, %")
    hits.set_ylim(0, 105)
    hits.set_xlabel("memory budget of the whole process, GB")
    compare.title(figure, finding(result), result["model"])


def finding(result: dict[str, Any]) -> str:
    """The plot's title."""
    done = [row for row in result["points"] if not row["killed"]]
    best = min(done, key=lambda row: row["total_spread_s"]["median"])
    return (
        f"A token is quickest with {best['budget_bytes'] / 1e9:.2f} GB, {best['way']}: "
        f"{ms(best['total_spread_s']['median'])} ms"
    )
