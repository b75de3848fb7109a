"""Measures latency per token at budgets from the smallest possible to the whole model.

A mixture of experts is read both past the page cache and through it.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.flash.system import available_memory_bytes
from mlx_flash.loading.plan import MIN_SLOTS

from . import compare
from .baselines.contenders import Contender
from .bench_model import BenchModel
from .compare import Kind
from .tools import figures
from .tools.figures import Column, mb, ms, two_digits
from .tools.report import COLOURS, SERIES, describe, finish, refuse_to_swap, require_plots

REFUSED: dict[Kind, tuple[str, ...]] = {"experts": ("matrices",)}
FLASH = "flash loading"
ALL = {"neurons": "dense, all in memory", "experts": "mlx-lm, all in memory"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    compare.add_arguments(parser, tokens=48)
    parser.add_argument(
        "--points", type=whole_number(2, 100), default=6, help="budgets to measure at (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    kind, mixture = compare.find_model(arguments, REFUSED)
    with compare.opened(arguments, mixture, matrices=False) as model:
        points = budgets(model, arguments.points, arguments.force)
        refuse_to_swap(points[-1], "the largest budget", arguments.force)
        left_out = {model.whole: problem} if (problem := model.whole_problem()) else {}
        left_out = left_out or compare.those_left_out(model, [model.whole], False, arguments.force)
        result: dict[str, Any] = {**model.describe(), "smallest_bytes": points[0], "left_out": left_out, "points": []}
        result |= model.prepare_disk()
        if not left_out:  # runs first, because its files may not fit on the disk
            with model.ready_for_baselines(arguments.matrices) as ready:
                result["all_in_memory"] = row_of(ready.run(Contender(model.whole), arguments.tokens, None, ALL[kind]))
        for budget in points:
            for way, contender in ways(model, budget).items():
                run = model.run(contender, arguments.tokens, budget, f"{way}, {budget / 1e6:,.0f} MB")
                result["points"].append(row_of(run) | {"way": way, "budget_bytes": budget})
        result["cached_share_after"] = model.cached_shares()
    result["disk"] = [point["disk"] for point in result["points"]]
    if kind == "neurons":
        result["dense"] = f"left out: {left_out['dense']}" if left_out else "measured"
    name = f"memory{compare.SUFFIXES[kind]}"
    finish(arguments.output, name, result, lambda figure: draw(figure, result), (8, 4.8), lambda: show(result))


def row_of(run: dict[str, Any]) -> dict[str, Any]:
    row = figures.row_of([run])
    return row | {"tokens_per_second": None if row["killed"] else 1 / row["total_s"]}


# -- by kind of model ----------------------------------------------------------------------------------------


def budgets(model: BenchModel, points: int, force: bool) -> list[int]:
    """Budgets from the smallest to one with a slot for every unit. The slots grow by equal factors.

    For a mixture of experts: one slot in each layer, then from a token's experts to as many as fit in memory. There
    may be fewer than `points`.
    """
    layers, units = model.about["layers"], model.about["units"]
    if model.kind == "neurons":
        slots = geometric(layers * min(MIN_SLOTS, units), layers * units, points)
    else:
        fits = 2**62 if force else available_memory_bytes()
        counts = [count for count in range(1, units + 1) if model.budget_for(layers * count) <= fits]
        slots = [layers * count for count in slot_counts(model.about["choices"], counts[-1] if counts else 1, points)]
    return [model.budget_for(count) for count in slots]


def slot_counts(choices: int, most: int, points: int) -> list[int]:
    """Slots per layer: one, then from a token's experts to `most` by equal factors. May be fewer than `points`."""
    return sorted({1, *geometric(min(choices, most), most, points - 1)})


def geometric(first: int, last: int, points: int) -> list[int]:
    """Up to `points` whole numbers by equal factors; `last` is always one of them."""
    return [int(count) for count in np.unique(np.geomspace(last, first, points).round().astype(np.int64))]


def ways(model: BenchModel, budget: int) -> dict[str, Contender]:
    """Ways to use a budget. In "page cache" only a token's experts have slots; the rest is left for the page cache."""
    if model.kind == "neurons":
        return {FLASH: Contender("flash", budget)}
    found = {io: Contender("flash", budget, options={"io": io}) for io in ("direct", "buffered")}
    bare = model.budget_for(model.about["layers"] * model.about["choices"])
    if not model.fence and budget > bare:  # without a fence nothing bounds the page cache
        found["page cache"] = Contender("flash", bare, options={"io": "buffered"})
    return found


# -- showing -------------------------------------------------------------------------------------------------

