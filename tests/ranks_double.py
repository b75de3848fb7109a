"""Ranks as threads of this process: both sides of a group of mlx_flash/ranks without processes or sockets.

MLX's arrays belong to the thread that made them, so bytes go from thread to thread.

    with ranks_as_threads(3, register) as group:  # rank 0's
        group.ask({"build": ...}); group.call("experts", ids, [x], layer=0); group.results()

register(group, handlers) runs in the thread of every other rank, and adds to its handlers.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_flash.errors import FlashError, ReadError
from mlx_flash.flash.reader import Reader
from mlx_flash.ranks.arrays import packed, unpacked, unpacked_result
from mlx_flash.ranks.group import Call, Handlers, follow

WAIT_S = 60.0


def without_last_row(_: object, forms: Any, data: bytes) -> tuple[Any, bytes]:
    """To put in place of `ThreadRank.altered`."""
    (y,) = unpacked(forms, data)
    return packed([y[:-1]])


Register = Callable[["ThreadRank", Handlers], None]


class Shared:
    """What the threads share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.messages: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(size)]
        self.replies: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(size)]
        self.errors: list[Exception] = []


class ThreadRank:
    """The `Group` of rank 0, or the `FollowingGroup` of another. calls_made: (kind, numbers) of each call, for tests to
    look at."""

    def __init__(self, rank: int, shared: Shared, handlers: Handlers) -> None:
        self.rank, self.size = rank, shared.size
        self.names: Sequence[str] = ["127.0.0.1"] * shared.size
        self.calls_made: list[tuple[str, dict[str, int]]] = []
        self._shared, self._handlers = shared, handlers
        self._sent = self._awaited = 0
        self._called: Sequence[int] = ()
        self._number = 0
        self._read_by: dict[int, int] = {}
        self._closed = False

    @property
    def bytes_read(self) -> int:
        return sum(self._read_by.values())

    def ask(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        self._sent = self._awaited = self._sent + 1
        text = json.dumps(question)
        for others in self._shared.messages[1:]:
            others.put({"question": text, "number": self._sent})
        answers = [self._received(rank) for rank in range(1, self.size)]
        for rank, answer in enumerate(answers, 1):
            if "error" in answer:
                raise FlashError(f"rank {rank}: {answer['error']}")
        return answers

    def call(
        self,
        kind: str,
        ids: np.ndarray,
        arrays: Sequence[mx.array] = (),
        ranks: Sequence[int] | None = None,
        **numbers: int,
    ) -> None:
        self._called = range(1, self.size) if ranks is None else ranks
        self._send(self._called, kind, ids, arrays, numbers)
        self._awaited = self._sent

    def tell(self, kind: str, ids: np.ndarray, **numbers: int) -> None:
        self._send(range(1, self.size), kind, ids, (), numbers)

    def _send(
        self, ranks: Sequence[int], kind: str, ids: np.ndarray, arrays: Sequence[mx.array], numbers: dict[str, int]
    ) -> None:
        data, (forms, sent) = ids.astype(np.int32, copy=False).tobytes(), packed(arrays)
        self._sent += 1
        self.calls_made.append((kind, numbers))
        message = {"call": kind, "numbers": json.dumps(numbers), "ids": data, "shape": ids.shape}
        for rank in ranks:
            self._shared.messages[rank].put({**message, "forms": forms, "sent": sent, "number": self._sent})

    def results(self, shapes: Sequence[Sequence[int | None]], dtype: mx.Dtype | None = None) -> list[mx.array]:
        received = [(rank, self._received(rank)) for rank in self._called]
        for rank, reply in received:
            if isinstance(reply, str):
                raise FlashError(f"rank {rank}: {reply}")
        self._read_by.update((rank, read) for rank, (_, _, read) in received)
        both = zip(received, shapes, strict=True)
        return [unpacked_result(*self.altered(*reply[:2]), shape, dtype) for (_, reply), shape in both]

    def altered(self, forms: Any, data: bytes) -> tuple[Any, bytes]:
        """What a test puts in place of the other ranks' results."""
        return forms, data

    def calls(self) -> Iterator[Call]:
        while "end" not in (message := self._shared.messages[self.rank].get()):
            self._number = message["number"]
            if "question" in message:
                answer = self._handlers.answer(json.loads(message["question"]))
                self._put(json.loads(json.dumps(answer)))
            else:
                ids = np.frombuffer(message["ids"], np.int32).reshape(message["shape"])
                arrays = unpacked(message["forms"], memoryview(message["sent"]))
                yield Call(message["call"], ids, arrays, json.loads(message["numbers"]))

    def reply(self, result: mx.array | str) -> None:
        self._put(result if isinstance(result, str) else (*packed([result]), self._handlers.bytes_read()))

    def _put(self, reply: Any) -> None:
        self._shared.replies[self.rank].put((self._number, reply))

    def _received(self, rank: int) -> Any:
        """The reply to what is awaited; those to what came before, which nobody waited for, go."""
        number = -1
        while number < self._awaited:
            number, reply = self._wait(self._shared.replies[rank])
        return reply

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for others in self._shared.messages[1:]:
                others.put({"end": True})

    def _wait(self, source: queue.SimpleQueue[Any]) -> Any:
        for _ in range(int(WAIT_S / 0.1)):
            with contextlib.suppress(queue.Empty):
                return source.get(timeout=0.1)
            if self._shared.errors:
                raise self._shared.errors[0]
        raise TimeoutError("another rank sends nothing")


@contextlib.contextmanager
def ranks_as_threads(size: int, register: Register) -> Iterator[ThreadRank]:
    """Rank 0's group. An error of another rank is raised by rank 0's next wait, or at the end of the block."""
    shared = Shared(size)

    def run(rank: int) -> None:
        try:
            handlers = Handlers()
            group = ThreadRank(rank, shared, handlers)
            register(group, handlers)
            follow(group, handlers)
        except Exception as error:
            shared.errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    group = ThreadRank(0, shared, Handlers())
    try:
        yield group
    finally:
        group.close()
        for thread in threads:
            thread.join(WAIT_S)
    if shared.errors:
        raise shared.errors[0]


@contextlib.contextmanager
def failing_wait(failing: Reader, number: int) -> Iterator[None]:
    """Within it, the wait of this number, from 0, of a reader raises ReadError("injected") once its reads are done."""
    wait, waits = Reader.wait, iter(range(1000))

    def wait_or_fail(reader: Reader, ticket: Any) -> Any:
        report = wait(reader, ticket)
        if reader is failing and next(waits) == number:
            raise ReadError("injected")
        return report

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reader, "wait", wait_or_fail)
        yield
