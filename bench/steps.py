"""Measures the effect of each step of the method: those of the paper's table 2, then those that this engine adds.

There are two kinds of rows. A "replay" makes a step's reads with the real reader on the real file, for the neurons
that a real run chose. It computes nothing, so no compute hides the reads. An "engine" row is a whole run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import THREADS
from mlx_flash.flash.files import Manifest
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.system import current_memory_bytes
from mlx_flash.flash.unit_file import UnitFile

from . import compare, traces
from .baselines.contenders import HALF, Contender
from .bench_model import BenchModel, NeuronModel
from .compare import Kind
from .tools import figures
from .tools.figures import Column, mb, ms, times
from .tools.report import COLOURS, describe, finish, require_plots

WINDOW = 4  # tokens, as in the paper
LEAST_RECENT = 1_000_000  # calls; a window longer than any text gives least-recent eviction
SLOT_NOTE = "the engine distributes its slots by need in all its rows"
REFUSED: dict[Kind, tuple[str, ...]] = {"neurons": ("memory",), "experts": ("share", "matrices")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    compare.add_arguments(parser, tokens=64)
    compare.add_share_argument(parser)
    parser.add_argument(
        "--baseline-tokens",
        type=whole_number(1),
        default=8,
        help="tokens of the slow rows: naive and hybrid, or a mixture's whole layers (default: %(default)s)",
    )
    compare.add_expert_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    kind, mixture = compare.find_model(arguments, REFUSED)
    with compare.opened(arguments, mixture) as model:
        result: dict[str, Any] = {**model.describe(), **model.budget(arguments)}
        budget = result["budget_bytes"]
        result |= model.prepare_disk()
        few = min(arguments.baseline_tokens, arguments.tokens)
        slow = expert_baselines() if kind == "experts" else neuron_baselines(result["share"])
        result["steps"] = [step(model, name, each, few, budget) for name, each in slow.items()]
        if isinstance(model, NeuronModel):
            result |= {"window": WINDOW, "note": SLOT_NOTE}
            result["steps"] += replays(model, record(model, arguments.tokens, budget))
        quick = expert_steps(model, budget) if kind == "experts" else neuron_steps(budget)
        result["steps"] += [step(model, name, each, arguments.tokens, budget) for name, each in quick.items()]
        result["cached_share_after"] = model.cached_shares()
    result["disk"] = [row["disk"] for row in result["steps"] if "disk" in row]
    name = f"steps{compare.SUFFIXES[kind]}"
    draw = draw_experts if kind == "experts" else draw_neurons
    finish(arguments.output, name, result, lambda figure: draw(figure, result), (9, 4.8), lambda: show(result))


def step(model: BenchModel, name: str, contender: Contender, tokens: int, budget: int) -> dict[str, Any]:
    """The row of a whole run."""
    run = model.run(contender, tokens, model.limit_of(contender.name, budget), name)
    return {"step": name, "kind": "engine", "dram_bytes": run.get("weights_bytes")} | figures.row_of([run])


# -- the steps, by kind of model -----------------------------------------------------------------------------


def neuron_baselines(share: float) -> dict[str, Contender]:
    return {
        "naive: all from flash": Contender("naive"),
        compare.hybrid_title(share): Contender("hybrid", held=min(HALF, share)),
    }


def neuron_steps(budget: int) -> dict[str, Contender]:
    fading = Contender("flash", budget, look_ahead="never")
    return {
        f"engine, window of {WINDOW}": replace(fading, options={"window": WINDOW}),
        "+ eviction by fading use": fading,
        "+ look-ahead": replace(fading, look_ahead="always"),
    }


def expert_baselines() -> dict[str, Contender]:
    return {"every layer whole": Contender("naive")}


def expert_steps(model: BenchModel, budget: int) -> dict[str, Contender]:
    """The steps from reading only the chosen experts to the whole method.

    The steps that keep nothing between calls get slots for one token.
    """
    bare = min(budget, model.budget_for(model.about["layers"] * model.about["choices"]))
    single = Contender("flash", bare, look_ahead="never", keep=False, overlap=False)
    pieces = replace(single, options={"threads": THREADS, "window": LEAST_RECENT})
    kept = replace(pieces, memory=budget, keep=True)
    fading = replace(kept, options={"threads": THREADS})
    overlapped = replace(fading, overlap=True)
    return {
        "only the chosen experts, 1 thread": replace(single, options={"threads": 1, "window": LEAST_RECENT}),
        f"+ {THREADS} threads, experts in pieces": pieces,
        "+ slots, least-recent use": kept,
        "+ eviction by fading use": fading,
        "+ products while others are read": overlapped,
        "+ look-ahead, always": replace(overlapped, look_ahead="always"),
    }


# -- replaying reads -----------------------------------------------------------------------------------------


def record(model: NeuronModel, tokens: int, budget: int) -> list[np.ndarray]:
    """The neurons that each layer uses for each token after the prompt: bool (tokens, F) for each layer."""
    from mlx_flash.loading.load import load

    # This process is larger than a contender's, and no memory cgroup limits it.
    loaded, _ = load(model.folder, memory=budget + current_memory_bytes(), context=model.prompt + tokens)
    ids = model.ids[model.prompt : model.prompt + tokens]
    try:
        found = traces.record(loaded, ids, model.ids[: model.prompt], "recording", active=False)
    finally:
        loaded.flash.close()
    chosen = {trace.layer: trace.chosen[-tokens:] for trace in found}
    everyone = np.ones((tokens, model.manifest.layout.neurons), np.bool_)
    return [chosen.get(layer, everyone) for layer in range(model.about["layers"])]


def replays(model: NeuronModel, chosen: list[np.ndarray]) -> list[dict[str, Any]]:
    """Makes the rows of predictor, windowing and bundling."""
    layout = model.manifest.layout
    assert model.matrices is not None
    resident = model.about["resident_bytes"] + model.about["predictor_bytes"]
    blocks = [traces.by_block(mask, layout.neurons_per_block) for mask in chosen]
    up_and_down = 2 * layout.row_bytes

    def rows(layer: int, ids: np.ndarray) -> np.ndarray:
        first = 2 * layer * layout.neurons + ids
        return np.concatenate([first, first + layout.neurons]) * layout.row_bytes

    def bundles(layer: int, ids: np.ndarray) -> np.ndarray:
        return layer * layout.layer_bytes + ids * layout.block_bytes

    neurons_file = model.folder / Manifest.neurons_file
    with UnitFile(model.matrices) as matrices, UnitFile(neurons_file) as neurons, Reader(THREADS) as reader:
        plans = [
            ("+ predictor", matrices, rows, layout.row_bytes, up_and_down, chosen, 0),
            ("+ windowing", matrices, rows, layout.row_bytes, up_and_down, chosen, WINDOW),
            ("+ bundling", neurons, bundles, layout.block_bytes, layout.block_bytes, blocks, WINDOW),
        ]
        found = []
        for name, file, offsets, length, unit_bytes, masks, window in plans:
            samples = replay(reader, file, offsets, length, [missing(mask, window) for mask in masks], name)
            kept = sum(touched(mask, window).sum(axis=1).mean() for mask in masks) * unit_bytes if window else 0
            row = {"step": name, "kind": "replay", "dram_bytes": int(resident + kept)}
            found.append(row | figures.figures(samples))
    return found


def touched(mask: np.ndarray, window: int) -> np.ndarray:
    """Units used in the last `window` tokens before each. bool (T, U) -> bool (T, U)"""
    before = np.zeros_like(mask)
    for age in range(1, window + 1):
        before[age:] |= mask[:-age]
    return before


def missing(mask: np.ndarray, window: int) -> np.ndarray:
    """Units to read for each token if those of the last `window` tokens are in memory. bool (T, U) -> bool (T, U)"""
    return mask & ~touched(mask, window)


def replay(
    reader: Reader,
    file: UnitFile,
    offsets_of: Callable[[int, np.ndarray], np.ndarray],
    length: int,
    needed: list[np.ndarray],
    name: str,
) -> list[dict[str, Any]]:
    """Reads each token's units, layer after layer. Returns the samples for `figures.figures`.

    offsets_of: (layer, units) -> ascending offsets in the file; `length` bytes are read at each.
    """
    most = max(len(offsets_of(0, np.flatnonzero(row))) for mask in needed for row in mask)
    pool = AlignedPool(max(1, most) * length)
    samples = []
    for token in tqdm(range(len(needed[0])), desc=f"{name}, reads", unit="token", dynamic_ncols=True):
        sample: dict[str, Any] = {"bytes": 0, "reads": 0, "read_s": 0.0, "wait_s": 0.0}
        for layer, mask in enumerate(needed):
            offsets = offsets_of(layer, np.flatnonzero(mask[token]))
            began = time.perf_counter()
            addresses = pool.address + np.arange(len(offsets)) * length
            report = reader.read(file, offsets, addresses, np.full(len(offsets), length))
            sample["wait_s"] += time.perf_counter() - began
            sample["read_s"] += report.seconds
            sample["reads"] += report.requests
            sample["bytes"] += report.bytes
        samples.append(sample)
    return samples


# -- showing -------------------------------------------------------------------------------------------------

NEURON_COLUMNS: list[Column] = [("kind", "kind", str), figures.TOKENS, ("DRAM MB", "dram_bytes", mb)]
NEURON_COLUMNS += [
    ("MB/token", "bytes", mb),
    figures.READS,
    figures.RATE,
    figures.CEILING,
    ("I/O busy ms", "read_s", ms),
]
NEURON_COLUMNS += [
    ("median", "read_spread_s.median", ms),
    ("p90", "read_spread_s.p90", ms),
    ("waited ms", "wait_s", ms),
]
NEURON_COLUMNS += [("total ms", "total_s", ms), figures.MEDIAN, figures.P90]


def show(result: dict[str, Any]) -> None:
    figures.show_head(result)
    steps = result["steps"]
    names = [row["step"] for row in steps]
    if result["streams"] == "experts":
        figures.columns_table("per token", figures.EXPERT_COLUMNS, steps, names)
        print(figures.EXPERT_NOTE)
    else:
        figures.columns_table("step", NEURON_COLUMNS, steps, names)
        print(
            "DRAM: memory of the weights. replay: only the reads of a recorded run, layer after layer.\n"
            f"engine: whole runs, in which compute hides reads. {result['note']},\n"
            "and uses bundles in its rows after hybrid."
        )
    print(describe(result["environment"]))


def draw_experts(figure: Any, result: dict[str, Any]) -> None:
    """Draws a bar for every step: the parts of a token's time."""
    done = [row for row in result["steps"] if not row["killed"]]
    first, last = done[0], done[-1]
    total, read = (first[key] / last[key] if last[key] else None for key in ("total_s", "bytes"))
    finding = f"A token comes {times(total)} as fast as in the first row, with {times(read)} fewer bytes"
    figures.title(figure, finding, figures.measured(result))
    axes = figure.subplots()
    figures.stack(axes, done, [row["step"] for row in done])
    figures.stack_legend(axes, axes)


