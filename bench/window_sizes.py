"""Repeats the paper's figure 4: neurons resident and newly read per token, by the window of tokens kept in memory."""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number

from . import traces
from .tools.report import COLOURS, SERIES, finish, require_plots

KINDS = {"active": "truly active", "chosen": "chosen by the predictor"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    traces.add_arguments(parser)
    parser.add_argument(
        "--largest", type=whole_number(2, 1000), default=30, help="largest window in tokens (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    with traces.opened(arguments, print) as traced:
        history = traces.record(traced.model, traced.ids, traced.prefix, "decoding")
        result: dict[str, Any] = {
            **traces.head_of(traced, arguments.text),
        }
    windows = list(range(1, min(arguments.largest, len(traced.ids) // 4) + 1))
    result |= {"windows": windows, "layers": [trace.layer for trace in history]}
    for kind in KINDS:
        sizes = [
            by_window(getattr(trace, kind), windows) for trace in tqdm(history, desc=kind, unit="layer", leave=False)
        ]
        for name, rows in zip(("resident", "new"), zip(*sizes, strict=True), strict=True):
            result[f"{kind}_{name}_by_layer"] = np.array(list(rows)).tolist()
            result[f"{kind}_{name}"] = np.mean(rows, axis=0).tolist()
    finish(
        arguments.output,
        "windows",
        result,
        lambda figure: draw(figure, result),
        size=(9, 4.8),
        show=lambda: show(result),
    )


def by_window(mask: np.ndarray, windows: list[int]) -> tuple[list[float], list[float]]:
    """Two shares of the neurons for each window k: those that the last k tokens touched, and those that the next adds.

    mask: bool (tokens, neurons). Both shares are means over the tokens after the largest window.
    """
    age = ages(mask)  # (T, F)
    start = max(windows)
    needed = mask[start:].mean()
    resident = [float((age[start:] <= k).mean()) for k in windows]
    new = [float(needed - (mask[start:] & (age[start:] <= k)).mean()) for k in windows]
    return resident, new


def ages(mask: np.ndarray) -> np.ndarray:
    """The number of tokens since each neuron was last touched; 1 for the token before. bool (T, F) -> int32 (T, F)"""
    tokens = np.arange(len(mask), dtype=np.int32)[:, None]
    last = np.maximum.accumulate(np.where(mask, tokens, -(2**20)), axis=0)
    before = np.concatenate([np.full_like(last[:1], -(2**20)), last[:-1]])
    return tokens - before


def show(result: dict[str, Any]) -> None:
    print("shares of all neurons, means over layers")
    print(f"{'':>8}" + "".join(f"{name:>26}" for name in KINDS.values()))
    print(f"{'window':>8}" + f"{'resident':>15}{'new':>11}" * len(KINDS))
    for at, k in enumerate(result["windows"]):
        if k <= 6 or k % 5 == 0:
            cells = (f"{result[f'{kind}_resident'][at]:>15.2%}{result[f'{kind}_new'][at]:>11.2%}" for kind in KINDS)
            print(f"{k:>8}" + "".join(cells))
    at = min(4, len(result["windows"])) - 1
    print(f"\nby layer, window {result['windows'][at]}")
    for row, layer in enumerate(result["layers"]):
        cells = (
            f"{result[f'{kind}_resident_by_layer'][row][at]:>15.2%}{result[f'{kind}_new_by_layer'][row][at]:>11.2%}"
            for kind in KINDS
        )
        print(f"{layer:>8}" + "".join(cells))


def draw(figure: Any, result: dict[str, Any]) -> None:
    """Draws the resident share on the left and the newly read share on the right. Thick lines are means over layers."""
    panels = figure.subplots(1, 2)
    titles = {"resident": "Resident: touched by the last k tokens", "new": "New: read for the next token"}
    colours = {"active": COLOURS["good"], "chosen": COLOURS["ours"]}
    for axes, (name, title) in zip(panels, titles.items(), strict=True):
        written = -1.0  # height of the last label; overlapping labels are left out
        lines = zip(result["layers"], result[f"chosen_{name}_by_layer"], strict=True)
        for layer, values in sorted(lines, key=lambda line: line[1][-1]):
            axes.plot(result["windows"], values, color=SERIES[0], alpha=0.3, lw=0.9)
            if name == "resident" and values[-1] > written + 0.02:
                place = (result["windows"][-1], values[-1])
                axes.annotate(f" layer {layer}", place, fontsize=6, color="#777777", va="center")
                written = values[-1]
        for kind, label in KINDS.items():
            values = result[f"{kind}_{name}"]
            style = "-" if kind == "chosen" else "--"
            axes.plot(result["windows"], values, style, color=colours[kind], lw=2.4, label=f"{label}, mean of layers")
        axes.set_title(title)
        axes.set_xlabel("window k in tokens")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_xlim(1, result["windows"][-1] * 1.1)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("share of a layer's neurons")
    panels[1].legend(loc="upper right")