NEURON_COLUMNS: list[Column] = [figures.PEAK, figures.SLOTS, figures.HITS, ("MB/token", "bytes", mb), figures.CEILING]
NEURON_COLUMNS += [("read ms", "read_s", ms), ("wait ms", "wait_s", ms), ("mean ms", "total_s", ms), figures.MEDIAN]
NEURON_COLUMNS += [figures.P90, figures.STEADY, ("tokens/s", "tokens_per_second", two_digits)]
NEURON_NOTE = (
    "mean ms and tokens/s include the first tokens; steady: median of the second half.\n"
    "in sequence: sequential GB/s of the disk just before."
)


def show(result: dict[str, Any]) -> None:
    kind, rows = result["streams"], list(result["points"])
    figures.show_head(result)
    names = [f"{mb(row['budget_bytes'])} MB" if kind == "neurons" else row["way"] for row in rows]
    if "all_in_memory" in result:
        rows.append(result["all_in_memory"])
        names.append(ALL[kind])
    if kind == "neurons":
        figures.columns_table("budget", NEURON_COLUMNS, rows, names)
        print(NEURON_NOTE)
    else:
        figures.columns_table("per token", figures.EXPERT_COLUMNS, rows, names)
        print(figures.EXPERT_NOTE)
        print(
            "direct, buffered: the whole budget goes to slots. page cache: buffered reads, slots only for a token's "
            f"{result['choices']} experts,\nand the rest of the budget is left for the page cache."
        )
    for reason in result["left_out"].values():
        print(f"{ALL[kind]}: left out: {reason}")
    print(describe(result["environment"]))


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Draws the median time of a token at every budget, and the range up to the 90th percentile for the first way."""
    axes = figure.subplots()
    done = [row for row in result["points"] if not row["killed"]]
    at = {budget: x for x, budget in enumerate(sorted({row["budget_bytes"] for row in done}))}  # equal factors in slots
    by_way = {way: [row for row in done if row["way"] == way] for way in dict.fromkeys(row["way"] for row in done)}
    small: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
    highest = 0.0
    for (way, rows), colour in zip(by_way.items(), SERIES, strict=False):
        x = [at[row["budget_bytes"]] for row in rows]
        median, p90 = ([row["total_spread_s"][key] * 1e3 for row in rows] for key in ("median", "p90"))
        axes.plot(x, median, "o-", color=colour, lw=2, label=way)
        highest = max(highest, *p90)
        if rows is done or way == done[0]["way"]:
            axes.fill_between(x, median, p90, color=colour, alpha=0.15, lw=0)
            for place, value in zip(x, median, strict=True):
                axes.annotate(f"{value:.0f} ms", (place, value), xytext=(5, 6), fontweight="bold", **small)
            axes.set_xticks(x, [tick(row) for row in rows])
    lowest = min(row["total_spread_s"]["median"] for row in done) * 1e3
    if "all_in_memory" in result:
        value = result["all_in_memory"]["total_spread_s"]["median"] * 1e3
        name = f"{ALL[result['streams']]}: {value:.0f} ms"
        axes.axhline(value, color=COLOURS["ceiling"], lw=1, ls=":", label=name)
        lowest, highest = min(lowest, value), max(highest, value)
    if highest > 8 * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(0.6 * lowest, 2.5 * highest)
    else:
        axes.set_ylim(0, 1.15 * highest)
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(at) - 0.5)
    axes.set_xlabel("memory budget of the whole process, share of the units that have a slot, bytes read per token")
    axes.set_ylabel("ms per token")
    axes.legend(fontsize=8)
    shaded = f"median, {done[0]['way']} shaded up to the 90th percentile"
    figures.title(figure, finding(result), f"{result['model']}; {shaded}")


def tick(row: dict[str, Any]) -> str:
    share = row["slot_share"]
    hits = "" if row["hit_rate"] is None else f", {row['hit_rate']:.0%} hits"
    slots = f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
    return f"{row['budget_bytes'] / 1e9:.2f} GB\n{slots} in slots\n{mb(row['bytes'])} MB{hits}"


def finding(result: dict[str, Any]) -> str:
    """The plot's title."""
    done = [row for row in result["points"] if not row["killed"]]
    same = [row for row in done if row["way"] == done[0]["way"]]
    least, most = same[0], same[-1]
    slow, fast = (row["total_spread_s"]["median"] for row in (least, most))
    share = least["budget_bytes"] / most["budget_bytes"]
    found = f"In {share:.0%} of the memory a token takes {slow / fast:.1f} times as long"
    best = min(done, key=lambda row: row["total_spread_s"]["median"])
    return found + (f": {ms(slow)} ms instead of {ms(fast)} ms" if same == done else f"; {best['way']} is quickest")
