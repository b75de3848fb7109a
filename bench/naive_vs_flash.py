"""Latency per token of naive, hybrid and flash loading: reading, management, compute, under one memory limit."""

from __future__ import annotations

import argparse
from typing import Any

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.flash.system import available_memory_bytes

from . import compare, mixture_model, mixture_naive_vs_flash
from .baselines.contenders import HALF, Side
from .compare import mb, ms, times
from .tools import disk
from .tools.report import COLOURS, describe, finish, refuse_to_swap, require_plots

NAMES = {
    "naive": "naive: all from flash",
    "hybrid": "hybrid: half resident",
    "flash": "flash loading",
    "dense": "all in memory",
}
BASELINES = ("naive", "hybrid")
ROUNDS = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    compare.add_arguments(parser, tokens=128)
    compare.add_share_argument(parser)
    parser.add_argument(
        "--baseline-tokens",
        type=whole_number(1),
        help="tokens of the sides which are slow: naive and hybrid (default: --tokens), of a mixture of experts naive "
        f"and lazy (default: {mixture_naive_vs_flash.BASELINE_TOKENS})",
    )
    parser.add_argument(
        "--rounds",
        type=whole_number(1, 100),
        help=f"the tokens are split over so many rounds, in which the sides take turns (default: {ROUNDS})",
    )
    group = mixture_model.add_arguments(parser)
    mixture_naive_vs_flash.add_arguments(group)


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    if folder := mixture_model.folder_of(arguments.model):
        compare.refuse(arguments, ("share", "matrices", "rounds"), mixture_model.KIND)
        mixture_naive_vs_flash.main(arguments, folder)
        return
    compare.refuse(arguments, ("memory", "sides", "io"), compare.KIND)
    rounds = arguments.rounds or ROUNDS
    counts = {name: arguments.tokens for name in NAMES}
    counts |= {name: min(arguments.baseline_tokens or arguments.tokens, arguments.tokens) for name in BASELINES}
    if min(counts.values()) < rounds:
        raise UsageError(f"--tokens and --baseline-tokens have to be at least --rounds, which is {rounds}.")
    span = arguments.prompt + -(-arguments.tokens // rounds)
    with compare.opened(arguments, rounds * span, span) as subject:
        share, budget = subject.budget_for(arguments.share)
        refuse_to_swap(budget, f"{share:.0%} of the model", arguments.force)
        everything = subject.weights_bytes + subject.base_bytes
        with_dense = arguments.force or everything <= available_memory_bytes()
        result: dict[str, Any] = {
            **subject.describe(),
            "share": share,
            "budget_bytes": budget,
            "rounds": rounds,
            "dense": "measured" if with_dense else f"left out: needs {everything / 1e9:.1f} GB",
        }
        result["disk_first"] = disk.prepare(subject.files)
        result["disk"] = []
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in NAMES if name != "dense" or with_dense}
        jobs = [(turn, name) for turn in range(rounds) for name in runs]
        for turn, name in jobs:
            if name == "naive":
                result["disk"].append(disk.sequential_rate([subject.streamed[0]], disk.RATE_BYTES))
            tokens = counts[name] * (turn + 1) // rounds - counts[name] * turn // rounds
            side = Side(name, budget if name == "flash" else None, keep=min(HALF, share))
            limit = None if name == "dense" else budget
            label = f"{name}, round {turn + 1} of {rounds}"
            runs[name].append(subject.run(side, tokens, limit, turn * span, label))
        result["cached_share_after"] = compare.cached_shares(subject)
    if any(run.get("kills") for members in runs.values() for run in members):
        raise FlashError("the kernel killed a process for memory (see above): the figures are void.")
    result["sides"] = {name: side_row(runs[name], runs["naive"]) for name in runs}
    result["ratios"] = ratios(result["sides"])
    finish(
        arguments.output,
        "naive-vs-flash",
        result,
        lambda figure: draw(figure, result),
        size=(9, 5),
        show=lambda: show(result),
    )


def title_of(name: str, result: dict[str, Any]) -> str:
    return compare.hybrid_title(result["share"]) if name == "hybrid" else NAMES[name]


# -- figures -------------------------------------------------------------------------------------------------


