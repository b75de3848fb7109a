"""Does it pay to store neurons that fire together side by side, and to merge near-adjacent misses into one read?"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.errors import UsageError
from mlx_flash.flash.slot_cache import SlotCache
from mlx_flash.loading.plan import MIN_SLOTS, distribute_slots

from . import traces
from .eviction import everyone_but
from .tools.report import COLOURS, finish, require_plots

NEIGHBOURS = 32  # per neuron, considered by the order by pairs
LARGEST_SPECTRAL = 4096  # neurons; more would take minutes per layer


@dataclass(frozen=True)
class Disk:
    """A model of a disk: time = requests / request rate + bytes / bandwidth."""

    name: str
    reads_per_s: float
    bytes_per_s: float

    def gap(self, bundle_bytes: int) -> int:
        """The number of unwanted bundles that cost less to read through than another request."""
        return math.floor(min(self.bytes_per_s / self.reads_per_s / bundle_bytes, 2**62))

    def seconds(self, reads: float, read_bytes: float) -> float:
        return reads / self.reads_per_s + read_bytes / self.bytes_per_s


M5_PRO = Disk("Apple M5 Pro, published", 277e3, 17e9)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    traces.add_arguments(parser, tokens=4000)
    parser.add_argument("--slots", type=float, default=0.25, help="share of neurons with a slot (default: %(default)s)")
    parser.add_argument(
        "--bundle", type=int, default=16384, help="bytes per neuron (default: %(default)s, as in OPT-1.3B in float32)"
    )
    parser.add_argument(
        "--reads-per-s", type=float, default=30e3, help="request rate of this disk (default: %(default)s)"
    )
    parser.add_argument(
        "--bytes-per-s", type=float, default=1.1e9, help="bandwidth of this disk (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    numbers = (arguments.bundle, arguments.reads_per_s, arguments.bytes_per_s)
    if not 0 < arguments.slots <= 1 or not all(math.isfinite(n) and n > 0 for n in numbers):
        raise UsageError("--slots must be in (0, 1]; --bundle, --reads-per-s and --bytes-per-s must be above 0.")
    disks = (Disk("this disk", arguments.reads_per_s, arguments.bytes_per_s), M5_PRO)
    with traces.opened(arguments, print) as traced:
        held_out = traces.record(traced.model, traced.ids, traced.prefix, "held-out text")
        calibration = traces.record(traced.model, traced.calibration_ids, traced.prefix, "calibration text")
        result: dict[str, Any] = {
            **traces.head_of(traced, arguments.text),
            "slots": arguments.slots,
            "bundle_bytes": arguments.bundle,
            "disks": [vars(disk) for disk in disks],
        }
    result["rows"] = compare(held_out, calibration, arguments.slots, arguments.bundle, disks)
    finish(
        arguments.output,
        "ordering",
        result,
        lambda figure: draw(figure, result["rows"]),
        size=(9, 3.8),
        show=lambda: show(result["rows"], disks),
    )


def compare(
    held_out: list[traces.LayerTrace],
    calibration: list[traces.LayerTrace],
    share: float,
    bundle_bytes: int,
    disks: tuple[Disk, ...],
) -> list[dict[str, Any]]:
    """A row for every disk and order: reads, bytes and modelled seconds per token, over all layers.

    `rest_...` leaves out the layer that needs most. Slots are distributed as in the engine.
    """
    need = [max(1e-3, float(trace.chosen.mean())) for trace in calibration]
    neurons = held_out[0].neurons
    slots = distribute_slots(round(share * neurons * len(need)), need, min(MIN_SLOTS, round(share * neurons)), neurons)
    sums: dict[tuple[str, str], list[tuple[float, float]]] = {}  # (disk, order) -> (reads, bundles) by layer, per token
    jobs = list(zip(held_out, calibration, slots, strict=True))
    for trace, known, count in tqdm(jobs, desc="orders", unit="layer", dynamic_ncols=True):
        missing, known_chosen = missed(trace.chosen, max(1, count)), known.chosen
        for name, make in ORDERS.items():
            position = positions(make(known_chosen))
            for disk in disks:
                gap = -1 if name == "original, not merged" else disk.gap(bundle_bytes)
                counts = np.array([merged(position[np.flatnonzero(row)], gap) for row in missing])
                sums.setdefault((disk.name, name), []).append(tuple(counts.mean(axis=0).tolist()))
    rest = everyone_but([trace.chosen for trace in calibration])
    rows = []
    for disk in disks:
        for name in ORDERS:
            by_layer = np.array(list(sums[disk.name, name]))
            row: dict[str, Any] = {"disk": disk.name, "order": name, "by_layer": by_layer.tolist()}
            for part, layers in {"": list(range(len(by_layer))), "rest_": rest}.items():
                reads, bundles = by_layer[layers].sum(axis=0).tolist()
                seconds = disk.seconds(reads, bundles * bundle_bytes)
                row |= {f"{part}reads": reads, f"{part}bytes": bundles * bundle_bytes, f"{part}seconds": seconds}
            rows.append(row)
    return rows


def missed(chosen: np.ndarray, slots: int) -> np.ndarray:
    """The neurons that each token misses in the engine's cache. bool (T, F) -> bool (T, F)"""
    cache = SlotCache(chosen.shape[1], slots)
    missing = np.zeros_like(chosen)
    for token, mask in enumerate(chosen):
        units = np.flatnonzero(mask)
        cache.mark_used(units)
        for begin in range(0, len(units), slots):
            absent, targets = cache.reserve(units[begin : begin + slots])
            cache.commit(absent, targets)
            missing[token, absent] = True
    return missing


