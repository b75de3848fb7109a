"""How early can a layer's neurons be guessed? Applies its predictor to earlier hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.errors import UsageError
from mlx_flash.flash.slot_cache import SlotCache
from mlx_flash.layers.predictors import ExactPredictor, Predictor

from . import traces
from .tools.report import SERIES

SHARES = (0.25, 0.10)  # slots / neurons of a layer
SHIFTS = (-0.25, 0.0, 0.25, 0.5)  # added to the guess's threshold, in standard deviations of the layer's score
STATES = {
    "own input": "what enters the layer, before its attention",
    "previous middle": "what the layer before has between its attention and its FFN",
    "previous input": "what enters the layer before",
}


def measure(traced: traces.TracedModel, text: Path) -> dict[str, Any]:
    """Runs `lookahead` on a store."""
    layout, guesses = traced.model.flash.manifest.layout, observe(traced.model)
    history = traces.record(traced.model, traced.ids, traced.prefix, "decoding")
    result: dict[str, Any] = {**traces.head_of(traced, text), "states": STATES}
    jobs = [
        (trace, {state: each for state, each in guesses[trace.layer].rows.items() if each}, share)
        for trace in history
        for share in SHARES
    ]
    units = {"neuron": 1} | ({"block": layout.neurons_per_block} if layout.neurons_per_block > 1 else {})
    result["by_layer"] = []
    for trace, rows, share in tqdm(jobs, desc="caches", dynamic_ncols=True):
        result["by_layer"] += layer_rows(trace, rows, share, units, SHIFTS)
    result["mean"] = means(result["by_layer"])
    return result


# -- guessing ------------------------------------------------------------------------------------------------


class Remember:
    """Wraps a norm and keeps its last input."""

    def __init__(self, norm: Any) -> None:
        self.norm = norm
        self.seen: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        self.seen = x
        return self.norm(x)


class Guesser:
    """Wraps a predictor and also applies it to earlier states. `rows` holds packed masks by state and shift.

    The unit of a shift is the standard deviation of the layer's scores in the first call, over neurons and tokens.
    """

    def __init__(self, inner: Predictor, norm: Any, states: dict[str, Remember]) -> None:
        self.inner, self.norm, self.states = inner, norm, states
        self.deviation: mx.array | None = None
        self.rows: dict[str, list[list[np.ndarray]]] = {state: [[] for _ in SHIFTS] for state in states}

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        if self.deviation is None:
            self.deviation = score(self.inner, x).std()
        for state, remembered in self.states.items():
            assert remembered.seen is not None
            early = score(self.inner, self.norm(remembered.seen).reshape(x.shape))
            masks = [early > shift * self.deviation for shift in SHIFTS]
            mx.eval(masks)
            for rows, mask in zip(self.rows[state], masks, strict=True):
                rows.append(traces.packed(mask))
        return self.inner(x)


def score(predictor: Any, x: mx.array) -> mx.array:
    """The scores that a predictor compares with zero. x: (N, D) -> (N, F)"""
    if isinstance(predictor, ExactPredictor):
        return predictor.before(x) - predictor.activation.threshold
    return predictor.score(x)


def observe(model: Any) -> dict[int, Guesser]:
    """Puts a Guesser in front of every predictor. Raises UsageError if a layer has no norm before its parts."""
    guessers: dict[int, Guesser] = {}
    before: dict[str, Remember] = {}
    for index, layer in enumerate(model.layers):
        if not getattr(layer, "norm_before", False):
            raise UsageError("look-ahead is only measured on models with norms before attention and FFN.")
        own, norm = Remember(layer.self_attn_layer_norm), layer.final_layer_norm
        layer.self_attn_layer_norm, layer.final_layer_norm = own, Remember(norm)
        if layer.mlp.predictor is not None:
            guessers[index] = Guesser(layer.mlp.predictor, norm, {"own input": own, **before})
            layer.mlp.predictor = guessers[index]
        before = {"previous middle": layer.final_layer_norm, "previous input": own}
    return guessers


# -- the value of the guesses --------------------------------------------------------------------------------


def layer_rows(
    trace: traces.LayerTrace,
    guesses: dict[str, list[list[np.ndarray]]],
    share: float,
    units: dict[str, int],
    shifts: tuple[float, ...],
) -> list[dict[str, Any]]:
    """A row for every unit, state and shift. units: name -> neurons per unit."""
    found = []
    for unit, count in units.items():
        chosen = traces.by_block(trace.chosen, count)
        slots = max(1, round(share * chosen.shape[1]))
        resident = residents(chosen, slots)
        for state, by_shift in guesses.items():
            for shift, packed in zip(shifts, by_shift, strict=True):
                guess = traces.by_block(traces.unpacked(packed, trace.neurons), count)
                row = {"layer": trace.layer, "unit": unit, "slots": share, "state": state, "shift": shift}
                found.append(row | compare(chosen, guess, resident))
    return found


def residents(chosen: np.ndarray, slots: int) -> np.ndarray:
    """The units with a slot before each token, in the engine's cache. bool (T, U) -> bool (T, U)"""
    cache = SlotCache(chosen.shape[1], slots)
    held = np.zeros_like(chosen)
    for token, mask in enumerate(chosen):
        held[token] = cache.slot_of >= 0
        units = np.flatnonzero(mask)
        cache.mark_used(units)
        for begin in range(0, len(units), slots):
            cache.commit(*cache.reserve(units[begin : begin + slots]))
    return held


