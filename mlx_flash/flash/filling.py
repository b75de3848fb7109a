"""Fills empty slots before a call needs their units: layer by layer, in the order of the files, in long reads.

The reads go through the same reader and the same checks as those of a call.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .slot_cache import NO_SLOTS
from .units import PendingReads, Units

STEP_BYTES = 64 << 20  # read between two steps of the progress; an interrupt waits for at most two steps
STEPS_AT_ONCE = 2  # one step's reads keep the threads busy while the last reads of the step before it end

Wanted = Sequence[tuple[Units, np.ndarray]]
"""The units to read of layers that share their files: each layer once, with distinct ids, int (n,)."""


def whole_layers(layers: Sequence[Units]) -> list[tuple[Units, np.ndarray]]:
    """The units that are missing in layers with a slot for every unit."""
    every = [units for units in layers if units.cache.slots == units.count]
    for units in every:
        units.cache.recover()
    return [(units, np.flatnonzero(units.slot_of < 0)) for units in every if not units.all_resident]


def bytes_to_fill(wanted: Wanted) -> int:
    """The bytes that `fill` reads for these units, if every layer has empty slots for its own."""
    return sum(len(ids) * units.unit_bytes for units, ids in wanted)


def fill(wanted: Wanted, progress: Callable[[int], None] = lambda _: None) -> None:
    """Reads units into empty slots. Units in slots, and units for which a layer has too few, are left out.

    No call of the model may run meanwhile. Nothing is evicted, and no unit counts as used. After an error or an
    interrupt, no read is in flight, and the units of finished steps stay in their slots.

    progress: called with the bytes of each step that is finished. Raises ReadError.
    """
    reads: deque[tuple[Units, PendingReads]] = deque()
    if not wanted:
        return
    with wanted[0][0].shared.draining():
        for units, ids, slots in _steps(wanted):
            reads.append((units, units.start_filling(ids, slots)))
            if len(reads) == STEPS_AT_ONCE:
                _finish(*reads.popleft(), progress)
        while reads:
            _finish(*reads.popleft(), progress)


def _finish(units: Units, reads: PendingReads, progress: Callable[[int], None]) -> None:
    units.finish_filling(reads)
    progress(len(reads.units) * units.unit_bytes)


def _steps(wanted: Wanted) -> Iterator[tuple[Units, np.ndarray, np.ndarray]]:
    """Yields (layer, ids, slots) in the order of the files."""
    ordered = []
    for units, ids in wanted:
        units.cache.recover()
        missing = ids[units.slot_of[ids] < 0][: units.cache.free]
        if len(missing):
            places = units.places(missing)  # (n, 2)
            order = np.lexsort(places.T[::-1])
            ordered.append((tuple(places[order[0]].tolist()), units, missing[order]))
    for _, units, ids in sorted(ordered, key=lambda item: item[0]):
        slots = _empty_slots(units, ids)
        step = max(1, STEP_BYTES // units.unit_bytes)
        for begin in range(0, len(ids), step):
            yield units, ids[begin : begin + step], slots[begin : begin + step]


def _empty_slots(units: Units, ids: np.ndarray) -> np.ndarray:
    """An empty slot for each unit: that of its own number, where every unit has one and it is empty."""
    unit_of = units.cache.unit_of
    if len(unit_of) == units.count and (unit_of[ids] < 0).all():
        return ids.astype(NO_SLOTS.dtype)
    return np.flatnonzero(unit_of < 0)[: len(ids)].astype(NO_SLOTS.dtype)
