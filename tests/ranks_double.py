"""Ranks as threads of this process: the `Group` of mlx_flash/ranks without processes, sockets or MLX's ring.

MLX's arrays belong to the thread that made them, so bytes go from thread to thread. `receive` and `gather` wait, and
give evaluated arrays.

    with ranks_as_threads(3, register) as group:  # rank 0's
        group.ask({"build": ...}); group.call("experts", ids, layer=0); group.spread(x); group.gather(y)

register(group, handlers) runs in the thread of every other rank, and adds to its handlers.
"""

from __future__ import annotations

import contextlib
import json
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_flash.errors import FlashError, ReadError
from mlx_flash.flash.reader import Reader
from mlx_flash.ranks.group import Call, Handlers, follow

WAIT_S = 60.0

Register = Callable[["ThreadRank", Handlers], None]


class Shared:
    """What the threads share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.messages: list[queue.SimpleQueue[Any]] = [queue.SimpleQueue() for _ in range(size)]
        self.spread: list[queue.SimpleQueue[bytes]] = [queue.SimpleQueue() for _ in range(size)]
        self.passed: list[queue.SimpleQueue[bytes]] = [queue.SimpleQueue() for _ in range(size)]
        self.answers: list[queue.SimpleQueue[dict[str, Any]]] = [queue.SimpleQueue() for _ in range(size)]
        self.gathered: list[bytes] = [b""] * size
        self.meeting = threading.Barrier(size, timeout=WAIT_S)
        self.errors: list[Exception] = []

    def fail(self, error: Exception) -> None:
        self.errors.append(error)
        self.meeting.abort()


class ThreadRank:
    """The `Group` of one rank. calls_made: (kind, numbers) of each call, for tests to look at."""

    def __init__(self, rank: int, shared: Shared, handlers: Handlers) -> None:
        self.rank, self.size = rank, shared.size
        self.calls_made: list[tuple[str, dict[str, int]]] = []
        self._shared, self._handlers = shared, handlers
        self._closed = False

    def ask(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        text = json.dumps(question)
        for others in self._shared.messages[1:]:
            others.put({"question": text})
        answers = [self._wait(answers) for answers in self._shared.answers[1:]]
        for rank, answer in enumerate(answers, 1):
            if "error" in answer:
                raise FlashError(f"rank {rank}: {answer['error']}")
        return answers

    def call(self, kind: str, ids: np.ndarray, **numbers: int) -> None:
        self.calls_made.append((kind, numbers))
        data = ids.astype(np.int32, copy=False).tobytes()
        for others in self._shared.messages[1:]:
            others.put({"call": kind, "numbers": json.dumps(numbers), "ids": data, "shape": ids.shape})

    def calls(self) -> Iterator[Call]:
        while "end" not in (message := self._shared.messages[self.rank].get()):
            if "question" in message:
                answer = self._handlers.answer(json.loads(message["question"]))
                self._shared.answers[self.rank].put(json.loads(json.dumps(answer)))
            else:
                ids = np.frombuffer(message["ids"], np.int32).reshape(message["shape"])
                yield Call(message["call"], ids, json.loads(message["numbers"]))

    def spread(self, x: mx.array) -> mx.array:
        data = _bytes_of(x)
        for others in self._shared.spread[1:]:
            others.put(data)
        return x

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        return _array_of(self._wait(self._shared.spread[self.rank]), shape, dtype)

    def gather(self, y: mx.array) -> mx.array:
        self._shared.gathered[self.rank] = _bytes_of(y)
        self._meet()
        everything = b"".join(self._shared.gathered)
        self._meet()  # Nobody writes the next `gathered` before everybody has read this one.
        return _array_of(everything, (self.size, *y.shape), y.dtype)

    def send_next(self, x: mx.array) -> None:
        self._shared.passed[self.rank].put(_bytes_of(x))

    def receive_previous(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        return _array_of(self._wait(self._shared.passed[self.rank - 1]), shape, dtype)

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            for others in self._shared.messages[1:]:
                others.put({"end": True})

    def _meet(self) -> None:
        try:
            self._shared.meeting.wait()
        except threading.BrokenBarrierError:
            if self.rank == 0 and self._shared.errors:
                raise self._shared.errors[0] from None
            raise

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
            shared.fail(error)

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


def _bytes_of(x: mx.array) -> bytes:
    flat: Any = mx.contiguous(x.reshape(-1)).view(mx.uint8) if x.size else b""
    return bytes(memoryview(flat))


def _array_of(data: bytes, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    if not data:
        return mx.zeros(shape, dtype)
    return mx.array(np.frombuffer(data, np.uint8)).view(dtype).reshape(shape)


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
