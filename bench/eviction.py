"""Compares eviction rules, and even with uneven slots, by misses per token at equal bytes, for neurons or experts."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.flash.slot_cache import HALF_LIFE, SlotCache
from mlx_flash.loading.plan import MIN_SLOTS, distribute_slots

from . import routing, traces
from .tools import policies
from .tools.report import COLOURS, SERIES, finish, require_plots

SHARES = (0.05, 0.1, 0.15, 0.2, 0.24, 0.3, 0.4, 0.5)  # slots / units
EXPERT_SHARES = (0.125, 0.25, 0.375, 0.5, 0.75)
WINDOWS = (4, 16, 64)  # tokens
HALF_LIVES = (8, HALF_LIFE, 128, policies.ENDLESS)  # tokens
PINNED = (0.25, 0.5, 0.75)  # pinned slots / slots
WARM_UP = 100  # tokens that are not counted, because caches begin empty

WITHOUT = "the same, without the layer that needs most"
Make = Callable[[int, int], SlotCache]  # (layer, slots)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    traces.add_arguments(parser, tokens=2000)


def main(arguments: argparse.Namespace) -> None:
    require_plots()
    with traces.opened(arguments, print) as traced:
        experts = traces.is_mixture(traced.model)
        count = 1 if experts else traced.model.flash.manifest.layout.neurons_per_block
        held_out = history(traced.model, traced.ids, traced.prefix, "held-out text")
        calibration = history(traced.model, traced.calibration_ids, traced.prefix, "calibration text")
        result: dict[str, Any] = {
            **traces.head_of(traced, arguments.text),
            "neurons_per_block": count,
        }
    result["units"] = {}
    if experts:
        result["habits_by_layer"] = [routing.habits(trace.chosen) for trace in held_out]
    for unit, per in ({"expert": 1} if experts else {"block": count, "neuron": 1}).items():
        if unit == "neuron" and count == 1:
            continue  # a block is one neuron
        wanted, known = ([traces.by_block(t.chosen, per) for t in traced] for traced in (held_out, calibration))
        result["units"][unit] = compare(wanted, known, unit, EXPERT_SHARES if experts else SHARES)
    finish(
        arguments.output,
        "eviction",
        result,
        lambda figure: draw(figure, result["units"]),
        size=(9, 4.5),
        show=lambda: show(result),
    )


def history(model: Any, ids: list[int], prefix: list[int], name: str) -> list[traces.LayerTrace]:
    """The experts or neurons that every layer chose."""
    if traces.is_mixture(model):
        return [tap.trace for tap in routing.record(model, ids, prefix, name)]
    return traces.record(model, ids, prefix, name)


def compare(wanted: list[np.ndarray], known: list[np.ndarray], name: str, shares: tuple[float, ...]) -> dict[str, Any]:
    """Misses per token, summed over layers, of every rule at every share of slots.

    wanted, known: bool (tokens, units) of each layer, on held-out and on calibration text.
    """
    sets = [[np.flatnonzero(row) for row in mask] for mask in wanted]
    units = wanted[0].shape[1]
    rules = even_rules(units, known)
    rest = everyone_but(known)
    rest_sets, rest_known = [sets[i] for i in rest], [known[i] for i in rest]
    found: dict[str, list[list[float]]] = {}  # rule -> a row of layers for every share
    with tqdm(total=len(shares) * (len(rules) + 4), desc=f"caches, by {name}", dynamic_ncols=True) as bar:
        for share in shares:
            slots = max(1, round(share * units))
            for rule, make in rules.items():
                rows = [policies.run(make(i, slots), each) for i, each in enumerate(sets)]
                found.setdefault(rule, []).append(per_token(rows))
                bar.update()
            found.setdefault(f"fading {HALF_LIFE}, slots by need", []).append(uneven(sets, known, units, slots))
            bar.update()
            found.setdefault(WITHOUT, []).append(uneven(rest_sets, rest_known, units, slots))
            bar.update()
            found.setdefault("fading, one pool of slots", []).append(per_token(pooled(sets, units, slots)))
            bar.update()
            rows = [policies.clairvoyant(mask, slots) for mask in wanted]
            found.setdefault("clairvoyant", []).append(per_token(rows))
            bar.update()
    needed = sum(per_token([mask.sum(axis=1) for mask in wanted]))
    return {"shares": shares, "units": units, "needed": needed, "misses_by_layer": found, "rest": rest}


def even_rules(units: int, known: list[np.ndarray]) -> dict[str, Make]:
    """Rules with the same number of slots in every layer, by name. The others are compared with the first."""
    rules: dict[str, Make] = {"least recent": lambda _, slots: policies.least_recent(units, slots)}
    for k in WINDOWS:
        rules[f"window {k}"] = lambda _, slots, k=k: SlotCache(units, slots, k)  # type: ignore[misc]
    for half in HALF_LIVES:
        name = "frequency, never fading" if half == policies.ENDLESS else f"fading {half}"
        rules[name] = lambda _, slots, half=half: policies.fading(units, slots, half)  # type: ignore[misc]
    for part in PINNED:
        rules[f"{part:.0%} pinned"] = lambda layer, slots, part=part: policies.Pinned(  # type: ignore[misc]
            units, slots, policies.hottest(known[layer], int(part * slots))
        )
    return rules


def uneven(sets: list[list[np.ndarray]], known: list[np.ndarray], units: int, slots: int) -> list[float]:
    """Misses when the total of `slots` per layer is distributed by the layers' needs on calibration text."""
    need = [max(1e-3, float(mask.mean())) for mask in known]
    by_need = distribute_slots(slots * len(sets), need, min(MIN_SLOTS, slots), units)
    return per_token([policies.run(SlotCache(units, n), each) for n, each in zip(by_need, sets, strict=True)])


