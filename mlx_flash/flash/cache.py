"""Which unit sits in which slot: the book-keeping of one layer's cache, without any bytes.

The paper (section 3.3) keeps the active rows contiguous and moves the tail into holes; here a unit stays in
its slot until another takes it, and the layer gathers by slot number. Nothing is ever moved.
"""

from __future__ import annotations

import numpy as np


class SlotCache:
    """An id-to-slot map with eviction by least-recent use, or by a sliding window.

    units: how many units the layer has; slots: how many fit; window: None for least-recent use, or k: units
    used within the last k calls are kept (paper, section 3.2), all older ones go in order of their slot.
    """

    def __init__(self, units: int, slots: int, window: int | None = None) -> None:
        if not slots >= 0:
            raise ValueError(f"expected slots >= 0, got {slots}")
        self.window = window
        self.slots = min(slots, units)
        self.slot_of = np.full(units, -1, np.int32)
        self.unit_of = np.full(self.slots, -1, np.int32)
        self.last_used = np.full(self.slots, -1, np.int64)
        self.clock = 0
        self.resident = 0  # how many slots are taken

    @property
    def free(self) -> int:
        return self.slots - self.resident

    def tick(self, units: np.ndarray) -> int:
        """Begins a token that needs `units` (unique ids): marks those that are here. Returns their number."""
        self.clock += 1
        slots = self.slot_of[units]
        here = slots[slots >= 0]
        self.last_used[here] = self.clock
        return len(here)

    def reserve(self, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Makes room for `units` (unique ids, at most `slots` of them).

        Returns the missing units and the slots they shall be read into, both int32; those slots are empty
        until `commit`. None of `units` that is here is evicted.
        """
        missing = units[self.slot_of[units] < 0]
        if not len(missing):
            return missing, np.empty(0, np.int32)
        targets = self._victims(len(missing), keep=self.slot_of[units])
        old = self.unit_of[targets]
        old = old[old >= 0]
        self.slot_of[old] = -1
        self.resident -= len(old)
        self.unit_of[targets] = -1
        self.last_used[targets] = -1
        return missing, targets

    def commit(self, units: np.ndarray, slots: np.ndarray) -> None:
        """The bytes of `units` now lie in `slots`."""
        self.slot_of[units] = slots
        self.unit_of[slots] = units
        self.last_used[slots] = self.clock
        self.resident += len(units)

    def _victims(self, count: int, keep: np.ndarray) -> np.ndarray:
        """The slots to fill next: empty ones, then the least worth keeping; ascending."""
        worth = self.last_used.copy()
        if self.window is not None:
            used = worth >= 0
            worth[used] = np.maximum(worth[used], self.clock - self.window)
        worth[keep[keep >= 0]] = self.clock + 1
        if count == self.slots:
            return np.arange(count, dtype=np.int32)
        order = worth * self.slots + np.arange(self.slots)  # no equals: those of the same worth go by slot number
        return np.sort(np.argpartition(order, count - 1)[:count]).astype(np.int32)
