"""Reads on their way into slots, of any layer: waited for, counted, and forgotten when something goes wrong."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Protocol

from .reader import Reader, Ticket
from .stats import Counters


class HasReads(Protocol):
    """A layer with slots. flight: what is on its way into them, None if nothing is."""

    flight: Any


class InFlightReads:
    """What the layers of one model share for their reads.

    flying: the layers that have something on its way.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.counters = Counters()
        self.flying: list[HasReads] = []

    def wait(self, ticket: Ticket) -> None:
        """Until the ticket's bytes are in place; counts them. Raises ReadError."""
        report = self.reader.wait(ticket)
        self.counters.read_s += report.seconds
        self.counters.reads += report.requests
        self.counters.bytes += report.bytes

    def drain(self) -> None:
        """Waits until nothing is read any more and forgets what was on its way: its slots stay empty."""
        self.reader.drain()
        for stream in self.flying:
            stream.flight = None
        self.flying.clear()

    @contextlib.contextmanager
    def draining(self) -> Iterator[None]:
        """After an exception (Ctrl-C, too) no read may be left to land in memory that is given to another."""
        try:
            yield
        except BaseException:
            self.drain()
            raise
