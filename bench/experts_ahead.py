"""How early can a layer's experts be guessed: its own router applied to earlier hidden states; and what that saves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.errors import UsageError

from . import neurons_ahead, routing, traces
from .neurons_ahead import STATES, Remember, layer_rows, means, residents

SHARES = (0.25, 0.5)  # of a layer's experts that have a slot
WIDTHS = (-3, -2, -1, 0, 2, 4)  # experts that are guessed, beyond those that a token uses
ROUTED = "previous router's"  # what the layer before gave its own router, so with its own norm
OWN = "own router's"
RATIOS = (0.5, 1, 2, 3.3, 6.7)  # time to read all experts that a token uses in a layer, over the layer's compute
PRODUCTS = 0.5  # of a layer's compute is the products of its experts, the rest attention
WINDOWS = {"own input": 1 - PRODUCTS, "previous middle": 1.0}  # of a layer's compute, from guess to router


def measure(traced: traces.TracedModel, text: Path) -> dict[str, Any]:
    """What `lookahead` finds of a mixture of experts."""
    taps = routing.record(traced.model, traced.ids, traced.prefix, "decoding", router_states(traced.model))
    check_routers(taps)
    states = {state: text.replace("FFN", "experts") for state, text in STATES.items()}
    result: dict[str, Any] = {**traces.head_of(traced, text), "states": states}
    result["by_layer"] = []
    for share in SHARES:
        for tap in taps:
            guesses = {state: guesses_of(tap, state) for state in tap.states if state != OWN}
            result["by_layer"] += layer_rows(tap.trace, guesses, share, {"expert": 1}, WIDTHS)
    result["mean"] = means(result["by_layer"])
    result["times"] = [row for share in SHARES for row in times(taps, share)]
    return result


def router_states(model: Any) -> dict[int, dict[str, routing.State]]:
    """What earlier states are to a layer's router: by layer and state. Raises UsageError as `observe` does."""
    found: dict[int, dict[str, routing.State]] = {}
    before: dict[str, Remember] = {}
    for place in routing.places(model):
        layer = place.layer
        if not all(hasattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm")):
            raise UsageError(
                "look-ahead is measured on mixtures with an `input_layernorm` before attention and a "
                f"`post_attention_layernorm` before the experts; {type(layer).__name__} has none."
            )
        own, middle = Remember(layer.input_layernorm), Remember(layer.post_attention_layernorm)
        layer.input_layernorm, layer.post_attention_layernorm = own, middle
        seen = {OWN: middle, "own input": own, **before}
        found[place.index] = {state: through(middle.norm, remembered) for state, remembered in seen.items()}
        if before:
            found[place.index][ROUTED] = through(before["previous middle"].norm, before["previous middle"])
        before = {"previous middle": middle, "previous input": own}
    if not found:
        raise UsageError("this model streams no experts.")
    return found


def through(norm: Any, remembered: Remember) -> routing.State:
    def state() -> mx.array:
        assert remembered.seen is not None
        normed: mx.array = norm(remembered.seen)
        return normed

    return state


def check_routers(taps: list[routing.RouterTap]) -> None:
    """Raises UsageError if the routers do not choose what their input, as it is taken here, says."""
    for tap in taps:
        same = (tap.ranks(OWN) < tap.choices) & tap.trace.chosen
        if same.sum() < 0.98 * tap.trace.chosen.sum():
            raise UsageError(
                f"layer {tap.trace.layer} chooses other experts than the largest outputs of its router on the normed "
                "state before it; look-ahead is not measured on such a mixture."
            )


def guesses_of(tap: routing.RouterTap, state: str) -> list[list[np.ndarray]]:
    """For every width, the mask of what is guessed, as `traces.packed` packs it."""
    ranks = tap.ranks(state)
    return [[np.packbits(ranks < max(1, tap.choices + width), axis=1)] for width in WIDTHS]


def times(taps: list[routing.RouterTap], share: float) -> list[dict[str, Any]]:
    """A token's modelled time without a guess, with one, and with one that is always right, in layers' compute.

    A layer computes for 1: attention, then the products of its experts. As in the engine, those that are here are
    multiplied while the others are read. A guess is read, the likeliest first, from when it is known until the router
    speaks, whenever the layer before reads nothing; what does not fit in there comes before the layer's own misses. By
    width: all of a guess is read. `fitting`: only as many as fit in there at best, or one. What is read in vain goes
    into slots of its own. The first layer never guesses, and is not counted.
    """
    layers = []
    for tap in taps:
        resident = residents(tap.trace.chosen, max(1, round(share * tap.trace.neurons)))
        layers.append((tap, tap.trace.chosen & ~resident, ~resident))
    found = []
    for ratio in RATIOS:
        for state, window in WINDOWS.items():
            row: dict[str, Any] = {"slots": share, "ratio": ratio, "state": state}
            for name in ("without", "perfect", "fitting", *map(str, WIDTHS)):
                row[name], busy = 0.0, np.zeros(len(layers[0][1]))
                for at, (tap, missed, absent) in enumerate(layers):
                    each = ratio / tap.choices  # one expert's reading
                    read = np.zeros_like(missed)
                    if at and name == "perfect":
                        read = missed
                    elif at and name == "fitting":
                        read = first(tap.ranks(state), absent, max(1, int(window / each)), tap.choices + WIDTHS[-1])
                    elif at and name != "without":
                        read = (tap.ranks(state) < max(1, tap.choices + int(name))) & absent
                    left = each * (missed & ~read).sum(axis=1)
                    here = PRODUCTS * (1 - left / ratio)
                    late = np.maximum(0, each * read.sum(axis=1) - np.maximum(0, window - busy))
                    if at:
                        row[name] += float((1 + np.maximum(0, late + left - here)).mean())
                    busy = np.minimum(late + left, here) * (state == "previous middle")  # own input: it is over by then
            found.append(row)
    return found


def first(ranks: np.ndarray, absent: np.ndarray, count: int, width: int) -> np.ndarray:
    """Of the `width` likeliest, the first `count` that are absent. int (T, E), bool (T, E) -> bool (T, E)"""
    order = np.argsort(ranks, axis=1)[:, :width]
    missing = np.take_along_axis(absent, order, axis=1)
    result = np.zeros_like(absent)
    np.put_along_axis(result, order, missing & (missing.cumsum(axis=1) <= count), axis=1)
    return result


def show(result: dict[str, Any]) -> None:
    neurons_ahead.show(result)
    at = [row for row in result["by_layer"] if row["slots"] == SHARES[0] and row["state"] != "own input"]
    print("\nby layer, recall of a guess as wide as the choice, and with 2 and 4 more")
    for layer in sorted({row["layer"] for row in at}):
        cells = [
            f"{state} "
            + " / ".join(
                f"{row['both'] / row['chosen']:.1%}"
                for row in at
                if (row["layer"], row["state"]) == (layer, state) and row["shift"] in (0, 2, 4)
            )
            for state in dict.fromkeys(row["state"] for row in at)
        ]
        print(f"layer {layer}: " + ";  ".join(cells))
    print("\nmodelled time of a token against no guess; ratio: reading all that a token uses over a layer's compute")
    print(
        f"{'slots':>6}{'ratio':>7}  {'guess from':<17}{'perfect':>9}{'fitting':>9}"
        + "".join(f"{w:>+9}" for w in WIDTHS)
    )
    for row in result["times"]:
        cells = [row[name] for name in ("perfect", "fitting", *map(str, WIDTHS))]
        print(f"{row['slots']:>6.0%}{row['ratio']:>7g}  {row['state']:<17}", end="")
        print("".join(f"{value / row['without'] - 1:>+9.1%}" for value in cells))
