"""What each step of the method brings, one after another: the paper's table 2, and what this engine adds.

Two kinds of rows. "replay": the reads that the step would make for the neurons a real run chose, made by the real
reader on the real file, and nothing else, so that there is no compute to hide them behind. "engine": a whole run.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import THREADS
from mlx_flash.errors import UsageError
from mlx_flash.flash.files import Manifest
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.system import current_memory_bytes
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.layers.predictors import Predictor

from . import compare, mixture_model, mixture_steps, traces
from .baselines.contenders import HALF, Side
from .compare import mb, ms
from .tools import disk
from .tools.report import COLOURS, describe, finish, refuse_to_swap, require_plots

WINDOW = 4  # tokens, the paper's
SLOT_NOTE = "the engine shares its slots out by need in all its rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    compare.add_arguments(parser, tokens=64)
    compare.add_share_argument(parser)
    parser.add_argument(
        "--baseline-tokens",
        type=whole_number(1),
        default=8,
        help="tokens of naive and hybrid, and of a mixture's whole layers, which are slow (default: %(default)s)",
    )
    mixture_model.add_arguments(parser)


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    if folder := mixture_model.folder_of(arguments.model):
        compare.refuse(arguments, ("share", "matrices"), mixture_model.KIND)
        mixture_steps.main(arguments, folder)
        return
    compare.refuse(arguments, ("memory",), compare.KIND)
    span = arguments.prompt + arguments.tokens
    with compare.opened(arguments, span, span) as subject:
        share, budget = subject.budget_for(arguments.share)
        refuse_to_swap(budget, f"{share:.0%} of the model", arguments.force)
        first = disk.prepare(subject.files)
        rates = [disk.sequential_rate([subject.streamed[0]], disk.RATE_BYTES)]
        result: dict[str, Any] = {
            **subject.describe(),
            "share": share,
            "budget_bytes": budget,
            "window": WINDOW,
            "disk_first": first,
            "note": SLOT_NOTE,
        }
        tokens = min(arguments.baseline_tokens, arguments.tokens)
        result["steps"] = [
            engine(subject, "naive: all from flash", Side("naive"), tokens, budget),
            engine(subject, compare.hybrid_title(share), Side("hybrid", keep=min(HALF, share)), tokens, budget),
            *replays(subject, record(subject, arguments.tokens, budget)),
        ]
        rates.append(disk.sequential_rate([subject.streamed[0]], disk.RATE_BYTES))
        flash = {
            f"engine, window of {WINDOW}": Side("flash", budget, look_ahead="never", options={"window": WINDOW}),
            "+ eviction by fading use": Side("flash", budget, look_ahead="never"),
            "+ look-ahead": Side("flash", budget, look_ahead="always"),
        }
        result["steps"] += [engine(subject, name, side, arguments.tokens, budget) for name, side in flash.items()]
        result["disk"] = rates
        result["cached_share_after"] = compare.cached_shares(subject)
    finish(
        arguments.output, "steps", result, lambda figure: draw(figure, result), size=(9, 4.8), show=lambda: show(result)
    )


def engine(subject: compare.Subject, name: str, side: Side, tokens: int, limit: int) -> dict[str, Any]:
    """A row of a whole run."""
    run = subject.run(side, tokens, limit, label=name)
    row = {"step": name, "kind": "engine", "dram_bytes": run["weights_bytes"], "kills": run.get("kills")}
    return row | compare.figures(run["samples"])


# -- replaying reads -----------------------------------------------------------------------------------------


class Recorder:
    """Stands in a predictor's place and writes down what it chose."""

    def __init__(self, inner: Predictor) -> None:
        self.inner = inner
        self.rows: list[np.ndarray] = []

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        mask, activations = self.inner(x)
        self.rows.append(traces.packed(mask))
        return mask, activations


def record(subject: compare.Subject, tokens: int, budget: int) -> list[np.ndarray]:
    """Which neurons each layer uses for each token after the prompt: bool (tokens, F), layer by layer."""
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_flash.loading.load import load

    # This process is larger than a side's, and no memory cgroup holds it.
    model, _ = load(subject.store, memory=budget + current_memory_bytes(), context=subject.prompt + tokens)
    model.flash.fix_look_ahead(False)  # A guess would be taken for the next layer's choice.
    recorders: dict[int, Recorder] = {}
    cache = make_prompt_cache(model)
    mx.eval(model(mx.array([subject.ids[: subject.prompt]]), cache=cache))
    for index, layer in enumerate(model.layers):
        if layer.mlp.predictor is not None:
            recorders[index] = layer.mlp.predictor = Recorder(layer.mlp.predictor)
    if not recorders:
        model.flash.close()
        raise UsageError(f"the store uses all neurons of every layer ({subject.store}): there is no step to show.")
    ids = subject.ids[subject.prompt : subject.prompt + tokens]
    for token in tqdm(ids, desc="recording", unit="token", dynamic_ncols=True):
        mx.eval(model(mx.array([[token]]), cache=cache))
    model.flash.close()
    neurons = subject.manifest.layout.neurons
    everyone = np.ones((tokens, neurons), np.bool_)
    layers = range(len(model.layers))
    return [traces.unpacked(recorders[i].rows, neurons) if i in recorders else everyone for i in layers]


