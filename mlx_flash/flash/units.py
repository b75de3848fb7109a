"""The interface between a layer and its units on the SSD. neurons.py and experts.py implement it for two kinds of unit.

A layer names the units that a call needs (`use`), the units that the next call may need (`prefetch`), and the outputs
that it computed from their slots (`guard`).

MLX does not see what the host writes into its buffers, so one rule holds: every graph that reads a slot is evaluated
before the slot is written. Bytes arrive in slots through `_start` and, in a prompt, through `NeuronSlots.pieces`. Both
call `_before_writing` first.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np

from .inflight import InFlightReads
from .reader import Ticket
from .slot_cache import NO_SLOTS, SlotCache

FADING = 0.9  # The weight of earlier prefetches is multiplied by this at each new one.


@dataclass(frozen=True)
class PendingReads:
    """Units on their way into a layer's slots. guess: whether no call has asked for them yet."""

    tickets: list[Ticket]
    units: np.ndarray
    slots: np.ndarray
    guess: bool


class PrefetchRecord:
    """The recent success of a layer's prefetches: units that were needed, and units that were not."""

    def __init__(self) -> None:
        self.used = self.unused = 0.0

    def count(self, used: int, unused: int) -> None:
        self.used = FADING * self.used + used
        self.unused = FADING * self.unused + unused

    @property
    def mostly_unused(self) -> bool:
        return self.unused > self.used


