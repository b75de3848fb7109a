"""Rank 0: it starts the other ranks, asks them, sends them calls, and ends them."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..errors import FlashError
from .arrays import packed, unpacked_result
from .channel import ENDED, Channel
from .greetings import Greetings
from .hosts import RankHost
from .later_interrupts import interrupts_later
from .messages import BadMessageError, Message
from .secret import new_secret
from .starting import ENDING_S, RankProcess, Wrap, name_of
from .versions import check_versions

ALL_END = ", so the generation ends on all machines."
LAST_WORDS_S = 0.5  # for a process whose connection has closed to end
TELLING_S = 2.0
START_S = 20.0  # for all ranks to start Python and to connect


def end_process(sentence: str) -> None:
    """Ends this process, whatever its main thread waits for."""
    with contextlib.suppress(OSError, ValueError):
        print(sentence, file=sys.stderr, flush=True)
    os._exit(1)


class Leader:
    """Rank 0's `Group`. Only one thread may use it at a time."""

    def __init__(
        self,
        hosts: list[RankHost],
        environment: Mapping[str, str],
        *,
        say: Callable[[str], None] = lambda _: None,
        on_fault: Callable[[str], None] = end_process,
        wrap: Wrap | None = None,
    ) -> None:
        """Starts every rank but the first of `hosts`, and connects them.

        on_fault: called once, in a thread of its own, with a sentence that names a rank that has ended or hangs; the
        other ranks are told to end before that. environment: for the processes that are started on this machine, as
        `child_environment` gives it. wrap: see RankProcess.

        Raises FlashError; no other rank is left then.
        """
        self.size = len(hosts)
        self.names: Sequence[str] = [host.ssh for host in hosts]
        self.fault: str | None = None
        self.bytes_read = 0
        self._hosts, self._on_fault = hosts, on_fault
        self._closing = threading.Event()
        self._faulty = threading.Lock()
        self._told = threading.Event()  # on_fault has returned
        self._channels: dict[int, Channel] = {}
        self._processes: list[RankProcess] = []
        self._sent = 0  # questions and calls
        self._awaited = 0  # the number of the last one that is answered
        self._called: Sequence[int] = ()  # the ranks that it went to
        try:
            self._start(say, environment, wrap)
            self._compare()
        except BaseException:
            self._closing.set()
            for process in self._processes:
                process.kill()
            self.close()
            raise

    # -- what a Group does -----------------------------------------------------------------------------------------

    def ask(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        self._called = range(1, self.size)
        self._await({"question": question})
        answers = []
        for rank in self._called:
            header, _ = self._received(rank)
            if not isinstance(answer := header.get("answer"), dict):
                raise FlashError(f"{self._name(rank)} sends what is not an answer.")
            answers.append(answer)
        for rank, answer in enumerate(answers, 1):
            if "error" in answer:
                raise FlashError(f"{self._name(rank)}: {answer['error']}")
        return answers

    def call(
        self,
        kind: str,
        ids: np.ndarray,
        arrays: Sequence[mx.array] = (),
        ranks: Sequence[int] | None = None,
        **numbers: int,
    ) -> None:
        forms, data = packed(arrays)
        self._called = range(1, self.size) if ranks is None else ranks
        self._await({**_header(kind, ids, numbers), "arrays": forms}, _bytes_of(ids) + data)

    def tell(self, kind: str, ids: np.ndarray, **numbers: int) -> None:
        self._send(range(1, self.size), {**_header(kind, ids, numbers), "arrays": []}, _bytes_of(ids))

    def results(self, shapes: Sequence[Sequence[int | None]], dtype: mx.Dtype | None = None) -> list[mx.array]:
        received = [self._received(rank) for rank in self._called]
        for rank, (header, _) in zip(self._called, received, strict=True):
            if "error" in header:
                raise FlashError(f"{self._name(rank)}: {header['error']}")
        arrays = []
        for rank, (header, data), shape in zip(self._called, received, shapes, strict=True):
            try:
                arrays.append(unpacked_result(header.get("arrays"), data, shape, dtype))
            except BadMessageError as error:
                raise FlashError(f"{self._name(rank)}: {error}") from None
        return arrays

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
        secret, own_address = new_secret(), self._hosts[0].address
        greetings = Greetings(secret, self.size, self._admit)
        try:
            listening = socket.create_server((own_address, 0), backlog=64)
        except OSError as error:
            raise FlashError(
                f"rank 0 cannot listen on {own_address}: {os.strerror(error.errno or 0)}. The first machine of the "
                "host file must be this one; give its own address there."
            ) from None
        with listening as server, contextlib.closing(greetings):
            address = server.getsockname()
            for rank, host in enumerate(self._hosts[1:], 1):
                setup = {"rank": rank, "size": self.size, "leader": list(address), "address": host.address}
                own = {"model": host.model, "memory": host.memory}
                process = RankProcess(rank, host, setup | own | {"secret": secret}, say, environment, wrap)
                self._processes.append(process)
            self._accept(server, greetings)

    def _accept(self, server: socket.socket, greetings: Greetings) -> None:
        """Waits until every rank has connected. Connections of others are dropped."""
        deadline = time.monotonic() + START_S
        server.settimeout(0.1)
        while missing := set(range(1, self.size)) - set(self._channels):
            with contextlib.suppress(TimeoutError, ConnectionError):
                greetings.begin(server.accept()[0])
            for rank in missing:
                if (ended := self._processes[rank - 1].ended(0)) is not None:
                    raise FlashError(f"{ended}.")
            if time.monotonic() > deadline:
                raise FlashError(f"{self._name(min(missing))} has not connected within {START_S:g} s.")

    def _admit(self, rank: int, connection: socket.socket) -> bool:
        with self._faulty:
            if rank in self._channels or self._closing.is_set():
                return False
            self._channels[rank] = Channel(connection, lambda what: self._lost(rank, what))
            return True

    def _compare(self) -> None:
        for rank, answer in enumerate(self.ask({"versions": None}), 1):
            check_versions(self._name(rank), answer.get("versions"))

    # -- messages --------------------------------------------------------------------------------------------------

    def _await(self, header: dict[str, Any], data: bytes = b"") -> None:
        self._awaited = self._sent + 1
        self._send(self._called, header, data)

    def _send(self, ranks: Sequence[int], header: dict[str, Any], data: bytes = b"") -> None:
        self._raise_fault()
        self._sent += 1
        with interrupts_later():  # A part of a message would spoil the connection.
            for rank in ranks:
                try:
                    self._channels[rank].send({**header, "number": self._sent}, data)
                except OSError:
                    raise self._gone(rank) from None

    def _received(self, rank: int) -> Message:
        """What a rank answers to what is awaited. Answers to what came before, which nobody waited for, go."""
        try:
            number: object = 0
            while number in range(self._awaited):
                message = self._channels[rank].take()
                number = message[0].get("number")
                if type(read := message[0].get("read")) is int:
                    self.bytes_read += read
        except EOFError:
            raise self._gone(rank) from None
        if number != self._awaited and "error" not in message[0]:
            raise FlashError(f"{self._name(rank)} sends what is not an answer.")
        return message

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
        self._on_fault(self.fault)
        self._told.set()

    def _raise_fault(self) -> None:
        if self.fault is not None:
            self._told.wait(TELLING_S)  # `end_process` ends the process meanwhile, with one sentence.
            raise FlashError(self.fault)

    def _gone(self, rank: int) -> FlashError:
        """What to raise where a rank's connection has closed. `_lost` finds out why meanwhile, in another thread."""
        self._told.wait(LAST_WORDS_S + TELLING_S)
        return FlashError(self.fault or f"{self._name(rank)} has ended.")

    def _name(self, rank: int) -> str:
        return name_of(rank, self._hosts[rank])


def _header(kind: str, ids: np.ndarray, numbers: dict[str, int]) -> dict[str, Any]:
    return {"call": kind, "numbers": numbers, "shape": ids.shape}


def _bytes_of(ids: np.ndarray) -> bytes:
    return ids.astype(np.int32, copy=False).tobytes()
