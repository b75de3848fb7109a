"""What the engine looks like now: which units of each layer are resident, which a token hit and which it read."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from ..flash.slot_cache import EventLog, SlotCache

MOST_BINS = 64  # of a layer; neighbouring units share one


class CacheWatch:
    """Watches the caches of a loaded model. All but `resident` belongs to the thread that runs the model.

    Nothing is recorded, and nothing is spent, until `watch(True)`.
    """

    def __init__(self, model: Any) -> None:
        self.caches: list[SlotCache] = [layer.units.cache for layer in model.flash.layers]
        self.watching = False

    @property
    def slots(self) -> list[int]:
        """Of each layer."""
        return [cache.slots for cache in self.caches]

    @property
    def resident(self) -> list[int]:
        """Units in slots, of each layer."""
        return [cache.resident for cache in self.caches]

    def watch(self, on: bool) -> None:
        """From now on, uses and reads are recorded, or no more."""
        if on != self.watching:
            self.watching = on
            for cache in self.caches:
                cache.event_log = EventLog() if on else None

    def forget(self) -> None:
        """Drops what was recorded so far."""
        for cache in self.caches:
            if cache.event_log is not None:
                cache.event_log = EventLog()

    def layers(self) -> list[list[str]]:
        """Per layer [resident, hit, read] since the last call, each base64 of a uint8 for every bin (`binned`)."""
        return [[_packed(mask) for mask in self._masks(cache)] for cache in self.caches]

    def _masks(self, cache: SlotCache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Bool (units,) each: in a slot now; used without having been read for it; read."""
        used, read = (np.zeros(len(cache.slot_of), np.bool_) for _ in range(2))
        if cache.event_log is not None:
            log, cache.event_log = cache.event_log, EventLog()
            for units in log.used:
                used[units] = True
            for units in log.read:
                read[units] = True
        return cache.slot_of >= 0, used & ~read, read


def binned(mask: np.ndarray) -> np.ndarray:
    """Shares of neighbouring units: bool (units,) -> uint8 (min(units, MOST_BINS),); 255 is all, any is at least 1."""
    units = len(mask)
    bins = min(units, MOST_BINS)
    bin_of = np.arange(units) * bins // units
    most = np.bincount(bin_of, minlength=bins)
    set_ = np.bincount(bin_of[mask], minlength=bins)
    return np.ceil(255 * set_ / most).astype(np.uint8)


def _packed(mask: np.ndarray) -> str:
    return base64.b64encode(binned(mask).tobytes()).decode()
