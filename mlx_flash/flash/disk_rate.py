"""Measures how fast units are read: at their own places in the files, in the batches that tokens read them in."""

from __future__ import annotations

import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from .layer_ring import TENSOR_ALIGNMENT
from .reader import Reader, Ticket
from .unit_file import UnitFile

SECONDS = 0.5
ROUNDS = 4  # After so many readings of all batches, fewer seconds are enough.
TURNS = 20  # of reading while something computes; the median counts
LEAST_TURNS = 3  # These are enough after SECONDS.


class ReadTrial:
    """Reads batches in turn, again and again, as tokens do. What is read is not kept.

    batches: segments that are read together, each int64 (n, 3) of file, offset, length.
    """

    def __init__(self, files: Sequence[UnitFile], reader: Reader, batches: Sequence[np.ndarray]) -> None:
        self._files, self._reader = files, reader
        self._batches: Iterator[np.ndarray] = itertools.cycle(batches)
        self._most = ROUNDS * sum(int(batch[:, 2].sum()) for batch in batches)
        room = max(int(_rounded(batch).sum()) for batch in batches)
        self._buffer = np.ones(room, np.uint8)  # ones, so that every page is in memory already

    def rate(self, in_flight: int) -> float:
        """Bytes per second. in_flight: number of batches that are on their way at once. Raises ReadError."""
        pending: deque[tuple[int, list[Ticket]]] = deque()
        read, began = 0, time.perf_counter()
        while read < self._most and time.perf_counter() - began < SECONDS:
            while len(pending) < in_flight:
                pending.append(self._begin(next(self._batches)))
            nbytes, tickets = pending.popleft()
            self._wait(tickets)
            read += nbytes
        seconds = time.perf_counter() - began
        for _, tickets in pending:
            self._wait(tickets)
        return read / seconds

    def exposed_share(self, rate: float, compute: Callable[[], object]) -> float:
        """How much of a computation does not fit into the time of a read that alone takes as long: 0 if both run side
        by side without loss, 1 if one waits for the other.

        rate: as `rate` measured it. Raises ReadError.
        """
        compute()
        alone: list[float] = []
        both: list[float] = []
        while len(both) < LEAST_TURNS or (len(both) < TURNS and sum(both) < SECONDS):
            began = time.perf_counter()
            compute()
            alone.append(time.perf_counter() - began)
            tickets = []
            left = int(rate * alone[-1])
            began = time.perf_counter()
            while left > 0:
                batch = _beginning(next(self._batches), left)
                nbytes, begun = self._begin(batch)
                left -= nbytes
                tickets += begun
            compute()
            self._wait(tickets)
            both.append(time.perf_counter() - began)
        lost = statistics.median(b / a for a, b in zip(alone, both, strict=True)) - 1
        return min(1.0, max(0.0, lost))

    def _begin(self, batch: np.ndarray) -> tuple[int, list[Ticket]]:
        """Submits a batch. Returns its bytes and its tickets."""
        batch = batch[np.lexsort((batch[:, 1], batch[:, 0]))]
        sizes = _rounded(batch)
        addresses = self._buffer.ctypes.data + np.cumsum(sizes) - sizes
        tickets = []
        for number in np.unique(batch[:, 0]).tolist():
            here = batch[:, 0] == number
            file, (offsets, lengths) = self._files[number], batch[here, 1:].T
            tickets.append(self._reader.submit(file, offsets, addresses[here], lengths, destination=self._buffer))
        return int(batch[:, 2].sum()), tickets

    def _wait(self, tickets: Sequence[Ticket]) -> None:
        for ticket in tickets:
            self._reader.wait(ticket)


def _beginning(batch: np.ndarray, nbytes: int) -> np.ndarray:
    """The first `nbytes` of a batch, or all of a shorter one."""
    before = np.cumsum(batch[:, 2]) - batch[:, 2]
    cut = batch[before < nbytes].copy()
    cut[:, 2] = np.minimum(cut[:, 2], nbytes - before[: len(cut)])
    return cut


def _rounded(batch: np.ndarray) -> np.ndarray:
    """The room that each segment takes in memory, int64 (n,)."""
    return -(-batch[:, 2] // TENSOR_ALIGNMENT) * TENSOR_ALIGNMENT