def side_row(runs: list[dict[str, Any]], naive: list[dict[str, Any]]) -> dict[str, Any]:
    """All rounds of one side together, compared with the naive side's most likely tokens."""
    samples = [sample for run in runs for sample in run["samples"]]
    pairs = [
        pair for run, other in zip(runs, naive, strict=True) for pair in zip(run["top"], other["top"], strict=False)
    ]
    return {
        **compare.figures(samples),
        "steady_s": compare.steady([run["samples"] for run in runs]),
        "weights_bytes": runs[0]["weights_bytes"],
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "cgroup_peak_bytes": max((run.get("cgroup_peak_bytes", 0) for run in runs), default=0) or None,
        "kills": sum(run.get("kills", 0) for run in runs),
        "prompt_s": sum(run["prompt_s"] for run in runs) / len(runs),
        "slot_share": runs[0]["slot_share"] if runs[0]["side"] == "flash" else None,
        "agreement": sum(a == b for a, b in pairs) / len(pairs),
        "agreement_tokens": len(pairs),
    }


def ratios(rows: dict[str, Any]) -> dict[str, Any]:
    """How many times what flash loading takes.

    no_overlap: the baselines as the paper counts them, reading and then computing, against flash loading as it is.
    """
    flash = rows["flash"]
    hybrid = rows["hybrid"]
    alone = rows["dense"]["compute_s"] if "dense" in rows else hybrid["compute_s"]
    in_turn = {name: rows[name]["read_s"] + alone for name in BASELINES}
    found: dict[str, Any] = {
        "compute_of_baselines": "measured alone (all in memory)" if "dense" in rows else "hybrid: total - wait - manage"
    }
    for name in rows:
        row = rows[name]
        found[name] = {
            "bytes": row["bytes"] / flash["bytes"] if flash["bytes"] else None,
            "read": row["read_s"] / flash["read_s"] if flash["read_s"] else None,
            "total": row["total_s"] / flash["total_s"],
            "total_median": row["total_spread_s"]["median"] / flash["total_spread_s"]["median"],
            "steady": row["steady_s"] / flash["steady_s"],
        }
        if name in in_turn:
            found[name] |= {"no_overlap_s": in_turn[name], "no_overlap": in_turn[name] / flash["total_s"]}
    return found