def compare(chosen: np.ndarray, guess: np.ndarray, resident: np.ndarray) -> dict[str, float]:
    """Units per token: chosen, guessed, missed, caught by the guess, or read and not used. Masks: bool (T, U)."""
    read = guess & ~resident
    counts = {
        "chosen": chosen,
        "guessed": guess,
        "both": guess & chosen,
        "missed": chosen & ~resident,
        "caught": read & chosen,
        "in_vain": read & ~chosen,
    }
    return {name: float(mask.sum() / len(mask)) for name, mask in counts.items()}


def means(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows over all layers together. The first layer has no layer before it, so it gets a row of its own."""
    groups: dict[tuple[str, float, str, float], list[dict[str, Any]]] = {}
    first = min(row["layer"] for row in rows)
    for row in rows:
        state = f"{row['state']}, layer {first}" if row["layer"] == first else row["state"]
        groups.setdefault((row["unit"], row["slots"], state, row["shift"]), []).append(row)
    found = []
    for (unit, slots, state, shift), members in groups.items():
        total = {name: sum(m[name] for m in members) for name in ("chosen", "guessed", "both", "missed", "caught")}
        in_vain = sum(m["in_vain"] for m in members)
        found.append(
            {"unit": unit, "slots": slots, "state": state, "shift": shift}
            | {"recall": total["both"] / max(total["chosen"], 1e-9)}
            | {"size": total["guessed"] / max(total["chosen"], 1e-9)}
            | {"missed_share": total["missed"] / max(total["chosen"], 1e-9)}
            | {"caught": total["caught"] / max(total["missed"], 1e-9), "in_vain": in_vain / max(total["missed"], 1e-9)}
        )
    return found


# -- showing -------------------------------------------------------------------------------------------------


def show(result: dict[str, Any]) -> None:
    print("recall, size and missed: shares of the chosen units; caught and unused: shares of the missed units")
    print(f"{'unit':<8}{'slots':>6}  {'guess from':<24}{'shift':>6}", end="")
    print("".join(f"{head:>9}" for head in ("recall", "size", "missed", "caught", "unused")))
    for row in result["mean"]:
        cells = (f"{row[key]:.1%}" for key in ("recall", "size", "missed_share", "caught", "in_vain"))
        print(f"{row['unit']:<8}{row['slots']:>6.0%}  {row['state']:<24}{row['shift']:>6}", end="")
        print("".join(f"{cell:>9}" for cell in cells))


def draw(figure: Any, rows: list[dict[str, Any]], shares: tuple[float, ...]) -> None:
    """Draws misses caught against unused bytes: a panel for every share of slots, a line for every state."""
    unit = "expert" if rows[0]["unit"] == "expert" else "neuron"
    panels = figure.subplots(1, len(shares), sharey=True)
    for axes, share in zip(panels, shares, strict=True):
        for colour, state in zip(SERIES, STATES, strict=False):
            line = [r for r in rows if r["unit"] == unit and r["slots"] == share and r["state"] == state]
            axes.plot([r["in_vain"] for r in line], [r["caught"] for r in line], "o-", color=colour, label=state, ms=4)
        axes.set_title(f"{share:.0%} of the {unit}s have a slot")
        axes.set_xlabel("unused bytes read / bytes missing")
        axes.set_xlim(left=0)
        axes.set_ylim(0, 1)
        axes.grid(alpha=0.25)
    panels[0].set_ylabel("share of the misses that the guess catches")
    panels[0].yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
    panels[-1].legend(title="guess from", loc="lower right")
