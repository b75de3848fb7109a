"""Fills slots at load with the units that earlier runs used most, and keeps the uses of this run for the next one.

The text does not depend on it: it decides only which units are in memory before a call needs them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from ..flash.filling import fill
from ..flash.units import Units
from ..source.kept_uses import KeptUses, Uses

LONGEST_S = 5.0  # no further part is read after that time
PARTS = 16  # the most used units of all layers come first
REMEMBERED = 0.03  # weight of the kept uses beside new ones (bench/results/warm-start.md)
NEWEST = 0.25  # weight of the uses at the end of an answer, beside those that were kept before
BETWEEN_WRITES_S = 600.0


class WarmStart:
    """The uses of a loaded model's units.

    layers: those whose units are read. kept: where the uses are kept. clock: in seconds.
    """

    def __init__(self, layers: Sequence[Units], kept: KeptUses, clock: Callable[[], float] = time.monotonic) -> None:
        self._layers, self._kept, self._clock = list(layers), kept, clock
        self._uses: Uses = kept.read() or [np.zeros(units.count, np.float16) for units in layers]
        self._calls = [units.cache.clock for units in layers]
        self._written = clock()
        self._changed = False

    def hottest(self) -> list[tuple[Units, np.ndarray]]:
        """The units to read, the most used ones of a layer first: as many as it has empty slots."""
        found = []
        for units, uses in zip(self._layers, self._uses, strict=True):
            missing = np.flatnonzero((uses > 0) & (units.slot_of < 0))
            order = np.argsort(-uses[missing], kind="stable")[: units.cache.free]
            if len(order):
                found.append((units, missing[order]))
        return found

    def fill(self, progress: Callable[[int], None] = lambda _: None) -> None:
        """Fills slots with the hottest units, part by part, for LONGEST_S at most and the part that ends after that.

        The units' scores begin with the uses, so that a prompt does not evict the hottest ones first. progress: called
        with the bytes of each step. Raises ReadError.
        """
        began, wanted = self._clock(), self.hottest()
        for units, uses in zip(self._layers, self._uses, strict=True):
            units.cache.begin_with(REMEMBERED * uses.astype(np.float32))
        for part in range(PARTS):
            if self._clock() - began >= LONGEST_S:
                return
            fill([(units, ids[_share(len(ids), part) : _share(len(ids), part + 1)]) for units, ids in wanted], progress)

    def answered(self) -> None:
        """Takes the uses of an answer into account, and keeps them from time to time."""
        for number, units in enumerate(self._layers):
            cache = units.cache
            if cache.clock == self._calls[number] or cache.window is not None:
                continue  # Nothing was looked up, or a window does not count uses.
            before, now = self._uses[number].astype(np.float32), cache.uses()
            merged = now if not before.any() else before + NEWEST * (now - before)
            self._uses[number] = merged.astype(np.float16)
            self._calls[number], self._changed = cache.clock, True
        if self._changed and self._clock() - self._written >= BETWEEN_WRITES_S:
            self._write()

    def close(self) -> None:
        """Keeps the uses. May be called again."""
        self.answered()
        if self._changed:
            self._write()

    def _write(self) -> None:
        self._kept.write(self._uses)
        self._written, self._changed = self._clock(), False


def _share(count: int, part: int) -> int:
    return count * part // PARTS
