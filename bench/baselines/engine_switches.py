"""The contenders' only reach into the engine: look-ahead, what slots keep, and when products start."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from mlx_flash.flash.experts import ExpertSlots
from mlx_flash.flash.slot_cache import SlotCache
from mlx_flash.layers.experts import StreamedExperts
from mlx_flash.layers.lookahead_trial import LookAheadTrial

LookAheadMode = Literal["tried", "always", "never"]
NO_TRIAL = 2**62  # tokens before the first trial


def set_look_ahead(model: Any, mode: LookAheadMode) -> None:
    """Says when a layer guesses what the next one needs. "tried": the engine finds out whether guessing pays."""
    for layer in model.flash.layers:
        if mode == "never":
            layer.ahead = None
        elif mode == "always" and layer.ahead is not None:
            layer.ahead.trial = LookAheadTrial(warm_up=NO_TRIAL)


def keep_nothing_between_calls(model: Any, window: int | None) -> None:
    """Empties every layer's slots before each call. window: as in `mlx_flash.load`."""
    for layer in model.flash.layers:
        cache = layer.units.cache
        layer.units.cache = EmptiedCache(len(cache.slot_of), cache.slots, window)


def empty_slots(slots: ExpertSlots) -> None:
    """Lets the slots of a layer of experts begin anew."""
    slots.cache = SlotCache(slots.experts, slots.cache.slots)


class EmptiedCache(SlotCache):
    """Slots that keep nothing from one call to the next: each call reads all that it needs."""

    def tick(self, units: np.ndarray) -> int:
        self.slot_of[:] = self.unit_of[:] = -1
        self.resident = 0
        return super().tick(units)


def read_before_products(model: Any) -> None:
    """Makes every layer of experts read what it lacks before it multiplies, where its slots allow that."""
    for layer in model.flash.layers:
        _read_all_first(layer)


def _read_all_first(layer: StreamedExperts) -> None:
    rounds, cache = layer.rounds, layer.units.cache
    layer.rounds = (  # type: ignore[method-assign]
        lambda experts, pairs: [experts] if len(experts) <= cache.slots else rounds(experts, pairs)
    )