def merged(places: np.ndarray, gap: int) -> tuple[int, int]:
    """(reads, bundles read) for bundles at `places`. A read may span gaps of at most `gap` unwanted bundles.

    A gap of -1 merges nothing; 0 merges adjacent bundles.
    """
    if not len(places):
        return 0, 0
    between = np.diff(np.sort(places)) - 1
    through = between[between <= gap]
    return len(places) - len(through), len(places) + int(through.sum())


# -- orders: neurons chosen on calibration text, bool (T, F) -> ids in storage order (F,) ---------------------


def original(chosen: np.ndarray) -> np.ndarray:
    return np.arange(chosen.shape[1])


def by_frequency(chosen: np.ndarray) -> np.ndarray:
    return np.argsort(-chosen.sum(axis=0), kind="stable")


def by_pairs(mask: np.ndarray) -> np.ndarray:
    """Joins pairs of neurons into chains, the pair that agrees most first. bool (T, F) -> (F,)

    The chains are then concatenated, the most used first.
    """
    likeness = agreement(mask)
    neurons = len(likeness)
    count = min(NEIGHBOURS, neurons - 1)
    near = np.argpartition(-likeness, count - 1, axis=1)[:, :count] if count else np.empty((neurons, 0), int)
    first, second = np.repeat(np.arange(neurons), count), near.ravel()
    best_first = np.argsort(-likeness[first, second], kind="stable")
    chain = list(range(neurons))  # neuron -> its chain
    chains = {i: [i] for i in range(neurons)}
    for a, b in zip(first[best_first].tolist(), second[best_first].tolist(), strict=True):
        left, right = chains[chain[a]], chains[chain[b]]
        if chain[a] == chain[b] or a not in (left[0], left[-1]) or b not in (right[0], right[-1]):
            continue
        left = left if left[-1] == a else left[::-1]
        right = right if right[0] == b else right[::-1]
        del chains[chain[right[0]]]
        for neuron in right:
            chain[neuron] = chain[a]
        chains[chain[a]] = left + right
    use = mask.sum(axis=0)
    return np.concatenate([c for c in sorted(chains.values(), key=lambda c: -use[c].mean())])


def spectral(mask: np.ndarray) -> np.ndarray:
    """Sorts by the second eigenvector of the normalised graph of agreement. bool (T, F) -> (F,)"""
    likeness = agreement(mask)
    if len(likeness) > LARGEST_SPECTRAL:
        return np.arange(len(likeness))
    root = 1 / np.sqrt(likeness.sum(axis=1) + 1e-6)
    values, vectors = np.linalg.eigh(likeness * root[:, None] * root)
    return np.argsort(vectors[:, np.argsort(values)[-min(2, len(values))]] * root, kind="stable")


def agreement(mask: np.ndarray) -> np.ndarray:
    """Tokens that need both / tokens that need either (Jaccard); 0 with itself. bool (T, F) -> float32 (F, F)"""
    number = mask.astype(np.float32)
    both = number.T @ number  # (F, T) @ (T, F)
    use = np.diag(both)
    likeness = both / np.maximum(use[:, None] + use - both, 1)
    np.fill_diagonal(likeness, 0)
    return likeness


def positions(order: np.ndarray) -> np.ndarray:
    """The position of each neuron in an order. ids (F,) -> positions (F,)"""
    place = np.empty(len(order), int)
    place[order] = np.arange(len(order))
    return place


ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "original, not merged": original,
    "original": original,
    "frequency": by_frequency,
    "pairs chosen together": by_pairs,
    "spectral": spectral,
}


# -- showing -------------------------------------------------------------------------------------------------


def show(rows: list[dict[str, Any]], disks: tuple[Disk, ...]) -> None:
    for disk in disks:
        print(f"\n{disk.name}: {disk.reads_per_s / 1e3:.0f}k reads/s, {disk.bytes_per_s / 1e9:.1f} GB/s")
        print(f"{'order':<24}{'reads/token':>12}{'MB/token':>10}{'ms/token':>10}{'':>8}   without the neediest layer")
        mine = [row for row in rows if row["disk"] == disk.name]
        for row in mine:
            print(f"{row['order']:<24}{row['reads']:>12.1f}{row['bytes'] / 1e6:>10.2f}", end="")
            for part in ("seconds", "rest_seconds"):
                print(f"{row[part] * 1e3:>10.2f}{row[part] / mine[0][part] - 1:>+8.1%}", end="")
            print()


def draw(figure: Any, rows: list[dict[str, Any]]) -> None:
    """Draws a bar for every order: the modelled time per token."""
    names = list(dict.fromkeys(row["disk"] for row in rows))
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        mine = [row for row in rows if row["disk"] == name]
        labels = [row["order"] for row in mine]
        bars = axes.barh(labels, [row["seconds"] * 1e3 for row in mine], color=COLOURS["reading"], height=0.6)
        bars[0].set_color(COLOURS["compute"])
        axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
        axes.set_title(name)
        axes.set_xlabel("modelled ms per token")
        axes.margins(x=0.12)
    panels[0].invert_yaxis()
