"""The other ranks: each connects to rank 0, answers its questions and receives its calls."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx

from ..errors import FlashError
from .arrays import packed, unpacked, unpacked_ids
from .channel import Channel
from .group import Call, Handlers
from .messages import BadMessageError
from .secret import HELLO_S, greet
from .versions import versions


def _end(what: str) -> None:
    """what: has happened to rank 0. It shows the sentence if it still runs."""
    with contextlib.suppress(OSError, ValueError):
        print(f"rank 0 {what}, as seen from this rank.", file=sys.stderr, flush=True)
    os._exit(1)


class Follower:
    """The `FollowingGroup` of a process. Its process ends at once when rank 0 ends or hangs.

    model, memory: what the host file says for this rank, or None. setup: what RankProcess sends. handlers: `calls`
    answers questions with them.
    """

    def __init__(self, setup: dict[str, Any], handlers: Handlers) -> None:
        """Raises FlashError."""
        self.rank: int = setup["rank"]
        self.size: int = setup["size"]
        self.model: str | None = setup["model"]
        self.memory: str | None = setup["memory"]
        self._handlers = handlers
        handlers.questions["versions"] = lambda _: {"versions": versions()}
        (host, port), own = setup["leader"], setup["address"]
        try:
            connection = socket.create_connection((host, port), HELLO_S, source_address=(own, 0))
            greet(connection, setup["secret"], self.rank)
        except (OSError, EOFError, BadMessageError) as error:
            raise FlashError(
                f"rank 0 cannot be reached at {host} from {own}: {error or 'it closed the connection'}. "
                "Check the addresses in the host file and the firewalls."
            ) from None
        self._called: float | None = None  # when the call that is being computed came
        self._number: object = None  # of that call
        self.bytes_read = 0  # that rank 0 knows of
        self._channel = Channel(connection, _end, self._busy_s)

    def calls(self) -> Iterator[Call]:
        while True:
            try:
                header, data = self._channel.take()
            except EOFError:
                return
            if "end" in header:
                return
            self._number = header.get("number")
            if "question" in header:
                answer = self._handlers.answer(header["question"])
                self._channel.send({"answer": answer, "number": self._number})
            else:
                self._called = time.monotonic()
                yield _call_in(header, data)
                self._called = None

    def reply(self, result: mx.array | str) -> None:
        if not isinstance(result, str):
            try:
                forms, data = packed([result])
                read = self._handlers.bytes_read()
                header = {"arrays": forms, "number": self._number, "read": max(0, read - self.bytes_read)}
                self._channel.send(header, data)
                self.bytes_read = read
                return
            except FlashError as error:  # Nothing has been sent.
                result = str(error)
        self._channel.send({"error": result, "number": self._number})

    def close(self) -> None:
        self._channel.close()

    def _busy_s(self) -> float:
        return 0.0 if (called := self._called) is None else time.monotonic() - called


def _call_in(header: dict[str, Any], data: bytearray) -> Call:
    """Raises BadMessageError."""
    kind, numbers = header.get("call"), header.get("numbers")
    if not isinstance(kind, str) or not isinstance(numbers, dict):
        raise BadMessageError(f"a message between ranks is neither a question nor a call: {header!r:.100}.")
    ids, rest = unpacked_ids(header.get("shape"), data)
    return Call(kind, ids, unpacked(header.get("arrays"), rest), numbers)