class Units(ABC):
    """One layer's units behind a cache of slots.

    shared: the files, the reader and the counters of the model's layers. count: the number of units of the layer.
    slot_bytes: bytes of a slot. cache: which unit is in which slot. Every array of units here is int (n,), with
    distinct ids from 0 to count - 1.
    """

    slot_bytes: int

    def __init__(self, shared: InFlightReads, units: int, slots: int, window: int | None) -> None:
        self.shared, self.count = shared, units
        self.cache = SlotCache(units, slots, window)
        self.pending: PendingReads | None = None
        self.prefetched = PrefetchRecord()

    @property
    def all_resident(self) -> bool:
        """Whether every unit is in its slot, so that no more reads are needed."""
        return self.cache.resident == self.count

    @property
    def slot_of(self) -> np.ndarray:
        """The slot of every unit, int32 (units,); -1 for a unit without a slot."""
        return self.cache.slot_of

    @property
    @abstractmethod
    def unit_bytes(self) -> int:
        """Bytes that are read of a unit."""

    @abstractmethod
    def places(self, units: np.ndarray) -> np.ndarray:
        """Where the first bytes of units lie: int64 (n, 2) of the number of the file, and the offset in it."""

    @abstractmethod
    def use(self, units: np.ndarray, *, meanwhile: Callable[[], None] | None = None) -> Iterator[Any]:
        """Yields `units`, which a call of the model needs, in groups. The kind of unit defines what a group is.

        A group's memory does not change until the next group is asked for. Before that, the caller guards what it
        computes from the group. meanwhile: called after the reads have started, before the wait for them.
        """

    def guard(self, *outputs: mx.array) -> None:
        """Registers outputs of graphs that read slots. They are evaluated before a slot of the model is written."""
        self.shared.guarded += outputs

    def prefetch(self, units: np.ndarray) -> None:
        """Starts to read those of `units` that are missing, because the current token may need them in this layer.

        A wrong guess costs time and never changes a result; a disk error while it is read ends the call like any other.
        If `units` do not fit into the slots together, none of them is read.
        """
        if self.all_resident or len(units) > self.cache.slots:
            return
        self.shared.clock.start()
        self._finish()  # An earlier guess that no call has asked for is still on its way.
        self._start(units, guess=True)
        self.shared.clock.managed()

    def start_filling(self, units: np.ndarray, slots: np.ndarray) -> PendingReads:
        """Starts to read `units`, none of which is in a slot, into `slots`, which are empty: both (n,).

        Only `filling.fill` calls it. `finish_filling` follows before any other method.
        """
        self.shared.clock.start()
        self._finish()
        self._before_writing()
        reads = PendingReads([], units, slots, guess=True)
        self._submit(units, slots, reads.tickets)
        return reads

    def finish_filling(self, reads: PendingReads) -> None:
        """Waits until the units are in their slots. Raises ReadError."""
        for ticket in reads.tickets:
            self.shared.wait(ticket)
        self._arrived(reads.units, reads.slots)
        self.cache.commit(reads.units, reads.slots)

    def resize(self, slots: int) -> None:
        """Changes the number of slots between two calls of the layer. The units that would be evicted last stay.

        Old and new slots are in memory together for a moment. The old ones are freed when no array needs them any more,
        such as those of a graph that was not evaluated yet. slots: at least 1; at most one for each unit is made.
        Raises ReadError if a read that is on its way fails, and FlashError as the constructor does. The slots then stay
        as they are, as they do if memory cannot be allocated.
        """
        slots = min(slots, self.count)
        if slots == self.cache.slots:
            return
        self.shared.evaluate_guarded()
        self.shared.clock.start()
        self._finish()
        kept = self.cache.last_evicted(slots)
        units, last_used = self.cache.unit_of[kept], self.cache.last_used[kept]
        memory = self._slots_with(slots, kept, hurry=True)
        # The map never names more slots than there are, and none of them while their contents change.
        self.cache.restart(min(slots, self.cache.slots))
        self._take_slots(memory)
        self.cache.restart(slots, units, last_used)

    def _need(self, units: np.ndarray) -> None:
        """Records that a call of the model needs `units`: they are evicted last, and a pending guess is scored."""
        if (pending := self.pending) is not None:
            used = int(np.count_nonzero(self._among(pending.units, units)))
            unused = len(pending.units) - used
            if pending.guess:
                self._count_guess(used, unused)
                self.pending = replace(pending, guess=False)
            else:  # They are an earlier guess that was counted as unused and that no call has waited for.
                self._count_guess(used, -used)
            if len(units) + unused > self.cache.slots:  # The units that no call needs must make room.
                self._finish()
                self.shared.counters.misses += used  # They were read for this call, and `_start` finds them in slots.
                self.shared.counters.hits -= used
        self.cache.mark_used(units)

    def _count_guess(self, used: int, unused: int) -> None:
        self.shared.counters.prefetched_used += used
        self.shared.counters.prefetched_unused += unused
        self.prefetched.count(used, unused)

    def _start(self, units: np.ndarray, keep: np.ndarray = NO_SLOTS, guess: bool = False) -> None:
        """Starts to read those of `units` that are missing and not on their way yet. All fit into the slots together.

        keep: resident units that must not be evicted. The new reads join those that are on their way.
        """
        pending, needed, taken = self.pending, len(units), NO_SLOTS
        if pending is not None:
            units, taken = units[~self._among(units, pending.units)], pending.slots
        together = units if not len(keep) else np.concatenate((keep, units))
        missing, targets = self.cache.reserve(together, taken)
        if not guess:
            hits = len(units) - len(missing)
            self.shared.counters.hits += hits
            self.shared.counters.misses += needed - hits
        if not len(missing):
            return
        self._before_writing()
        with self.shared.draining():
            if pending is None:
                self.shared.loading.append(self)  # First, so that `drain` finds the reads after an interrupt.
                self.pending = PendingReads([], missing, targets, guess)
            else:
                both = np.concatenate((pending.units, missing)), np.concatenate((pending.slots, targets))
                self.pending = PendingReads(list(pending.tickets), *both, guess)
            self._submit(missing, targets, self.pending.tickets)
        self.shared.clock.waited()

    def _before_writing(self) -> None:
        """Keeps the rule: whatever reads slots is evaluated before bytes arrive in them."""
        self.shared.clock.managed()
        self.shared.evaluate_guarded()
        self.shared.clock.start()  # The device's work is not management.

    def _finish(self, units: np.ndarray | None = None) -> None:
        """Waits until the units on their way are in their slots, unless all of `units` are in slots already."""
        pending = self.pending
        if pending is None or (units is not None and (self.cache.slot_of[units] >= 0).all()):
            return
        if pending.guess:  # No call has asked for them.
            self._count_guess(0, len(pending.units))
        clock = self.shared.clock
        clock.managed()
        with self.shared.draining():
            for ticket in pending.tickets:
                self.shared.wait(ticket)
            self.pending = None  # First, so that an interrupt here does not make anything wait for these tickets again.
            self.shared.loading.remove(self)
        clock.waited()
        self._arrived(pending.units, pending.slots)
        self.cache.commit(pending.units, pending.slots)
        clock.managed()

    def _among(self, units: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Whether each of `units` is among `others`: bool (len(units),)."""
        found = np.zeros(self.count, np.bool_)
        found[others] = True
        return found[units]

    @abstractmethod
    def _slots_with(self, slots: int, kept: np.ndarray, hurry: bool) -> Any:
        """New memory for `slots` slots, for `_take_slots`. The first ones have the contents of the slots `kept`.

        hurry: see AlignedPool.
        """

    @abstractmethod
    def _take_slots(self, memory: Any) -> None:
        """Puts memory that `_slots_with` made in the place of the old one, in one step."""

    @abstractmethod
    def _submit(self, units: np.ndarray, slots: np.ndarray, tickets: list[Ticket]) -> None:
        """Submits the reads of `units` into `slots` and appends their tickets."""

    @abstractmethod
    def _arrived(self, units: np.ndarray, slots: np.ndarray) -> None:
        """Called when the bytes read of `units` are in `slots`. Adds the bytes that are not read from the disk."""
