"""The state of the engine's caches: which units of each layer are resident, and which were hit or read since then."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np

from ..flash.layer_ring import LayerMap
from ..flash.slot_cache import EventLog, SlotCache

MOST_BINS = 64  # maximum bins per layer; neighbouring units share one


class CacheWatch:
    """Watches the caches of a loaded model. Except for `resident`, use it only in the thread that runs the model.

    Until `watch(True)`, nothing is recorded and it costs nothing.
    """

    def __init__(self, model: Any) -> None:
        self.caches: list[SlotCache | LayerMap] = [layer.units.cache for layer in model.flash.layers]
        self.watching = False

    @property
    def slots(self) -> list[int]:
        """The number of slots of each layer."""
        return [cache.slots for cache in self.caches]

    @property
    def resident(self) -> list[int]:
        """The number of units in slots, of each layer."""
        return [cache.resident for cache in self.caches]

    def watch(self, on: bool) -> None:
        """Starts or stops recording uses and reads."""
        if on != self.watching:
            self.watching = on
            for cache in self.caches:
                cache.event_log = EventLog() if on else None

    def forget(self) -> None:
        """Drops the records so far."""
        for cache in self.caches:
            if cache.event_log is not None:
                cache.event_log = EventLog()

    def layers(self) -> list[list[str]]:
        """[resident, hit, read] of each layer since the last call, each in base64, one uint8 per bin (see `binned`)."""
        return [[_packed(mask) for mask in self._masks(cache)] for cache in self.caches]

    def _masks(self, cache: SlotCache | LayerMap) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Three masks, bool (units,) each: in a slot now; used from a slot (hit); read."""
        used, read = (np.zeros(len(cache.slot_of), np.bool_) for _ in range(2))
        if cache.event_log is not None:
            log, cache.event_log = cache.event_log, EventLog()
            for units in log.used:
                used[units] = True
            for units in log.read:
                read[units] = True
        return cache.slot_of >= 0, used & ~read, read


def binned(mask: np.ndarray) -> np.ndarray:
    """The share of set units in each bin of neighbouring units: bool (units,) -> uint8 (min(units, MOST_BINS),).

    255 means all; at least 1 if any is set.
    """
    units = len(mask)
    bins = min(units, MOST_BINS)
    bin_of = np.arange(units) * bins // units
    most = np.bincount(bin_of, minlength=bins)
    set_ = np.bincount(bin_of[mask], minlength=bins)
    return np.ceil(255 * set_ / most).astype(np.uint8)


def _packed(mask: np.ndarray) -> str:
    return base64.b64encode(binned(mask).tobytes()).decode()
