"""Connections to rank 0 that have yet to prove that they come from a rank. Anyone on the network can make them."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable

from ..errors import FlashError
from .secret import check

MOST_GREETING = 32  # at the same time; each takes a file and a thread


class Greetings:
    """admit: called with a rank and its connection, in a thread of this object; False if the rank is not wanted.

    A new connection beyond MOST_GREETING takes the place of the oldest: a rank greets within milliseconds.
    """

    def __init__(self, secret: str, size: int, admit: Callable[[int, socket.socket], bool]) -> None:
        self._secret, self._size, self._admit = secret, size, admit
        self._open: dict[socket.socket, None] = {}  # the oldest first
        self._changing = threading.Lock()

    def begin(self, connection: socket.socket) -> None:
        with self._changing:
            while len(self._open) >= MOST_GREETING:
                self._drop(next(iter(self._open)))
            self._open[connection] = None
        threading.Thread(target=self._greet, args=(connection,), daemon=True).start()

    def close(self) -> None:
        with self._changing:
            for connection in list(self._open):
                self._drop(connection)

    def _drop(self, connection: socket.socket) -> None:
        """Its thread closes it."""
        del self._open[connection]
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    def _greet(self, connection: socket.socket) -> None:
        try:
            rank = check(connection, self._secret, self._size)
        except (OSError, EOFError, FlashError):
            rank = 0
        with self._changing:
            dropped = connection not in self._open
            self._open.pop(connection, None)
        if dropped or not rank or not self._admit(rank, connection):
            connection.close()
