"""Which unit sits in which slot: the book-keeping of one layer's cache, without any bytes.

The paper (section 3.3) keeps the active rows contiguous and moves the tail into holes; here a unit stays in
its slot until another takes it, and the layer gathers by slot number. Nothing is ever moved.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

HALF_LIFE = 32  # calls; 16 to 64 do equally well, much less or more does worse (bench/results/activations.md)
LARGEST_USE_WEIGHT = 1e30  # scores are brought down before a float32 could overflow
NO_SLOTS = np.empty(0, np.int32)


@dataclass
class EventLog:
    """What happened in a cache, for somebody who looks on: ids of the units used and read, call by call."""

    used: list[np.ndarray] = field(default_factory=list)
    read: list[np.ndarray] = field(default_factory=list)


class SlotCache:
    """An id-to-slot map with eviction by fading use, or by a sliding window.

    units: how many units the layer has; slots: how many fit. window: None, or k: units used within the last k calls
    are kept, the oldest going first, and all older ones go in order of their slot (paper, section 3.2); a window
    longer than any text is least-recent use. With None the unit of the lowest score goes:

        score = sum over the calls that used the unit of 2 ** (-age in calls / HALF_LIFE)

    which is least-recent use for a short half-life, most frequent use for an endless one. Scores are kept for units
    without a slot as well. Instead of all fading at every call, later uses weigh more.
    """

    def __init__(self, units: int, slots: int, window: int | None = None) -> None:
        if not slots >= 0:
            raise ValueError(f"expected slots >= 0, got {slots}")
        self.window = window
        self.slots = min(slots, units)
        self.slot_of = np.full(units, -1, np.int32)
        self.unit_of = np.full(self.slots, -1, np.int32)
        self.score = np.zeros(units, np.float32)  # times `use_weight`
        self.use_weight = 1.0  # what a use adds now
        self.use_weight_growth = 2 ** (1 / HALF_LIFE)
        self.last_used = np.full(self.slots, -1, np.int64)  # call; kept for a window only
        self.clock = 0
        self.resident = 0  # how many slots are taken
        self.event_log: EventLog | None = None  # None: nobody looks on

    @property
    def free(self) -> int:
        return self.slots - self.resident

    def mark_used(self, units: np.ndarray) -> int:
        """Begins a token that needs `units` (unique ids): marks their use. Returns how many are here."""
        self.clock += 1
        if self.event_log is not None:
            self.event_log.used.append(units)
        slots = self.slot_of[units]
        here = slots[slots >= 0]
        if self.window is not None:
            self.last_used[here] = self.clock
            return len(here)
        self.use_weight *= self.use_weight_growth
        if self.use_weight > LARGEST_USE_WEIGHT:
            self.score /= self.use_weight
            self.use_weight = 1.0
        self.score[units] += self.use_weight
        return len(here)

    def reserve(self, units: np.ndarray, taken: np.ndarray = NO_SLOTS) -> tuple[np.ndarray, np.ndarray]:
        """Makes room for `units` (unique ids, at most `slots` of them), in none of the slots `taken`, which look empty.

        Returns the missing units and the slots they shall be read into, both int32; those slots are empty
        until `commit`. None of `units` that is here is evicted.
        """
        slots = self.slot_of[units]
        absent = slots < 0
        missing = units[absent]
        if not len(missing):
            return missing, NO_SLOTS
        targets = self._victims(len(missing), keep=np.concatenate((slots[~absent], taken)))
        old = self.unit_of[targets]
        old = old[old >= 0]
        self.resident -= len(old)  # first: interrupted here, or below, it may be too low, but never too high
        self.slot_of[old] = -1
        self.unit_of[targets] = -1
        return missing, targets

    def commit(self, units: np.ndarray, slots: np.ndarray) -> None:
        """The bytes of `units` now lie in `slots`."""
        self.unit_of[slots] = units  # first: interrupted, no unit is said to be in a slot that looks empty
        self.last_used[slots] = self.clock
        self.slot_of[units] = slots
        self.resident += len(units)
        if self.event_log is not None:
            self.event_log.read.append(units)

    def _victims(self, count: int, keep: np.ndarray) -> np.ndarray:
        """The slots to fill next: empty ones, then the least worth keeping; ascending. None of `keep`."""
        if count == self.slots:
            return np.arange(count, dtype=np.int32)
        scores = self.eviction_scores()
        if self.resident < self.slots:
            empty = np.flatnonzero(self.unit_of < 0)
            scores[empty] = empty - self.slots  # below zero, in order
        scores[keep] = np.inf
        return np.sort(np.argpartition(scores, count - 1)[:count]).astype(np.int32)

    def eviction_scores(self) -> np.ndarray:
        """Eviction score per slot, (slots,), >= 0: the lowest goes first; undefined for empty slots."""
        if self.window is None:
            return self.score[self.unit_of]
        used = np.maximum(self.last_used, self.clock - self.window)
        return (used * self.slots + np.arange(self.slots)).astype(np.float64)  # no equals: by slot number
