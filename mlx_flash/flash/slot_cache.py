"""The bookkeeping of one layer's cache: which unit is in which slot. It holds no bytes.

The paper (LLM in a flash, section 3.3) keeps the active rows contiguous and moves the tail into holes. Here a unit
stays in its slot until another unit takes it, and the layer gathers by slot number. Nothing is ever moved.
"""

from __future__ import annotations

import ctypes
import errno
from dataclasses import dataclass, field

import numpy as np

from .addresses import address
from .reader import slot_functions

HALF_LIFE = 32  # calls; 16 to 64 work equally well, much less or more works worse (bench/results/activations.md)
LARGEST_USE_WEIGHT = 1e30  # scores are scaled down before a float32 could overflow
NO_SLOTS = np.empty(0, np.int32)


@dataclass
class EventLog:
    """The history of a cache, for observers: ids of the units used and read, call by call."""

    used: list[np.ndarray] = field(default_factory=list)
    read: list[np.ndarray] = field(default_factory=list)


class SlotCache:
    """An id-to-slot map that evicts by decaying use, or by a sliding window.

    units: number of units of the layer. slots: number of slots. window: k or None.

    With a window of k, units that were not used within the last k calls are evicted first, in order of their slot; then
    the least recently used (paper, section 3.2). A window longer than any text evicts the least recently used. Without
    a window, the unit with the lowest score is evicted:

        score = sum over the calls that used the unit of 2 ** (-age in calls / HALF_LIFE)

    A short half-life evicts the least recently used unit, an endless one the least frequently used. Units without a
    slot keep their scores. Scores do not decay at every call; instead, later uses weigh more.
    """

    def __init__(self, units: int, slots: int, window: int | None = None) -> None:
        if not slots >= 0:
            raise ValueError(f"expected slots >= 0, got {slots}")
        self.window = window
        self.slot_of = np.full(units, -1, np.int32)
        self.unit_of = np.full(min(slots, units), -1, np.int32)
        self.score = np.zeros(units, np.float32)  # scores times `use_weight`
        self.use_weight = 1.0  # added to the score by a use now
        self.use_weight_growth = 2 ** (1 / HALF_LIFE)
        self.last_used = np.full(self.slots, -1, np.int64)  # number of the call; kept for a window only
        self.clock = 0
        self.resident = 0  # number of occupied slots
        self.event_log: EventLog | None = None  # None: events are not recorded
        self._c = slot_functions()
        self._changing = False  # still True after an interrupt within `reserve` or `commit`

    @property
    def slots(self) -> int:
        return len(self.unit_of)

    @property
    def free(self) -> int:
        return self.slots - self.resident

    def recover(self) -> None:
        """Makes the map right again after an interrupt (Ctrl-C) in the middle of a change.

        `unit_of` is right at every moment: it changes in one step, before the bytes of a slot are overwritten and after
        new ones are there. The other methods call this first. Code that reads `slot_of` before them calls it as well.
        """
        if self._changing:
            occupied = np.flatnonzero(self.unit_of >= 0)
            self.slot_of[:] = -1
            self.slot_of[self.unit_of[occupied]] = occupied
            self.resident = len(occupied)
            if len(self.last_used) != self.slots:  # The change was one of their number.
                self.last_used = np.full(self.slots, -1, np.int64)
            self._changing = False

    def look_up(self, units: np.ndarray) -> tuple[np.ndarray, int] | None:
        """The slots of `units`, if all of them are in slots, and how many different units they are; else None.

        units: ids of any shape, of a few tokens; the slots are uint32 and have that shape. If they are found, a call
        that needs them has started and their use is marked, as by `mark_used`; else nothing has changed.
        """
        self.recover()
        weight = self.use_weight * self.use_weight_growth
        if self.window is not None or weight > LARGEST_USE_WEIGHT:
            return None
        wanted = np.array(units, np.uint32)  # an id below 0 becomes one that no layer has
        slots = np.empty_like(wanted)
        found = self._c.mf_look_up(
            address(wanted), wanted.size, address(self.slot_of), address(self.score), len(self.slot_of), weight,
            address(slots),
        )  # fmt: skip
        if not found:
            return None
        self.use_weight = weight
        self.clock += 1
        if self.event_log is not None:
            self.event_log.used.append(np.unique(units))
        return slots, found

    def mark_used(self, units: np.ndarray) -> int:
        """Starts a call that needs `units` (unique ids) and marks their use. Returns how many of them are in slots."""
        self.recover()
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

    def uses(self) -> np.ndarray:
        """How often each unit was used lately: the scores, float32 (units,). A unit that every call uses has 47."""
        return self.score / np.float32(self.use_weight)

    def begin_with(self, uses: np.ndarray) -> None:
        """Starts with the scores of an earlier run, (units,), as if this run continued it."""
        self.score[:] = uses
        self.use_weight = 1.0

    def reserve(self, units: np.ndarray, taken: np.ndarray = NO_SLOTS) -> tuple[np.ndarray, np.ndarray]:
        """Makes room for `units` (unique ids, at most `slots` of them), but not in the slots `taken`, which look empty.

        Returns the missing units and the slots to read them into, both int32. Those slots are empty until `commit`.
        Units among `units` that are in slots are not evicted. Empty slots are filled first; of slots with equal scores,
        the lowest comes first. Raises ValueError if the units do not fit.
        """
        self.recover()
        wanted, avoided = np.array(units, np.int32), np.array(taken, np.int32)
        missing, targets = np.empty_like(wanted), np.empty_like(wanted)
        evicted = ctypes.c_int64()
        self._changing = True
        self.resident -= len(wanted)  # first: it is never too high, not even after an interrupt
        count = self._c.mf_make_room(
            address(wanted), len(wanted), address(avoided), len(avoided), address(self.slot_of), len(self.slot_of),
            address(self.unit_of), self.slots, address(self.score),
            None if self.window is None else address(self.last_used), self.clock - (self.window or 0),
            address(missing), address(targets), evicted,
        )  # fmt: skip
        self.resident += len(wanted) - evicted.value
        self._changing = False
        if count == -errno.ENOMEM:
            raise MemoryError(f"There is no memory to choose among {self.slots} slots.")
        if count < 0:
            raise ValueError(f"expected units 0 to {len(self.slot_of) - 1}, and a slot for each, got {wanted.tolist()}")
        return missing[:count], targets[:count]

    def commit(self, units: np.ndarray, slots: np.ndarray) -> None:
        """Records that the bytes of `units` are in `slots`."""
        self.recover()
        self._changing = True
        self.unit_of[slots] = units
        self.last_used[slots] = self.clock
        self.slot_of[units] = slots
        self.resident += len(units)
        self._changing = False
        if self.event_log is not None:
            self.event_log.read.append(units)

    def last_evicted(self, most: int) -> np.ndarray:
        """The occupied slots, ascending: all of them, or the `most` that would be evicted last."""
        self.recover()
        occupied = np.flatnonzero(self.unit_of >= 0)
        if len(occupied) <= most:
            return occupied
        by_score = np.argsort(-self.eviction_scores()[occupied], kind="stable")
        return np.sort(occupied[by_score[:most]])

    def restart(self, slots: int, units: np.ndarray = NO_SLOTS, last_used: np.ndarray = NO_SLOTS) -> None:
        """Changes the number of slots, at most one for each unit. `units` are in the first ones, the others are empty.

        last_used: of each of `units`, as the attribute has them. No reads may be on their way.
        """
        unit_of, used = np.full(slots, -1, np.int32), np.full(slots, -1, np.int64)
        unit_of[: len(units)], used[: len(units)] = units, last_used
        self.recover()
        self._changing = True
        self.resident = 0
        self.last_used = used
        self.unit_of = unit_of
        self.slot_of[:] = -1
        self.slot_of[units] = np.arange(len(units))
        self.resident = len(units)
        self._changing = False

    def eviction_scores(self) -> np.ndarray:
        """Eviction score per slot, (slots,), >= 0. The lowest is evicted first. Undefined for empty slots."""
        if self.window is None:
            return self.score[self.unit_of]
        used = np.maximum(self.last_used, self.clock - self.window)
        return (used * self.slots + np.arange(self.slots)).astype(np.float64)  # the slot number breaks ties