def replays(subject: compare.Subject, chosen: list[np.ndarray]) -> list[dict[str, Any]]:
    """The rows of predictor, windowing and bundling."""
    layout = subject.manifest.layout
    assert subject.matrices is not None
    resident = subject.resident_bytes + subject.least["plan"]["predictors"]
    blocks = [traces.by_block(mask, layout.neurons_per_block) for mask in chosen]
    up_and_down = 2 * layout.row_bytes

    def rows(layer: int, ids: np.ndarray) -> np.ndarray:
        first = 2 * layer * layout.neurons + ids
        return np.concatenate([first, first + layout.neurons]) * layout.row_bytes

    def bundles(layer: int, ids: np.ndarray) -> np.ndarray:
        return layer * layout.layer_bytes + ids * layout.block_bytes

    neurons_file = subject.store / Manifest.neurons_file
    with UnitFile(subject.matrices) as matrices, UnitFile(neurons_file) as neurons, Reader(THREADS) as reader:
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
            found.append(row | compare.figures(samples))
    return found


def touched(mask: np.ndarray, window: int) -> np.ndarray:
    """Units used in the last `window` tokens before each. bool (T, U) -> bool (T, U)"""
    before = np.zeros_like(mask)
    for age in range(1, window + 1):
        before[age:] |= mask[:-age]
    return before


def missing(mask: np.ndarray, window: int) -> np.ndarray:
    """Units that have to be read for each token if those of the last `window` tokens are here."""
    return mask & ~touched(mask, window)


def replay(
    reader: Reader,
    file: UnitFile,
    offsets_of: Callable[[int, np.ndarray], np.ndarray],
    length: int,
    needed: list[np.ndarray],
    name: str,
) -> list[dict[str, Any]]:
    """Reads each token's units, layer after layer; returns what `compare.figures` takes.

    offsets_of: (layer, units) -> where their `length` bytes each lie in the file, ascending.
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


def show(result: dict[str, Any]) -> None:
    print(f"\n{result['model']}: {result['weights_bytes'] / 1e9:.3f} GB of weights; memory {result['memory_limit']}")
    print(f"disk: {result['disk_first']['state']}")
    print(f"ceiling, before and midway: {disk.rates(result['disk_first'], result['disk'])}\n")
    head = ["step", "kind", "tokens", "DRAM MB", "MB/token", "reads", "GB/s", "I/O busy ms", "median", "p90"]
    head += ["waited ms", "total ms", "median", "p90"]
    lines = []
    for row in result["steps"]:
        quick, total = row["bytes_per_second"], row.get("total_spread_s", {})
        cells = [row["step"], row["kind"], str(row["tokens"]), mb(row["dram_bytes"]), mb(row["bytes"])]
        cells += [f"{row['reads']:,.0f}", "-" if quick is None else f"{quick / 1e9:.2f}", ms(row["read_s"])]
        cells += [ms(row["read_spread_s"]["median"]), ms(row["read_spread_s"]["p90"]), ms(row["wait_s"])]
        lines.append([*cells, ms(row.get("total_s")), ms(total.get("median")), ms(total.get("p90"))])
    compare.table(head, lines)
    print(
        "DRAM: of the weights. replay: the reads of a recorded run alone, waited for one layer after the other;\n"
        f"engine: whole runs, where reads hide behind compute. {result['note']}, and bundles in those after hybrid."
    )
    print(describe(result["environment"]))


def draw(figure: Any, result: dict[str, Any]) -> None:
    """A bar for every step: how long the disk was busy for a token and, within, what the token waited for it."""
    steps = result["steps"]
    axes = figure.subplots()
    first, last = steps[0], steps[-1]
    compare.title(
        figure,
        f"Reading per token: from {amount(first['bytes'])} in {ms(first['read_s'])} ms to {amount(last['bytes'])} "
        f"in {ms(last['read_s'])} ms, {ms(last['wait_s'])} ms of it waited for",
        f"{result['model']}; steps marked * are the reads of a recorded run alone, the others whole runs",
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
