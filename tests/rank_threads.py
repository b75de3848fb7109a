"""Ranks as threads of one process: a `Group` of queues, in the place of MLX's ring and the control connections."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.errors import FlashError
from mlx_flash.ranks.group import Call, Handlers, follow

WAIT_S = 60


class _Shared:
    def __init__(self, size: int) -> None:
        self.size = size
        self.messages: list[queue.Queue[Any]] = [queue.Queue() for _ in range(size)]
        self.answers: list[queue.Queue[Any]] = [queue.Queue() for _ in range(size)]
        self.arrays: list[queue.Queue[mx.array]] = [queue.Queue() for _ in range(size)]
        self.gathering: list[mx.array | None] = [None] * size
        self.barrier = threading.Barrier(size)
        self.one_answer = threading.Lock()  # Loading changes settings of the process.
        self.failed: list[BaseException] = []


class ThreadGroup:
    """The `Group` of one rank. An array that goes to another thread is evaluated before. calls: counts those made."""

    def __init__(self, shared: _Shared, rank: int, handlers: Handlers | None = None) -> None:
        self.rank, self.size = rank, shared.size
        self._shared, self._handlers = shared, handlers
        self.made = 0

    def ask(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        for rank in range(1, self.size):
            self._shared.messages[rank].put(question)
        answers = [self._shared.answers[rank].get(timeout=WAIT_S) for rank in range(1, self.size)]
        for rank, answer in enumerate(answers, 1):
            if "error" in answer:
                raise FlashError(f"rank {rank}: {answer['error']}")
        return answers

    def call(self, kind: str, ids: np.ndarray, **numbers: int) -> None:
        self.made += 1
        for rank in range(1, self.size):
            self._shared.messages[rank].put(Call(kind, ids.astype(np.int32), numbers))

    def calls(self) -> Iterator[Call]:
        while (message := self._shared.messages[self.rank].get()) is not None:
            if isinstance(message, Call):
                yield message
                continue
            assert self._handlers is not None
            with self._shared.one_answer:
                answer = self._handlers.answer(message)
            self._shared.answers[self.rank].put(answer)

    def spread(self, x: mx.array) -> mx.array:
        mx.eval(x)
        for rank in range(1, self.size):
            self._shared.arrays[rank].put(x)
        return x

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        x = self._shared.arrays[self.rank].get(timeout=WAIT_S)
        assert x.shape == tuple(shape) and x.dtype == dtype
        return x

    def gather(self, y: mx.array) -> mx.array:
        mx.eval(y)
        self._shared.gathering[self.rank] = y
        self._shared.barrier.wait(WAIT_S)
        parts: Any = list(self._shared.gathering)
        assert len({(part.shape, part.dtype) for part in parts}) == 1
        self._shared.barrier.wait(WAIT_S)
        return mx.stack(parts)

    def close(self) -> None:
        for rank in range(1, self.size):
            self._shared.messages[rank].put(None)


@contextmanager
def ranks(size: int, prepare: Callable[[ThreadGroup, Handlers], None]) -> Iterator[ThreadGroup]:
    """The group of rank 0. prepare: called in the thread of each other rank, with its group and its handlers."""
    shared = _Shared(size)
    ready: queue.Queue[int] = queue.Queue()

    def run(rank: int) -> None:
        try:
            handlers = Handlers()
            group = ThreadGroup(shared, rank, handlers)
            with shared.one_answer:
                prepare(group, handlers)
            ready.put(rank)
            follow(group, handlers)
        except BaseException as error:
            shared.failed.append(error)
            shared.barrier.abort()
            ready.put(rank)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(1, size)]
    for thread in threads:
        thread.start()
    for _ in threads:
        ready.get(timeout=WAIT_S)
    group = ThreadGroup(shared, 0)
    try:
        yield group
    finally:
        group.close()
        for thread in threads:
            thread.join(WAIT_S)
        if shared.failed:
            raise shared.failed[0]
