"""Draws the figure of `reads`: throughput by piece size. Left: by thread count. Right: by method at the best count."""

from __future__ import annotations

from typing import Any

from .report import COLOURS

# (key, label, colour, style) in drawing order; the ceiling is on top
LINES = (
    ("python_busy", "Python threads, busy main thread", COLOURS["other"], ":"),
    ("python", "Python threads", COLOURS["other"], "-"),
    ("busy", "200 reads, busy main thread", COLOURS["good"], ":"),
    ("drained", "200 reads, then wait", COLOURS["good"], "-"),
    ("slots", "queue full, many slots", "#56B4E9", "-"),
    ("kept_full", "queue full", COLOURS["ours"], "-"),
    ("fio", "fio", COLOURS["ceiling"], "--"),
)


def draw(figure: Any, result: dict[str, Any], typical: list[dict[str, Any]]) -> None:
    """Draws the two panels. typical: the rows that the headline is about."""
    from matplotlib import colormaps

    left, right = figure.subplots(1, 2, sharey=True)
    rows, best = result["rows"], result["best_threads"]
    depths = sorted({row["threads"] for row in rows})
    shades = colormaps["Blues"]
    labels: list[tuple[int, float, str, Any]] = []
    for index, threads in enumerate(depths):
        shade = shades(0.35 + 0.6 * (index + 1) / len(depths))
        x, y = _line(rows, threads, "kept_full")
        left.plot(x, y, "-o", color=shade, markersize=4)
        labels.append((x[-1], y[-1], f"{threads} thread{'s' * (threads > 1)}", shade))
        if "fio" in rows[0]["methods"]:
            left.plot(*_line(rows, threads, "fio"), "--", color=COLOURS["ceiling"], linewidth=0.9, alpha=0.6)
    _label(left, labels)
    left.set_title("Our reader by number of threads" + (" (dashed: fio)" if "fio" in rows[0]["methods"] else ""))

    labels = []
    for key, label, colour, style in LINES:
        if key in rows[0]["methods"]:
            x, y = _line(rows, best, key)
            right.plot(x, y, style, color=colour, marker="o", markersize=4)
            labels.append((x[-1], y[-1], label, colour))
    _label(right, labels)
    right.set_title(f"Ways of reading, {best} thread{'s' * (best > 1)}")
    sizes = sorted({row["piece_bytes"] for row in rows})
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_xticks(sizes, [_short(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlim(sizes[0] / 1.3, sizes[-1] * (1 if len(sizes) == 1 else 1.3))
        axes.set_ylim(bottom=0)
        axes.set_xlabel("size of a piece")
        axes.grid(axis="y", color="#e5e5e5")
        axes.set_axisbelow(True)
    left.set_ylabel("throughput (GB/s)")
    figure.suptitle(headline(result, typical), x=0.01, ha="left", fontsize=12, fontweight="bold")


def headline(result: dict[str, Any], some: list[dict[str, Any]]) -> str:
    """The finding: the reader's share of the ceiling at the best number of threads and the sizes of neurons."""
    shares = [f"{row['methods']['kept_full']['ratio']:.0%}" for row in some]
    low, high = min(shares, key=lambda s: float(s[:-1])), max(shares, key=lambda s: float(s[:-1]))
    sizes = sorted(row["piece_bytes"] for row in some)
    ceiling = "fio's rate" if result["ceiling"] == "fio" else "the best rate measured"
    return (
        f"At {result['best_threads']} threads and {_short(sizes[0])}-{_short(sizes[-1])} the reader reaches "
        f"{low if low == high else f'{low} to {high}'} of {ceiling} ({result['cache']})"
    )


def _line(rows: list[dict[str, Any]], threads: int, key: str) -> tuple[list[int], list[float]]:
    some = sorted((row for row in rows if row["threads"] == threads), key=lambda row: row["piece_bytes"])
    return [row["piece_bytes"] for row in some], [row["methods"][key]["bytes_per_second"] / 1e9 for row in some]


def _label(axes: Any, labels: list[tuple[int, float, str, Any]]) -> None:
    """Writes names at the lines' ends and moves them apart if they would overlap."""
    top = max(line.get_ydata().max() for line in axes.get_lines())
    axes.set_ylim(0, 1.05 * top)
    room = 0.065 * top
    labels = sorted(labels, key=lambda label: label[1])
    heights: list[float] = []
    for _, y, _, _ in labels:
        heights.append(max([y, *(last + room for last in heights[-1:])]))
    for i in reversed(range(len(heights))):  # move them back below the top
        heights[i] = min(heights[i], top - (len(heights) - 1 - i) * room)
    for (x, y, text, colour), height in zip(labels, heights, strict=True):
        axes.annotate(
            text, (x, y), xytext=(1.035, height / (1.05 * top)), textcoords=axes.transAxes, color=colour, va="center",
            fontsize=8, annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.5},
        )  # fmt: skip


def _short(nbytes: int) -> str:
    return f"{nbytes >> 20}M" if nbytes >= 1 << 20 and nbytes % (1 << 20) == 0 else f"{nbytes >> 10}K"
