"""Reads on their way into the slots of any layer. They are counted, and dropped after an error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import mlx.core as mx

from .reader import Reader, Ticket
from .stats import Clock, Counters
from .unit_file import UnitFile

SHORTEST_REQUEST = 128 << 10  # bytes (bench/results/expert-reads.md)


class HasReads(Protocol):
    """A layer's units. pending: the reads on their way into its slots, None if there are none."""

    pending: Any


class InFlightReads:
    """The state that the layers of one model share for their reads.

    files: the files that units are read from. guarded: outputs of graphs that read slots of any layer. loading: layers
    with reads on their way. before_layer: called with a layer's input when a call of a streamed layer begins; it may
    resize the slots of any layer.

    What follows may change between two calls of the model. The text does not depend on it, and each call of a layer
    looks at it.
    overlap: whether a layer of experts multiplies those in slots while it reads the others. Otherwise it waits for all
    and multiplies in one pass, which the device begins and ends once.
    look_ahead: whether layers guess what the next one needs, and read it.
    shortest_request: bytes; a layer's few missing experts are read in pieces no shorter than this.
    """

    def __init__(self, reader: Reader, files: Sequence[UnitFile]) -> None:
        self.files = files
        self.reader = reader
        self.counters = Counters()
        self.clock = Clock(self.counters)
        self.guarded: list[mx.array] = []
        self.loading: list[HasReads] = []
        self.overlap = True
        self.look_ahead = False
        self.shortest_request = SHORTEST_REQUEST
        self.before_layer: Callable[[mx.array], None] = lambda _: None

    def read_past_cache(self, direct: bool) -> bool:
        """`UnitFile.read_past_cache` of all files, or of none. Returns whether all reads go that way now."""
        changed = [file for file in self.files if file.direct != direct]
        if all(file.read_past_cache(direct) for file in changed):
            return True
        for file in changed:
            file.read_past_cache(not direct)
        return False

    def evaluate_guarded(self) -> None:
        """Evaluates the guarded outputs and drops them, because a layer's output may be large."""
        guarded, self.guarded = self.guarded, []  # First: an output that cannot be evaluated is not tried again.
        if guarded:
            mx.eval(guarded)

    def begin_guarded(self) -> None:
        """Lets the device begin with the guarded outputs and returns at once. They stay guarded."""
        mx.async_eval(self.guarded)

    def wait(self, ticket: Ticket) -> None:
        """Waits until the ticket's bytes are in place, and counts them. Raises ReadError."""
        report = self.reader.wait(ticket)
        self.counters.read_s += report.seconds
        self.counters.reads += report.requests
        self.counters.bytes += report.bytes

    def drain(self) -> None:
        """Waits until no read is in flight and drops the pending reads. Their slots stay empty."""
        self.reader.drain()
        for units in self.loading:
            units.pending = None
        self.loading.clear()

    @contextlib.contextmanager
    def draining(self) -> Iterator[None]:
        """Drains the reads after an exception (even Ctrl-C). A late read would land in memory that is reused."""
        try:
            yield
        except BaseException:
            self.drain()
            raise
