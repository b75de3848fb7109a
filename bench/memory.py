"""The price list of memory: latency per token at budgets from the smallest that does to the whole model."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.flash.system import available_memory_bytes
from mlx_flash.loading.plan import MIN_SLOTS

from . import compare, mixture_memory, mixture_model
from .baselines.contenders import Side
from .compare import mb, ms
from .tools import disk
from .tools.report import COLOURS, describe, finish, refuse_to_swap, require_plots


def add_arguments(parser: argparse.ArgumentParser) -> None:
    compare.add_arguments(parser, tokens=48)
    parser.add_argument(
        "--points", type=whole_number(2, 100), default=6, help="budgets to measure at (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    if folder := mixture_model.folder_of(arguments.model):
        compare.refuse(arguments, ("matrices",), mixture_model.KIND)
        mixture_memory.main(arguments, folder)
        return
    span = arguments.prompt + arguments.tokens
    with compare.opened(arguments, span, span, matrices=False) as subject:
        points = budgets(subject.least, subject.manifest.layout.layers, arguments.points)
        refuse_to_swap(points[-1], "the whole model", arguments.force)
        everything = subject.weights_bytes + subject.base_bytes
        problem = compare.dense_problem(subject.manifest)
        with_dense = not problem and (arguments.force or everything <= available_memory_bytes())
        first = disk.prepare(subject.files)
        rates = [disk.sequential_rate([subject.streamed[0]], disk.RATE_BYTES)]
        result: dict[str, Any] = {
            **subject.describe(),
            "disk_first": first,
            "smallest_bytes": points[0],
            "dense": "measured" if with_dense else f"left out: {problem or f'needs {everything / 1e9:.1f} GB'}",
        }
        if with_dense:  # first: it needs room on the disk, which may be lacking
            with compare.with_matrices(subject, arguments.matrices) as full:
                result["all_in_memory"] = row_of(full.run(Side("dense"), arguments.tokens, None))
        result["points"] = []
        for number, budget in enumerate(points):
            label = f"{budget / 1e6:,.0f} MB, {number + 1} of {len(points)}"
            run = subject.run(Side("flash", budget), arguments.tokens, budget, label=label)
            result["points"].append(row_of(run) | {"budget_bytes": budget, "slot_share": run["slot_share"]})
        rates.append(disk.sequential_rate([subject.streamed[0]], disk.RATE_BYTES))
        result["disk"] = rates
        result["cached_share_after"] = compare.cached_shares(subject)
    finish(
        arguments.output,
        "memory",
        result,
        lambda figure: draw(figure, result),
        size=(8, 4.8),
        show=lambda: show(result),
    )


def budgets(least: dict[str, Any], layers: int, points: int) -> list[int]:
    """From the smallest to where every block has a slot, by equal factors in slots; fewer where slots are few."""
    fewest = layers * min(MIN_SLOTS, least["blocks"] // layers)
    slots = np.unique(np.geomspace(fewest, least["blocks"], points).round().astype(np.int64)).tolist()
    return [least["smallest_bytes"] + (count - fewest) * least["slot_bytes"] for count in slots]


def row_of(run: dict[str, Any]) -> dict[str, Any]:
    row = compare.figures(run["samples"])
    row |= {key: run.get(key) for key in ("peak_memory_bytes", "weights_bytes", "kills", "prompt_s")}
    return row | {"steady_s": compare.steady([run["samples"]]), "tokens_per_second": 1 / row["total_s"]}


# -- showing -------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['model']}: {result['weights_bytes'] / 1e9:.3f} GB of weights; memory {result['memory_limit']}")
    print(f"disk: {result['disk_first']['state']}")
    print(f"ceiling, before and after: {disk.rates(result['disk_first'], result['disk'])}\n")
    head = ["budget", "peak MB", "slots", "hits", "MB/token", "read ms", "wait ms", "mean ms", "median", "p90"]
    head += ["steady", "tokens/s"]
    lines = []
    for row in [*result["points"], *([result["all_in_memory"]] if "all_in_memory" in result else [])]:
        dense = "budget_bytes" not in row
        share = "-" if dense else f"{row['slot_share']:.0%}"
        hits = "-" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}"
        cells = ["dense, all in memory" if dense else f"{mb(row['budget_bytes'])} MB", mb(row["peak_memory_bytes"])]
        cells += [share, hits, mb(row["bytes"]), ms(row["read_s"]), ms(row["wait_s"]), ms(row["total_s"])]
        cells += [ms(row["total_spread_s"]["median"]), ms(row["total_spread_s"]["p90"]), ms(row["steady_s"])]
        lines.append([*cells, f"{row['tokens_per_second']:.2f}"])
    compare.table(head, lines)
    print("mean ms and tokens/s count the first tokens; steady: median of the second half.")
    if "all_in_memory" not in result:
        print(f"dense, all in memory: {result['dense']}")
    print(describe(result["environment"]))


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Median and 90th percentile of a token's time at every budget; the dense model as a line."""
    points, dense = result["points"], result.get("all_in_memory")
    at = list(range(len(points)))  # equal factors in slots
    median, p90 = ([row["total_spread_s"][key] * 1e3 for row in points] for key in ("median", "p90"))
    compare.title(
        figure, finding(result), f"{result['model']}; median of flash loading, shaded up to the 90th percentile"
    )
    axes = figure.subplots()
    axes.fill_between(at, median, p90, color=COLOURS["ours"], alpha=0.15, lw=0)
    axes.plot(at, median, "o-", color=COLOURS["ours"], lw=2)
    small: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
    for x, value in zip(at, median, strict=True):
        axes.annotate(f"{value:.0f} ms", (x, value), xytext=(5, 6), fontweight="bold", **small | {"fontsize": 9})
    lines = {f"floor, all in slots: {median[-1]:.0f} ms": (median[-1], COLOURS["ours"])}
    if dense is not None:
        value = dense["total_spread_s"]["median"] * 1e3
        lines[f"dense, all in memory: {value:.0f} ms"] = (value, COLOURS["ceiling"])
    ordered = sorted(lines.items(), key=lambda item: item[1][0])
    for rank, (name, (value, colour)) in enumerate(ordered):  # the lower one is named below, the upper one above
        below = rank == 0 and len(ordered) > 1
        axes.axhline(value, color=colour, lw=1, ls=":")
        axes.annotate(name, (-0.55, value), xytext=(2, -11 if below else 3), color=colour, **small)
    highest, lowest = max(p90), min(value for value, _ in lines.values())
    if highest > 8 * lowest:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.set_ylim(0.6 * lowest, 2.5 * highest)
    else:
        axes.set_ylim(0, 1.15 * highest)
    axes.set_xticks(at, [tick(row) for row in points])
    axes.tick_params(axis="x", length=0)
    axes.set_xlim(-0.6, len(points) - 0.5)
    axes.set_xlabel("memory budget of the whole process, share of the neurons that have a slot, bytes read per token")
    axes.set_ylabel("ms per token")


def tick(row: dict[str, Any]) -> str:
    share = row["slot_share"]
    hits = "" if row["hit_rate"] is None else f", {row['hit_rate']:.0%} hits"
    slots = f"{share:.0%}" if share >= 0.1 else f"{share:.1%}"
    return f"{row['budget_bytes'] / 1e9:.2f} GB\n{slots} in slots\n{mb(row['bytes'])} MB{hits}"


def finding(result: dict[str, Any]) -> str:
    """The plot's title."""
    least, most = result["points"][0], result["points"][-1]
    slow, fast = (row["total_spread_s"]["median"] for row in (least, most))
    return (
        f"In {least['budget_bytes'] / most['budget_bytes']:.0%} of the memory a token takes {slow / fast:.1f} times "
        f"as long: {ms(slow)} ms instead of {ms(fast)} ms"
    )
