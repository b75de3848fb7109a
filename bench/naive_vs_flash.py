"""Measures latency per token of naive, hybrid and flash loading under one memory limit.

The time is split into reading, management and compute. For a mixture of experts, the contenders are mlx-lm all in
memory, mlx-lm lazily loaded, every layer read whole, and flash loading of single experts.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import IO_MODES
from mlx_flash.errors import UsageError

from . import compare
from .baselines.contenders import HALF, Contender
from .bench_model import BenchModel
from .compare import Kind
from .tools import figures
from .tools.figures import Column, mb, ms, times
from .tools.report import describe, finish, require_plots


@dataclass(frozen=True)
class Contest:
    """The contenders for a kind of model.

    titles: their names in the outputs, in the order in which they run. slow: the contenders that run over
    `--baseline-tokens`. slow_tokens: the default of that flag; None: `--tokens`. rounds: the default of `--rounds`.
    alone: the contenders that are too quick for the plot's scale of the slow ones.
    """

    titles: dict[str, str]
    slow: tuple[str, ...]
    slow_tokens: int | None
    rounds: int
    alone: tuple[str, ...] = ()


CONTESTS: dict[Kind, Contest] = {
    "neurons": Contest(
        {
            "naive": "naive: all from flash",
            "hybrid": "hybrid: half resident",
            "flash": "flash loading",
            "dense": "all in memory",
        },
        slow=("naive", "hybrid"),
        slow_tokens=None,
        rounds=2,
        alone=("dense",),
    ),
    "experts": Contest(
        {
            "resident": "mlx-lm, all in memory",
            "lazy": "mlx-lm, lazily",
            "naive": "every layer whole",
            "flash": "flash",
        },
        slow=("lazy", "naive"),
        slow_tokens=4,
        rounds=1,
    ),
}
NEURONS, EXPERTS = CONTESTS["neurons"], CONTESTS["experts"]
REFUSED: dict[Kind, tuple[str, ...]] = {
    "neurons": ("memory", "sides", "io"),
    "experts": ("share", "matrices", "rounds"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    compare.add_arguments(parser, tokens=128)
    compare.add_share_argument(parser)
    parser.add_argument(
        "--baseline-tokens",
        type=whole_number(1),
        help="tokens of the slow sides: naive and hybrid (default: --tokens), or lazy and naive for a mixture of "
        f"experts (default: {EXPERTS.slow_tokens})",
    )
    parser.add_argument(
        "--rounds",
        type=whole_number(1, 100),
        help=f"rounds to split the tokens over; the sides take turns in each (default: {NEURONS.rounds})",
    )
    group = compare.add_expert_arguments(parser)
    group.add_argument(
        "--sides",
        help=f"comma-separated list, out of {','.join(EXPERTS.titles)} (default: all that fit in memory)",
    )
    group.add_argument(
        "--io", choices=IO_MODES, help=f"read past the page cache or through it (default: {IO_MODES[0]})"
    )


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    kind, mixture = compare.find_model(arguments, REFUSED)
    contest = CONTESTS[kind]
    names = arguments.sides.split(",") if arguments.sides else list(contest.titles)
    if unknown := [name for name in names if name not in contest.titles]:
        raise UsageError(f"--sides: {', '.join(unknown)} unknown, expected some of {','.join(contest.titles)}.")
    if len({*names}) < len(names):
        raise UsageError("--sides: a name stands there twice. Name each once.")
    rounds = arguments.rounds or contest.rounds
    few = min(arguments.baseline_tokens or contest.slow_tokens or arguments.tokens, arguments.tokens)
    counts = {name: few if name in contest.slow else arguments.tokens for name in names}
    if min(counts.values()) < rounds:
        raise UsageError(f"--tokens and --baseline-tokens must be at least --rounds, which is {rounds}.")
    with compare.opened(arguments, mixture, rounds) as model:
        result: dict[str, Any] = {**model.describe(), **model.budget(arguments), "rounds": rounds}
        result["left_out"] = compare.those_left_out(model, names, bool(arguments.sides), arguments.force)
        result["titles"] = dict(contest.titles)
        if kind == "neurons":
            result["titles"]["hybrid"] = compare.hybrid_title(result["share"])
        result |= model.prepare_disk()
        counts = {name: count for name, count in counts.items() if name not in result["left_out"]}
        runs = take_turns(model, counts, result, arguments.io)
        result["cached_share_after"] = model.cached_shares()
    result["disk"] = [run["disk"] for run in next(iter(runs.values()), [])]
    result["sides"] = {name: figures.row_of(each) for name, each in runs.items()}
    agree(result["sides"], runs)
    result["ratios"] = ratios(result["sides"])
    if kind == "neurons":
        result["dense"] = "measured" if "dense" in runs else f"left out: {result['left_out']['dense']}"
        result["ratios"]["compute_of_baselines"], seconds = without_overlap(result["sides"])
        for name, each in seconds.items():
            result["ratios"][name] |= {"no_overlap_s": each, "no_overlap": each / result["sides"]["flash"]["total_s"]}
    name = f"naive-vs-flash{compare.SUFFIXES[kind]}"
    finish(arguments.output, name, result, lambda figure: draw(figure, result), size=(9, 5), show=lambda: show(result))


def take_turns(
    model: BenchModel, counts: dict[str, int], result: dict[str, Any], io: str | None
) -> dict[str, list[dict[str, Any]]]:
    """Runs every contender in every round. counts: contender -> its tokens."""
    rounds, budget = result["rounds"], result["budget_bytes"]
    span = len(model.ids) // rounds
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in counts}
    for turn in range(rounds):
        for name, count in counts.items():
            contender = Contender(name, held=min(HALF, result.get("share", HALF)))
            if name == "flash":
                contender = Contender(name, budget, options={"io": io} if io else {})
            tokens = count * (turn + 1) // rounds - count * turn // rounds
            label = f"{result['titles'][name]}, round {turn + 1} of {rounds}"
            runs[name].append(model.run(contender, tokens, model.limit_of(name, budget), label, turn * span))
    return runs


# -- figures -------------------------------------------------------------------------------------------------


def agree(rows: dict[str, Any], runs: dict[str, list[dict[str, Any]]]) -> None:
    """Adds to every row how often its likeliest token equals that of the first contender that was not killed."""
    done = [name for name, row in rows.items() if not row["killed"]]
    for name in done:
        both = zip(runs[name], runs[done[0]], strict=True)
        pairs = [pair for a, b in both for pair in zip(a["likeliest"], b["likeliest"], strict=False)]
        rows[name] |= {"agreement": sum(a == b for a, b in pairs) / len(pairs), "agreement_tokens": len(pairs)}


def ratios(rows: dict[str, Any]) -> dict[str, Any]:
    """Each contender's figures divided by those of flash loading. Killed contenders are left out."""
    done = {name: row for name, row in rows.items() if not row["killed"]}
    flash = done.get("flash")
    if flash is None:
        return {}
    return {
        name: {
            "bytes": row["bytes"] / flash["bytes"] if flash["bytes"] else None,
            "read": row["read_s"] / flash["read_s"] if flash["read_s"] else None,
            "total": row["total_s"] / flash["total_s"],
            "total_median": row["total_spread_s"]["median"] / flash["total_spread_s"]["median"],
            "steady": row["steady_s"] / flash["steady_s"],
        }
        for name, row in done.items()
    }


