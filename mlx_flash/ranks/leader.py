"""Rank 0: it starts the other ranks, asks them, sends them calls, and ends them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import FlashError
from .channel import ENDED, JOINING_S, SILENT_S, Channel
from .group import Call
from .hosts import RankHost
from .ring import Ring
from .secret import check, new_secret
from .starting import ENDING_S, OF_MLX, RankProcess, Wrap, name_of
from .versions import check_versions

ALL_END = ", so the generation ends on all machines."
LAST_WORDS_S = 0.5  # for a process whose connection has closed to end
MLX_PRINTS_S = 0.2  # MLX prints some lines about the closed connections; ours must not fall between them.
TELLING_S = 2.0
START_S = 60.0  # for all ranks to start Python and to connect

Views = Callable[[int, list[str]], list[str]]


def end_process(sentence: str) -> None:
    """Ends this process even while its main thread waits in MLX for a rank that has gone."""
    with contextlib.suppress(OSError, ValueError):
        print(sentence, file=sys.stderr, flush=True)
    os._exit(1)


class Leader:
    """Rank 0's `Group`. Only one thread may use it at a time."""

    rank = 0

    def __init__(
        self,
        hosts: list[RankHost],
        environment: Mapping[str, str],
        *,
        say: Callable[[str], None] = lambda _: None,
        on_fault: Callable[[str], None] = end_process,
        wrap: Wrap | None = None,
        views: Views | None = None,
    ) -> None:
        """Starts every rank but the first of `hosts`, and connects them.

        on_fault: called once, in a thread of its own, with a sentence that names a rank that has ended or hangs; the
        other ranks are told to end before that. environment: for the processes that are started on this machine, as
        `child_environment` gives it. wrap: see RankProcess. views: (rank, addresses by rank) -> the
        addresses as that rank sees them, where the connections lead through a relay.

        Raises FlashError; no other rank is left then.
        """
        self.size = len(hosts)
        self.fault: str | None = None
        self._hosts, self._on_fault = hosts, on_fault
        self._closing = threading.Event()
        self._faulty = threading.Lock()
        self._told = threading.Event()  # on_fault has returned
        self._channels: dict[int, Channel] = {}
        self._processes: list[RankProcess] = []
        self._asked = 0
        self._ring = Ring(0, self.size, hosts[0].address)
        try:
            self._start(say, environment, wrap)
            self._connect(views or (lambda _, addresses: addresses))
        except BaseException:
            self._closing.set()
            for process in self._processes:
                process.kill()
            self.close()
            raise

    # -- what a Group does -----------------------------------------------------------------------------------------

    def ask(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        self._post(question)
        return self._answers()

    def call(self, kind: str, ids: np.ndarray, **numbers: int) -> None:
        data = ids.astype(np.int32, copy=False).tobytes()
        self._send({"call": kind, "numbers": numbers, "shape": ids.shape}, data)

    def calls(self) -> Iterator[Call]:
        raise FlashError("rank 0 makes calls and receives none.")

    def spread(self, x: mx.array) -> mx.array:
        self._raise_fault()
        return self._ring.spread(x)

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        raise FlashError("rank 0 spreads and receives nothing.")

    def gather(self, y: mx.array) -> mx.array:
        self._raise_fault()
        return self._ring.gather(y)

    def send_next(self, x: mx.array) -> None:
        self._raise_fault()
        self._ring.send_next(x)

    def receive_previous(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        self._raise_fault()
        return self._ring.receive_previous(shape, dtype)

    def close(self) -> None:
        self._closing.set()
        for channel in list(self._channels.values()):
            with contextlib.suppress(OSError):
                channel.send({"end": True})
        deadline = time.monotonic() + ENDING_S
        for process in self._processes:
            process.finish(deadline - time.monotonic())
        for channel in list(self._channels.values()):
            channel.close()
        self._ring.close()

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Where a block's MLX raises an error because a rank has gone, raises FlashError with the sentence about it."""
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith(OF_MLX):
                raise
            self._told.wait(SILENT_S + TELLING_S)
            self._raise_fault()
            raise FlashError(f"the ranks have lost their connection: {error}.") from None

    @property
    def pids(self) -> list[int]:
        """The processes on this machine that stand for the other ranks."""
        return [process.pid for process in self._processes]

    @property
    def with_own_model(self) -> list[str]:
        """The other machines for which the host file names the model."""
        return [host.ssh for host in self._hosts[1:] if host.model is not None]

    # -- the start -------------------------------------------------------------------------------------------------

    def _start(self, say: Callable[[str], None], environment: Mapping[str, str], wrap: Wrap | None) -> None:
        secret = new_secret()
        with socket.create_server((self._hosts[0].address, 0), backlog=64) as server:
            address = server.getsockname()
            for rank, host in enumerate(self._hosts[1:], 1):
                setup = {"rank": rank, "size": self.size, "leader": list(address), "address": host.address}
                own = {"model": host.model, "memory": host.memory}
                process = RankProcess(rank, host, setup | own | {"secret": secret}, say, environment, wrap)
                self._processes.append(process)
            self._accept(server, secret)

    def _accept(self, server: socket.socket, secret: str) -> None:
        """Waits until every rank has connected. Connections of others are dropped."""
        deadline = time.monotonic() + START_S
        server.settimeout(0.1)
        while missing := set(range(1, self.size)) - set(self._channels):
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                threading.Thread(target=self._admit, args=(connection, secret), daemon=True).start()
            for rank in missing:
                if (ended := self._processes[rank - 1].ended(0)) is not None:
                    raise FlashError(f"{ended}.")
            if time.monotonic() > deadline:
                raise FlashError(f"{self._name(min(missing))} has not connected within {START_S:g} s.")

    def _admit(self, connection: socket.socket, secret: str) -> None:
        try:
            rank = check(connection, secret, self.size)
        except (OSError, EOFError, FlashError):
            connection.close()
            return
        with self._faulty:
            if rank in self._channels or self._closing.is_set():
                connection.close()
            else:
                self._channels[rank] = Channel(connection, lambda what: self._lost(rank, what))

    def _connect(self, views: Views) -> None:
        ranks = range(1, self.size)
        told = [{}, *self.ask({"versions": None})]
        for rank in ranks:
            check_versions(self._name(rank), told[rank].get("versions"))
        addresses = [self._ring.address, *(str(told[rank].get("ring")) for rank in ranks)]
        seen = [views(rank, list(addresses)) for rank in range(self.size)]
        self._ring.probe(seen[0])
        self.ask({"probe": seen})
        for channel in self._channels.values():
            channel.silent_s = JOINING_S
        self._post({"join": seen})
        self._ring.join(seen[0])
        self._answers()
        for channel in self._channels.values():
            channel.silent_s = SILENT_S

    # -- messages --------------------------------------------------------------------------------------------------

    def _post(self, question: dict[str, Any]) -> None:
        self._asked += 1
        self._send({"question": question, "number": self._asked})

    def _answers(self) -> list[dict[str, Any]]:
        answers = []
        for rank in range(1, self.size):
            try:
                header, _ = self._channels[rank].take()
                while (number := header.get("number")) in range(self._asked):  # of a question that was interrupted
                    header, _ = self._channels[rank].take()
            except EOFError:
                self._raise_fault()
                raise FlashError(f"{self._name(rank)} has ended.") from None
            answer = header.get("answer")
            if number != self._asked or not isinstance(answer, dict):
                raise FlashError(f"{self._name(rank)} sends what is not an answer.")
            answers.append(answer)
        for rank, answer in enumerate(answers, 1):
            if "error" in answer:
                raise FlashError(f"{self._name(rank)}: {answer['error']}")
        return answers

    def _send(self, header: dict[str, Any], data: bytes = b"") -> None:
        self._raise_fault()
        for rank in range(1, self.size):
            try:
                self._channels[rank].send(header, data)
            except OSError:
                self._raise_fault()
                raise FlashError(f"{self._name(rank)} has ended.") from None

    # -- faults ----------------------------------------------------------------------------------------------------

    def _lost(self, rank: int, what: str) -> None:
        with self._faulty:
            if self._closing.is_set() or self.fault is not None:
                return
            self.fault = f"{self._name(rank)} {what}{ALL_END}"
        said = self._processes[rank - 1].ended(LAST_WORDS_S) if what == ENDED else None
        if said is not None:
            self.fault = f"{said}{ALL_END}"
        for channel in list(self._channels.values()):  # A rank whose control connection closes ends at once.
            channel.close()
        for process in self._processes:
            with contextlib.suppress(OSError):
                process.kill()
        time.sleep(MLX_PRINTS_S)
        self._on_fault(self.fault)
        self._told.set()

    def _raise_fault(self) -> None:
        if self.fault is not None:
            self._told.wait(TELLING_S)  # `end_process` ends the process meanwhile, with one sentence.
            raise FlashError(self.fault)

    def _name(self, rank: int) -> str:
        return name_of(rank, self._hosts[rank])
