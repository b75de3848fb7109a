"""Figures per token: their means and spreads, the columns of a table, the bars of a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from .report import COLOURS, spread

Column = tuple[str, str, Callable[[Any], str]]  # heading, path of the value in a row ("a.b": row["a"]["b"]), format
PARTS = {"wait_s": "reading", "manage_s": "management", "compute_s": "compute"}  # part of a token's time -> colour


def figures(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Means per token of bytes, reads and the parts of its time, and spreads of the total time and of reading.

    samples: Counters of every token as dictionaries. A replay of reads has no `total_s`.
    """

    def mean(key: str) -> float:
        return float(np.mean([sample.get(key, 0.0) for sample in samples]))

    busy = sum(sample["read_s"] for sample in samples)
    needed = sum(sample.get("hits", 0) + sample.get("misses", 0) for sample in samples)
    row: dict[str, Any] = {
        "tokens": len(samples),
        "bytes": mean("bytes"),
        "reads": mean("reads"),
        "bytes_per_second": sum(sample["bytes"] for sample in samples) / busy if busy else None,
        "read_s": mean("read_s"),
        "wait_s": mean("wait_s"),
        "hidden_s": max(0.0, mean("read_s") - mean("wait_s")),
        "manage_s": mean("manage_s"),
        "read_spread_s": spread(sample["read_s"] for sample in samples),
        "hit_rate": sum(sample["hits"] for sample in samples) / needed if needed else None,
        "early": mean("early"),
        "vain": mean("vain"),
    }
    if "total_s" in samples[0]:
        row["total_s"] = mean("total_s")
        row["compute_s"] = max(0.0, row["total_s"] - row["wait_s"] - row["manage_s"])
        row["total_spread_s"] = spread(sample["total_s"] for sample in samples)
        row["total_each_s"] = [round(sample["total_s"], 5) for sample in samples]
    return row