# -- showing -------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    rows, found = result["sides"], result["ratios"]
    print(
        f"\n{result['model']}: {result['weights_bytes'] / 1e9:.3f} GB of weights; {result['prompt']} tokens of prompt"
    )
    print(
        f"memory: {result['budget_bytes'] / 1e6:,.0f} MB = {result['share']:.0%} of the weights + "
        f"{result['base_bytes'] / 1e6:,.0f} MB for the process; limit {result['memory_limit']}"
    )
    print(f"disk: {result['disk_first']['state']}")
    print(f"ceiling, before every round: {disk.rates(result['disk_first'], result['disk'])}")
    held = ", ".join(
        f"{'unknown' if share is None else f'{share:.1%}'} of {name}"
        for name, share in result["cached_share_after"].items()
    )
    print(f"in the page cache after the run: {held}\n")
    head = ["per token", "tokens", "DRAM MB", "peak MB", "MB", "reads", "GB/s", "read", "hidden", "wait", "manage"]
    head += ["compute", "mean ms", "median", "p90", "p99", "steady", "bytes", "read s", "total"]
    lines = []
    for name, row in rows.items():
        quick, spread = row["bytes_per_second"], row["total_spread_s"]
        lines.append(
            [
                title_of(name, result),
                str(row["tokens"]),
                mb(row["weights_bytes"]),
                mb(row["peak_memory_bytes"]),
                mb(row["bytes"]),
            ]
            + [f"{row['reads']:,.0f}", "-" if quick is None else f"{quick / 1e9:.2f}"]
            + [ms(row[f"{part}_s"]) for part in ("read", "hidden", "wait", "manage", "compute", "total")]
            + [ms(spread[part]) for part in ("median", "p90", "p99")]
            + [ms(row["steady_s"]), *(times(found[name][part]) for part in ("bytes", "read", "total"))]
        )
    compare.table(head, lines)
    print(
        "DRAM: weights planned to stay; peak: of the process. read: the disk was busy; wait: the token waited for it; "
        "hidden: the rest.\nsteady: median of the second half of every round. The last three: times what flash loading "
        "takes."
    )
    if "dense" not in rows:
        print(f"all in memory: {result['dense']}")
    print(
        f"\n{'':<24}{'measured':>10}{'median':>10}{'steady':>10}{'baseline without overlap, as the paper counts':>50}"
    )
    for name in BASELINES:
        row = found[name]
        cells = "".join(f"{times(row[part]):>10}" for part in ("total", "total_median", "steady"))
        print(f"{title_of(name, result):<24}{cells}{times(row['no_overlap']):>50}")
    print(f"last column: (read + compute of the baseline) / flash; compute: {found['compute_of_baselines']}")
    flash = rows["flash"]
    print(
        f"flash loading: {flash['slot_share']:.0%} of the neurons have a slot, "
        f"{'no' if flash['hit_rate'] is None else format(flash['hit_rate'], '.1%')} hits; "
        f"per token {flash['early']:.0f} blocks read early, {flash['vain']:.0f} in vain"
    )
    agreed = ", ".join(f"{name} {row['agreement']:.1%} of {row['agreement_tokens']}" for name, row in rows.items())
    print(f"most likely token as in naive: {agreed}")
    kills = "none" if result["memory_limit"].startswith("enforced") else "unknown"
    print(f"killed for memory: {kills}; {describe(result['environment'])}")


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Above: all sides. Below: flash loading and the model all in memory, magnified."""
    rows = result["sides"]
    upper = [name for name in NAMES if name in rows and name != "dense"]
    lower = [name for name in NAMES if name in rows and name not in BASELINES]
    panels = figure.subplots(2, 1, height_ratios=[len(upper) + 0.6, len(lower) + 0.6])
    for axes, names in zip(panels, (upper, lower), strict=True):
        stack(axes, names, result)
    limit = (
        f"memory limit: {result['share']:.0%} of the weights and {result['base_bytes'] / 1e6:.0f} MB for the process"
    )
    compare.title(figure, finding(result), f"{result['model']}; {limit}")
    panels[0].legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=8, borderaxespad=0.2)
    panels[1].set_title("on a scale of its own", fontweight="normal", fontsize=8, loc="right")
    panels[1].set_xlabel("ms per token (mean, first tokens counted)")


def finding(result: dict[str, Any]) -> str:
    """The plot's title."""
    naive, hybrid = (result["ratios"][name]["total"] for name in BASELINES)
    if naive <= 1:
        return f"Flash loading takes {1 / naive:.1f} times as long as reading every weight"
    half = "half" if result["share"] >= HALF else f"{result['share']:.0%}"
    if hybrid <= 1:
        return f"A token comes {times(naive)} as fast as by reading everything, not faster than with {half} in memory"
    return (
        f"A token comes {times(naive)} as fast as by reading everything, {times(hybrid)} as with {half} kept in memory"
    )


def stack(axes: Any, names: list[str], result: dict[str, Any]) -> None:
    rows, ratio = result["sides"], result["ratios"]
    longest = max(max(rows[name]["total_s"], rows[name]["read_s"]) for name in names) * 1e3
    parts = {"wait_s": "reading", "manage_s": "management", "compute_s": "compute"}
    for y, name in enumerate(names):
        row, left = rows[name], 0.0
        for key, part in parts.items():
            width = row[key] * 1e3
            label = {"reading": "reading (waited for)"}.get(part, part) if y == 0 else None
            axes.barh(y, width, left=left, height=0.5, color=COLOURS[part], label=label)
            if width > 0.07 * longest:
                axes.text(left + width / 2, y, f"{width:.0f}", ha="center", va="center", color="white", fontsize=8)
            left += width
        hidden = row["hidden_s"] * 1e3
        style = {"height": 0.12, "facecolor": "white", "edgecolor": COLOURS["reading"], "hatch": "//////", "lw": 0.5}
        axes.barh(y + 0.33, hidden, label="reading hidden behind compute" if y == 0 else None, **style)
        note = f"{ms(row['total_s'])} ms"
        if name != "flash":
            note += f"   {times(ratio[name]['total'])}"
        note += f"   reads {mb(row['bytes'])} MB" if row["bytes"] else "   reads nothing"
        axes.text(max(left, hidden) + 0.01 * longest, y, note, va="center", fontsize=8.5)
    axes.set_yticks(
        range(len(names)), [f"{title_of(n, result)}\n{mb(rows[n]['weights_bytes'])} MB in DRAM" for n in names]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 1.3 * longest)
    axes.tick_params(axis="y", length=0)