def without_overlap(rows: dict[str, Any]) -> tuple[str, dict[str, float]]:
    """The source of the compute time, and the baselines' seconds as the paper counts them: reading, then compute."""
    alone = rows.get("dense", rows["hybrid"])["compute_s"]
    source = "measured alone (all in memory)" if "dense" in rows else "hybrid: total - wait - manage"
    return source, {name: rows[name]["read_s"] + alone for name in NEURONS.slow}


# -- showing -------------------------------------------------------------------------------------------------

NEURON_COLUMNS: list[Column] = [figures.TOKENS, ("DRAM MB", "weights_bytes", mb), figures.PEAK, ("MB", "bytes", mb)]
NEURON_COLUMNS += [figures.READS, figures.RATE, figures.CEILING]
NEURON_COLUMNS += [(part, f"{part}_s", ms) for part in ("read", "hidden", "wait", "manage", "compute")]
NEURON_COLUMNS += [("mean ms", "total_s", ms), figures.MEDIAN, figures.P90, ("p99", "total_spread_s.p99", ms)]
NEURON_COLUMNS += [figures.STEADY, ("bytes", "ratios.bytes", times), ("read s", "ratios.read", times)]
NEURON_COLUMNS += [("total", "ratios.total", times)]
NEURON_NOTE = (
    "DRAM: weights planned to stay in memory; peak: of the process.\n"
    "read: the disk was busy; wait: the token waited for it; hidden: read - wait.\n"
    "steady: median of the second half of every round. in sequence: sequential GB/s of the disk just before.\n"
    "The last three columns are relative to flash loading."
)