def draw_neurons(figure: Any, result: dict[str, Any]) -> None:
    """Draws a bar for every step: the disk's busy time per token and, within it, the time that the token waited."""
    steps = result["steps"]
    axes = figure.subplots()
    first, last = steps[0], steps[-1]
    figures.title(
        figure,
        f"Reading per token: from {amount(first['bytes'])} in {ms(first['read_s'])} ms to {amount(last['bytes'])} "
        f"in {ms(last['read_s'])} ms, {ms(last['wait_s'])} ms of it waited for",
        f"{result['model']}; steps marked * are only the reads of a recorded run, the others are whole runs",
    )
    busy = [row["read_s"] * 1e3 for row in steps]
    waited = [row["wait_s"] * 1e3 for row in steps]
    least = min(value for value in [*busy, *waited] if value > 0) / 3
    for y, row in enumerate(steps):
        labels = ["disk busy", "of which the token waited"] if y == 0 else [None, None]
        axes.barh(y, busy[y], height=0.62, color="#9ECAE1", label=labels[0])
        axes.barh(y, min(waited[y], busy[y]), height=0.3, color=COLOURS["reading"], label=labels[1])
        axes.text(max(busy[y], least) * 1.1, y, f"{ms(row['read_s'])} ms", va="center", fontsize=9)
        quick = row["bytes_per_second"]
        columns = {
            0.82: amount(row["bytes"]),
            0.91: f"{quick / 1e9:.2f}" if quick else "-",
            1.0: ms(row.get("total_s")),
        }
        for x, text in columns.items():
            axes.text(x, y, text, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8.5)
    for x, text in {0.82: "read", 0.91: "GB/s", 1.0: "total ms"}.items():
        axes.text(
            x, -0.75, text, transform=axes.get_yaxis_transform(), ha="right", va="center", fontsize=8, color="#555555"
        )
    axes.set_yticks(range(len(steps)), [row["step"] + ("*" if row["kind"] == "replay" else "") for row in steps])
    axes.set_xscale("log")
    axes.set_xlim(least, max(busy) * (max(busy) / least) ** 0.6)
    powers = [10.0**power for power in range(-3, 7) if least <= 10.0**power <= max(busy)]
    axes.set_xticks(powers, [f"{power:g}" for power in powers])
    axes.minorticks_off()
    axes.set_ylim(len(steps) - 0.4, -1.1)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ms of reading per token (mean, logarithmic)")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 0.98), ncols=2, fontsize=8, borderaxespad=0.2)


def amount(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{mb(count)} MB"
