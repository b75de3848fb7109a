"""The only changes that contenders make to the engine's internals: what slots keep between calls."""

from __future__ import annotations

from typing import Any

import numpy as np

from mlx_flash.flash.experts import ExpertSlots
from mlx_flash.flash.slot_cache import SlotCache


def keep_nothing_between_calls(model: Any, window: int | None) -> None:
    """Empties every layer's slots before each call. window: as in `mlx_flash.load`."""
    for layer in model.flash.layers:
        cache = layer.units.cache
        layer.units.cache = EmptiedCache(layer.units.count, cache.slots, window)


def empty_slots(slots: ExpertSlots) -> None:
    """Empties the slots of a layer of experts."""
    slots.cache = SlotCache(slots.count, slots.cache.slots)


class EmptiedCache(SlotCache):
    """A cache that keeps nothing between calls, so that each call reads everything it needs."""

    def mark_used(self, units: np.ndarray) -> int:
        self.slot_of[:] = self.unit_of[:] = -1
        self.resident = 0
        return super().mark_used(units)
