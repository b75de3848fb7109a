"""The other ranks: each connects to rank 0, answers its questions and receives its calls."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import FlashError
from .channel import JOINING_S, SILENT_S, Channel
from .group import Call, Handlers
from .messages import BadMessageError
from .ring import Ring
from .secret import HELLO_S, greet
from .versions import versions


def _end(_: str) -> None:
    os._exit(1)


class Follower:
    """The `Group` of a rank other than 0. Its process ends at once when rank 0 ends or hangs.

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
        self._ring = Ring(self.rank, self.size, setup["address"])
        own: dict[str, Any] = {"versions": versions(), "ring": self._ring.address}
        handlers.questions.update(versions=lambda _: own, probe=self._probe, join=self._join)
        host, port = setup["leader"]
        try:
            connection = socket.create_connection((host, port), HELLO_S, source_address=(setup["address"], 0))
            greet(connection, setup["secret"], self.rank)
        except (OSError, EOFError, BadMessageError) as error:
            raise FlashError(f"rank 0 cannot be reached at {host}: {error or 'it closed the connection'}.") from None
        self._called: float | None = None  # when the call that is being computed came
        self._channel = Channel(connection, _end, self._busy_s)
        self._channel.silent_s = JOINING_S
        self._joined = False

    def ask(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        raise FlashError("only rank 0 asks.")

    def call(self, kind: str, ids: np.ndarray, **numbers: int) -> None:
        raise FlashError("only rank 0 makes calls.")

    def calls(self) -> Iterator[Call]:
        while True:
            try:
                header, data = self._channel.take()
            except EOFError:
                return
            if "end" in header:
                return
            if self._joined:  # and so has rank 0, which does not send anything before
                self._channel.silent_s = SILENT_S
            if "question" in header:
                answer = self._handlers.answer(header["question"])
                self._channel.send({"answer": answer, "number": header.get("number")})
            else:
                self._called = time.monotonic()
                yield Call(header["call"], np.frombuffer(data, np.int32).reshape(header["shape"]), header["numbers"])
                self._called = None

    def spread(self, x: mx.array) -> mx.array:
        raise FlashError("only rank 0 spreads.")

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        return self._ring.receive(shape, dtype)

    def gather(self, y: mx.array) -> mx.array:
        return self._ring.gather(y)

    def send_next(self, x: mx.array) -> None:
        self._ring.send_next(x)

    def receive_previous(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        return self._ring.receive_previous(shape, dtype)

    def close(self) -> None:
        self._channel.close()
        self._ring.close()

    def _busy_s(self) -> float:
        return 0.0 if (called := self._called) is None else time.monotonic() - called

    def _probe(self, seen: list[list[str]]) -> dict[str, Any]:
        self._ring.probe(seen[self.rank])
        return {}

    def _join(self, seen: list[list[str]]) -> dict[str, Any]:
        self._ring.join(seen[self.rank])
        self._joined = True
        return {}