def show(result: dict[str, Any]) -> None:
    rows, names, found = result["sides"], result["titles"], result["ratios"]
    figures.show_head(result)
    if result["streams"] == "neurons":
        columns, note = NEURON_COLUMNS, NEURON_NOTE
    else:
        columns, note = figures.EXPERT_COLUMNS, figures.EXPERT_NOTE
    each = [row | {"ratios": found.get(name)} for name, row in rows.items()]
    figures.columns_table("per token", columns, each, [names[name] for name in rows])
    print(note)
    if result["streams"] == "neurons":
        show_ratios(result)
    elif found:
        slower = [f"{names[name]} {times(found[name]['total'])}" for name in rows if name in found and name != "flash"]
        print(f"time per token relative to flash: {', '.join(slower) or '-'}")
    done = [name for name in rows if not rows[name]["killed"]]
    if done:
        agreed = [f"{name} {rows[name]['agreement']:.1%} of {rows[name]['agreement_tokens']}" for name in done]
        print(f"likeliest token as in {done[0]}: {', '.join(agreed)}")
    for name, reason in result["left_out"].items():
        print(f"left out: {names[name]}, which {reason}")
    print(describe(result["environment"]))


def show_ratios(result: dict[str, Any]) -> None:
    """Prints the baselines relative to flash loading, also as the paper counts them, and flash loading's counters."""
    found, flash = result["ratios"], result["sides"]["flash"]
    print(
        f"\n{'':<24}{'measured':>10}{'median':>10}{'steady':>10}{'baseline without overlap, as the paper counts':>50}"
    )
    for name in NEURONS.slow:
        row = found[name]
        cells = "".join(f"{times(row[part]):>10}" for part in ("total", "total_median", "steady"))
        print(f"{result['titles'][name]:<24}{cells}{times(row['no_overlap']):>50}")
    print(f"last column: (read + compute of the baseline) / flash; compute: {found['compute_of_baselines']}")
    print(
        f"flash loading: {flash['slot_share']:.0%} of the neurons have a slot, "
        f"{figures.fine_percent(flash['hit_rate'])} hits; "
        f"per token {flash['early']:.0f} blocks read ahead and used, {flash['vain']:.0f} read ahead and unused"
    )
    kills = "none" if result["memory_limit"].startswith("enforced") else "unknown"
    print(f"killed for memory: {kills}")


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Draws a bar for every contender. The quick ones get a second panel if they would be too small to see."""
    rows = {name: row for name, row in result["sides"].items() if not row["killed"]}
    if not rows:
        figures.title(figure, "Every contender was killed for memory", figures.measured(result))
        return
    contest = CONTESTS[result["streams"]]
    groups = [[name for name in rows if name not in contest.alone]]
    if contest.alone:
        groups.append([name for name in rows if name not in contest.slow])
    panels = figure.subplots(len(groups), 1, squeeze=False, height_ratios=[len(names) + 0.6 for names in groups])[:, 0]
    for axes, names in zip(panels, groups, strict=True):
        labels = [result["titles"][name] for name in names]
        if result["streams"] == "neurons":
            labels = [
                f"{label}\n{mb(rows[name]['weights_bytes'])} MB in DRAM"
                for label, name in zip(labels, names, strict=True)
            ]
        ratio = {name: times(result["ratios"][name]["total"]) for name in rows if name != "flash" and "flash" in rows}
        figures.stack(axes, [rows[name] for name in names], labels, [ratio.get(name, "") for name in names])
    figures.title(figure, finding(result), figures.measured(result))
    if len(groups) > 1:
        panels[1].set_title("on a scale of its own", fontweight="normal", fontsize=8, loc="right")
    figures.stack_legend(panels[0], panels[-1])


def finding(result: dict[str, Any]) -> str:
    """The plot's title."""
    ratio_of = result["ratios"]
    total = {name: ratio_of[name]["total"] for name in result["sides"] if name in ratio_of}
    if 0 < total.get("naive", 2) <= 1:
        return f"Flash loading takes {1 / total['naive']:.1f} times as long as reading every weight"
    found = []
    if "naive" in total:
        found.append(f"comes {times(total['naive'])} as fast as by reading every weight")
    if "hybrid" in total:
        found.append(f"{times(total['hybrid'])} as fast as with {result['titles']['hybrid'].removeprefix('hybrid: ')}")
    if "resident" in total:
        found.append(f"takes {times(1 / total['resident'])} as long as all in memory")
    return f"A token {' and '.join(found)}" if found else "What a token's time is made of"