def everyone_but(known: list[np.ndarray]) -> list[int]:
    """All layers without the one that needs most, because it may dominate the sum. A single layer stays."""
    most = int(np.argmax([mask.mean() for mask in known]))
    return [i for i in range(len(known)) if i != most] or [most]


def pooled(sets: list[list[np.ndarray]], units: int, slots: int) -> list[np.ndarray]:
    """Misses of every token, by layer, with one cache for all layers of the same total size."""
    cache = policies.fading(units * len(sets), slots * len(sets), HALF_LIFE * len(sets))
    rows = [
        [policies.step(cache, wanted + i * units) for i, wanted in enumerate(token)]
        for token in zip(*sets, strict=True)
    ]
    return list(np.array(list(rows)).T)


def per_token(rows: list[np.ndarray]) -> list[float]:
    """Means after the warm-up, by layer. rows: int (tokens,) for each layer."""
    return [float(row[min(WARM_UP, len(row) // 2) :].mean()) for row in rows]


def show(result: dict[str, Any]) -> None:
    for layer, habits in enumerate(result.get("habits_by_layer", [])):
        print(
            f"layer {layer}: the next token reuses {habits['again']:.1%} of the experts "
            f"({habits['again_by_chance']:.1%} by popularity alone); the busiest quarter gets {habits['busiest']:.1%}"
        )
    for unit, part in result["units"].items():
        show_unit(part, unit, result["neurons_per_block"])


def show_unit(part: dict[str, Any], unit: str, count: int) -> None:
    kinds = {"block": "blocks, as the engine reads them", "neuron": "single neurons", "expert": "experts"}
    what = kinds[unit]
    size = f" of {count} neurons" if unit == "block" else ""
    print(
        f"\n{what}{size}: {part['needed']:.0f} needed per token\n"
        "misses per token; the other rules relative to least recent"
    )
    print(f"{'':<46}" + "".join(f"{share:>9.0%}" for share in part["shares"]))
    totals = {rule: np.sum(rows, axis=1) for rule, rows in part["misses_by_layer"].items()}
    first = totals["least recent"]
    rest_first = np.array(list(part["misses_by_layer"]["least recent"]))[:, part["rest"]].sum(axis=1)
    print(f"{'least recent':<46}" + "".join(f"{value:>9.1f}" for value in first))
    for rule, values in totals.items():
        if rule != "least recent":
            against = rest_first if rule == WITHOUT else first
            print(f"{rule:<46}" + "".join(f"{value:>+9.1%}" for value in values / np.maximum(against, 1e-9) - 1))


def draw(figure: Any, parts: dict[str, Any]) -> None:
    """Draws misses over needed units, by share of slots, for the rules that matter."""
    lines = {
        "window 4": (COLOURS["other"], "-"),
        "least recent": (SERIES[4], "-"),
        f"fading {HALF_LIFE}": (COLOURS["ours"], "-"),
        f"fading {HALF_LIFE}, slots by need": (COLOURS["good"], "-"),
        "clairvoyant": (COLOURS["ceiling"], ":"),
    }
    names = {"clairvoyant": "clairvoyant, even slots"}
    panels = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    for axes, (unit, part) in zip(panels, parts.items(), strict=True):
        for rule, (colour, style) in lines.items():
            shares = np.sum(part["misses_by_layer"][rule], axis=1) / part["needed"]
            axes.plot(part["shares"], shares, style, color=colour, label=names.get(rule, rule), marker="o", ms=3)
        axes.set_title(f"read {unit} by {unit}")
        axes.set_xlabel(f"share of the {'experts' if unit == 'expert' else 'neurons'} that have a slot")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("misses, of what a token needs")
    panels[-1].legend(loc="upper right")
