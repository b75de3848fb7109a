"""How early can a layer's experts be guessed? Applies its router to earlier hidden states and models the time saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.errors import UsageError

from . import neurons_ahead, routing, traces
from .neurons_ahead import STATES, Remember, layer_rows, means, residents

SHARES = (0.25, 0.5)  # slots / experts of a layer
WIDTHS = (-3, -2, -1, 0, 2, 4)  # experts guessed - experts used by a token
ROUTED = "previous router's"  # the input of the previous layer's router, with that layer's norm
OWN = "own router's"
RATIOS = (0.5, 1, 2, 3.3, 6.7)  # time to read all experts that a token uses in a layer / the layer's compute
PRODUCTS = 0.5  # the experts' products / a layer's compute; the rest is attention
WINDOWS = {"own input": 1 - PRODUCTS, "previous middle": 1.0}  # time from guess to router / a layer's compute


def measure(traced: traces.TracedModel, text: Path) -> dict[str, Any]:
    """Runs `lookahead` on a mixture of experts."""
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
    """The earlier states as inputs of a layer's router, by layer and state. Raises UsageError as `observe` does."""
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
    """Raises UsageError if the recorded router inputs do not lead to the experts that the routers chose."""
    for tap in taps:
        same = (tap.ranks(OWN) < tap.choices) & tap.trace.chosen
        if same.sum() < 0.98 * tap.trace.chosen.sum():
            raise UsageError(
                f"layer {tap.trace.layer} chooses other experts than the largest outputs of its router on the normed "
                "state before it; look-ahead is not measured on such a mixture."
            )


def guesses_of(tap: routing.RouterTap, state: str) -> list[list[np.ndarray]]:
    """The mask of the guessed experts for every width, packed as `traces.packed` does."""
    ranks = tap.ranks(state)
    return [[np.packbits(ranks < max(1, tap.choices + width), axis=1)] for width in WIDTHS]


def times(taps: list[routing.RouterTap], share: float) -> list[dict[str, Any]]:
    """A token's modelled time without a guess, with a guess and with a perfect guess. Unit: one layer's compute.

    A layer computes for 1: attention, then the products of its experts. As in the engine, resident experts are
    multiplied while the others are read. A guess is read in its window, from when it is known until the router's
    choice, whenever the layer before reads nothing; the likeliest experts come first. The reads that do not fit into
    the window precede the layer's own misses.

    A width reads all of its guess. `fitting` reads only as many experts as fit into the window at best, and at least
    one. Unused reads go into slots of their own. The first layer never guesses and is not counted.
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
                    each = ratio / tap.choices  # time to read one expert
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
                    # A guess from "own input" begins after the layer before has finished its reads.
                    busy = np.minimum(late + left, here) * (state == "previous middle")
            found.append(row)
    return found


def first(ranks: np.ndarray, absent: np.ndarray, count: int, width: int) -> np.ndarray:
    """The first `count` absent experts of the `width` likeliest. int (T, E), bool (T, E) -> bool (T, E)"""
    order = np.argsort(ranks, axis=1)[:, :width]
    missing = np.take_along_axis(absent, order, axis=1)
    result = np.zeros_like(absent)
    np.put_along_axis(result, order, missing & (missing.cumsum(axis=1) <= count), axis=1)
    return result


def show(result: dict[str, Any]) -> None:
    neurons_ahead.show(result)
    at = [row for row in result["by_layer"] if row["slots"] == SHARES[0] and row["state"] != "own input"]
    print("\nrecall by layer of a guess as wide as the router's choice, and of one with 2 and 4 more")
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
    print(
        "\nmodelled time of a token, relative to no guess\n"
        "ratio: time to read all experts that a token uses in a layer / the layer's compute"
    )
    print(
        f"{'slots':>6}{'ratio':>7}  {'guess from':<17}{'perfect':>9}{'fitting':>9}"
        + "".join(f"{w:>+9}" for w in WIDTHS)
    )
    for row in result["times"]:
        cells = [row[name] for name in ("perfect", "fitting", *map(str, WIDTHS))]
        print(f"{row['slots']:>6.0%}{row['ratio']:>7g}  {row['state']:<17}", end="")
        print("".join(f"{value / row['without'] - 1:>+9.1%}" for value in cells))