def row_of(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The row of one contender: the figures of the tokens of all its runs, and the other fields of the first run.

    A row with "killed" has no figures, because the kernel killed a run for memory.
    """
    row: dict[str, Any] = {key: value for key, value in runs[0].items() if key != "samples"}
    row["killed"] = any(run["killed"] for run in runs)
    row["kills"] = sum(run["killed"] for run in runs)
    row.setdefault("slot_share", None)
    if row["killed"]:
        return row
    samples = [sample for run in runs for sample in run["samples"]]
    halves = [sample for run in runs for sample in run["samples"][len(run["samples"]) // 2 :]]
    return {
        **row,
        **figures(samples),
        # The slots are warm in the second half of every run.
        "steady_s": spread(sample["total_s"] for sample in halves)["median"],
        "sequential_bytes_per_second": float(np.mean([run["sequential_bytes_per_second"] for run in runs])),
        "prompt_s": float(np.mean([run["prompt"]["total_s"] for run in runs])),
        "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
        "cgroup_peak_bytes": max(run.get("cgroup_peak_bytes", 0) for run in runs) or None,
        "likeliest": [token for run in runs for token in run["likeliest"]],
    }


# -- text ----------------------------------------------------------------------------------------------------


def ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.0f}" if seconds >= 0.1 else f"{seconds * 1e3:.1f}"


def times(ratio: float | None) -> str:
    return (
        "-" if ratio is None else f"{ratio:.2f}x" if ratio < 1 else f"{ratio:.1f}x" if ratio < 20 else f"{ratio:.0f}x"
    )


def mb(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:,.0f}" if count >= 1e7 else f"{count / 1e6:.2f}"


def shown(template: str, factor: float = 1) -> Callable[[float | None], str]:
    """A format for numbers that shows None as "-"."""
    return lambda value: "-" if value is None else template.format(value * factor)


gb, whole, two_digits = shown("{:.2f}", 1e-9), shown("{:,.0f}"), shown("{:.2f}")
percent, fine_percent = shown("{:.0%}"), shown("{:.1%}")


def largest_share(shares: dict[str, float | None]) -> str:
    known = [share for share in shares.values() if share is not None]
    return percent(max(known) if known else None)


def show_head(result: dict[str, Any]) -> None:
    """Prints the conditions of a measurement: the model, its memory, the disk."""
    experts = ""
    if result["streams"] == "experts":
        experts = (
            f", {result['layers']} layers of {result['experts']} experts of {result['expert_bytes'] / 1e6:.2f} MB, "
            f"{result['choices']} per token"
        )
    print(
        f"\n{result['model']}: {result['weights_bytes'] / 1e9:.3f} GB of weights{experts}; {result['prompt']} tokens "
        f"of prompt; memory {result['memory_limit']}"
    )
    if "budget_bytes" in result:
        share = (
            f" = {result['share']:.0%} of the weights + {result['base_bytes'] / 1e6:,.0f} MB for the process"
            if "share" in result
            else ""
        )
        print(f"memory: {result['budget_bytes'] / 1e6:,.0f} MB{share}")
    first = result["disk_first"]
    print(f"disk: {first['state']}")
    print(f"sequential rate: {first['bytes'] / first['seconds'] / 1e9:.2f} GB/s when every byte was first read")
    held = [f"{fine_percent(share)} of {name}" for name, share in result["cached_share_after"].items()]
    print(f"in the page cache after the run: {', '.join(held)}\n")


# -- tables --------------------------------------------------------------------------------------------------

TOKENS: Column = ("tokens", "tokens", str)
LIMIT: Column = ("limit MB", "limit_bytes", mb)
PEAK: Column = ("peak MB", "peak_memory_bytes", mb)
SLOTS: Column = ("slots", "slot_share", percent)
HITS: Column = ("hits", "hit_rate", fine_percent)
READS: Column = ("reads", "reads", whole)
RATE: Column = ("GB/s", "bytes_per_second", gb)
CEILING: Column = ("in sequence", "sequential_bytes_per_second", gb)
MEDIAN: Column = ("median", "total_spread_s.median", ms)
P90: Column = ("p90", "total_spread_s.p90", ms)
STEADY: Column = ("steady", "steady_s", ms)

EXPERT_COLUMNS: list[Column] = [TOKENS, LIMIT, PEAK, SLOTS, HITS, ("MB", "bytes", mb), READS, RATE, CEILING]
EXPERT_COLUMNS += [("read ms", "read_s", ms), *((part, f"{part}_s", ms) for part in ("wait", "manage", "compute"))]
EXPERT_COLUMNS += [("mean ms", "total_s", ms), MEDIAN, P90, ("prompt s", "prompt_s", two_digits)]
EXPERT_COLUMNS += [("first token s", "first_token_s", two_digits), ("load s", "load_s", two_digits)]
EXPERT_COLUMNS += [("written MB", "written_bytes", mb), ("cached", "cached_share_after", largest_share)]
EXPERT_NOTE = (
    "slots: share of all experts with a slot. first token: from the start of the process. written: by the process to "
    "the disk.\ncached: share of the checkpoint in the page cache after the run; it is dropped before the run.\n"
    "in sequence: sequential GB/s of the disk just before."
)


def columns_table(head: str, columns: Sequence[Column], rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """Prints a line for every row, with its name under `head`. A killed run shows its limit and "killed for memory"."""
    lines = []
    for row, name in zip(rows, names, strict=True):
        if row.get("killed"):
            known = {LIMIT: mb(row["limit_bytes"]), PEAK: "killed for memory"}
            lines.append([name, *(known.get(column, "") for column in columns)])
        else:
            lines.append([name, *(form(value_at(row, where)) for _, where, form in columns)])
    table([head, *(heading for heading, _, _ in columns)], lines)


def value_at(row: Any, where: str) -> Any:
    """The value at "a.b" in a row, or None."""
    for key in where.split("."):
        row = None if row is None else row.get(key)
    return row


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints columns as wide as needed. The first is aligned left, the others right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    for row in [head, *rows]:
        cells = (f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([f"{row[0]:<{widths[0]}}", *cells]))


# -- plots ---------------------------------------------------------------------------------------------------


def title(figure: Any, finding: str, measured: str) -> None:
    """Writes the finding in bold above the figure, and a line about the measurement below it."""
    figure.suptitle(f"{finding}\n", x=0.012, ha="left", fontsize=11, fontweight="bold")
    figure.text(0.012, 1 - 0.36 / figure.get_figheight(), measured, fontsize=9, va="top", color="#555555")


def measured(result: dict[str, Any]) -> str:
    """A plot's second line, for a comparison under one budget."""
    budget, weights = result["budget_bytes"] / 1e9, result["weights_bytes"] / 1e9
    return f"{result['model']}; {budget:.2f} GB of memory for {weights:.2f} GB of weights and the process"


def stack(axes: Any, rows: Sequence[dict[str, Any]], names: Sequence[str], ratios: Sequence[str] = ()) -> None:
    """Draws a bar for every row: the parts of a token's time, and below it the reading that compute hides.

    ratios: text to show beside the time of each bar.
    """
    longest = max(max(row["total_s"], row["hidden_s"]) for row in rows) * 1e3
    for y, row in enumerate(rows):
        left = 0.0
        for key, part in PARTS.items():
            width = row[key] * 1e3
            label = {"reading": "reading (waited for)"}.get(part, part) if y == 0 else None
            axes.barh(y, width, left=left, height=0.5, color=COLOURS[part], label=label)
            if width > 0.07 * longest:
                axes.text(left + width / 2, y, f"{width:.0f}", ha="center", va="center", color="white", fontsize=8)
            left += width
        hidden = row["hidden_s"] * 1e3
        style = {"height": 0.12, "facecolor": "white", "edgecolor": COLOURS["reading"], "hatch": "//////", "lw": 0.5}
        axes.barh(y + 0.33, hidden, label="reading hidden behind compute" if y == 0 else None, **style)
        notes = [f"{ms(row['total_s'])} ms", ratios[y] if ratios else ""]
        notes.append(f"reads {mb(row['bytes'])} MB" if row["bytes"] else "")
        text = "   ".join(filter(None, notes))
        axes.text(max(left, hidden) + 0.01 * longest, y, text, va="center", fontsize=8.5)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * longest)
    axes.tick_params(axis="y", length=0)


def stack_legend(top: Any, bottom: Any) -> None:
    """Names the parts above the first panel of bars, and the unit below the last one."""
    top.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, fontsize=8, borderaxespad=0.2)
    bottom.set_xlabel("ms per token (mean, including the first tokens)")
