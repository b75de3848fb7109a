"""The one door between a layer and its units on the SSD; neurons.py and experts.py are the two kinds of unit behind it.

A layer names the units that a call needs (`use`), those that the next call may need (`prefetch`), and what it computed
from their slots (`guard`).

MLX does not see what the host writes into its buffers, so one rule holds: before a slot is written, every graph that
reads it has been evaluated. Bytes arrive in slots through `_start` and, in a prompt, through `NeuronSlots.pieces`. Both
evaluate the guarded outputs first.
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

FADING = 0.9  # What is remembered about prefetches weighs so much less after each of them.


@dataclass(frozen=True)
class PendingReads:
    """Units on their way into a layer's slots. guess: no call has asked for them yet."""

    tickets: list[Ticket]
    units: np.ndarray
    slots: np.ndarray
    guess: bool


class PrefetchRecord:
    """How well a layer's prefetches did lately: units that were needed, and units that were not."""

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

    shared: the files, the reader and the counters of the model's layers. count: how many units the layer has. cache:
    which unit is in which slot. In every array of units here, int (n,), an id from 0 to count - 1 stands at most once.
    """

    def __init__(self, shared: InFlightReads, units: int, slots: int, window: int | None) -> None:
        self.shared, self.count = shared, units
        self.cache = SlotCache(units, slots, window)
        self.pending: PendingReads | None = None
        self.prefetched = PrefetchRecord()

    @property
    def all_resident(self) -> bool:
        """Whether every unit is in its slot, so that nothing will be read any more."""
        return self.cache.resident == self.count

    @property
    def slot_of(self) -> np.ndarray:
        """The slot of every unit, int32 (units,); -1 for a unit that is in none."""
        return self.cache.slot_of

    @abstractmethod
    def use(self, units: np.ndarray, *, meanwhile: Callable[[], None] | None = None) -> Iterator[Any]:
        """A call of the model needs `units`: yields them in groups, as the kind of unit computes with them.

        A group's memory stays as it is until the next group is asked for; before that the caller guards what it
        computes from it. meanwhile: called when the reads are under way, before the wait for them.
        """

    def guard(self, *outputs: mx.array) -> None:
        """Names graphs that read slots: they are evaluated before any slot of the model is written again."""
        self.shared.guarded += outputs

    def prefetch(self, units: np.ndarray) -> None:
        """Starts to read those of `units` that are missing, because the token under way may need them in this layer.

        A wrong guess costs time and never changes a result. Units that do not fit into the slots together are not read.
        """
        if self.all_resident or len(units) > self.cache.slots:
            return
        self.shared.clock.start()
        self._finish()  # An earlier guess that no call has asked for is still on its way.
        self._start(units, guess=True)
        self.shared.clock.managed()

    def _need(self, units: np.ndarray) -> None:
        """A call of the model needs `units`: they are the last to be evicted, and a guess proves right or wrong."""
        if (pending := self.pending) is not None:
            used = int(np.count_nonzero(self._among(pending.units, units)))
            unused = len(pending.units) - used
            if pending.guess:
                self.shared.counters.prefetched_used += used
                self.shared.counters.prefetched_unused += unused
                self.prefetched.count(used, unused)
                self.pending = replace(pending, guess=False)
            if len(units) + unused > self.cache.slots:  # The units that no call needs must make room.
                self._finish()
        self.cache.mark_used(units)

    def _start(self, units: np.ndarray, keep: np.ndarray = NO_SLOTS, guess: bool = False) -> None:
        """Starts to read those of `units` that are missing and not on their way yet; they fit into the slots together.

        keep: resident units that must not make room. The reads join those that are on their way.
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
        clock = self.shared.clock
        clock.managed()
        self.shared.evaluate_guarded()
        clock.computed()
        with self.shared.draining():
            if pending is None:
                self.shared.loading.append(self)  # First: `drain` finds the reads, whatever interrupts this.
                self.pending = PendingReads([], missing, targets, guess)
            else:
                both = np.concatenate((pending.units, missing)), np.concatenate((pending.slots, targets))
                self.pending = PendingReads(list(pending.tickets), *both, guess)
            self._submit(missing, targets, self.pending.tickets)
        clock.waited()

    def _finish(self, units: np.ndarray | None = None) -> None:
        """Waits until the units on their way are in their slots; not if all of `units` are in slots without them."""
        pending = self.pending
        if pending is None or (units is not None and (self.cache.slot_of[units] >= 0).all()):
            return
        clock = self.shared.clock
        clock.managed()
        with self.shared.draining():
            for ticket in pending.tickets:
                self.shared.wait(ticket)
            self.pending = None  # First: nothing waits for these tickets again if this is interrupted here.
            self.shared.loading.remove(self)
        clock.waited()
        self._arrived(pending.units, pending.slots)
        self.cache.commit(pending.units, pending.slots)
        clock.managed()

    def _among(self, units: np.ndarray, others: np.ndarray) -> np.ndarray:
        """Which of `units` are among `others`: bool, (len(units),)."""
        found = np.zeros(len(self.cache.slot_of), np.bool_)
        found[others] = True
        return found[units]

    @abstractmethod
    def _submit(self, units: np.ndarray, slots: np.ndarray, tickets: list[Ticket]) -> None:
        """Submits the reads of `units` into `slots` and appends their tickets."""

    @abstractmethod
    def _arrived(self, units: np.ndarray, slots: np.ndarray) -> None:
        """The bytes that were read of `units` lie in `slots`: adds those that are not read from the disk."""
