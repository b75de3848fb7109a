"""A control connection with threads of its own: one reads messages, one sends a heartbeat, one watches the other's."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

from . import messages

BEAT_S = 1.0
SILENT_S = 8.0  # A peer that is silent for so long is given up. Loading a model keeps a busy processor for seconds.
# A call that takes so long is given up. A chunk of a prompt may read all units of a layer: 6 GB of the largest mixtures
# take a minute from a disk of 100 MB/s. A call of a dense model's layers lasts while all ranks before this one compute.
STUCK_S = 900.0
ENDED = "has ended"


class Channel:
    """on_fault is called once, in a thread of this object, with what happened, such as "has ended". Then, and after
    `close`, `take` raises EOFError.

    busy_s: for how long this process has been computing a call, in seconds. It goes with the heartbeat, since the
    heartbeat's thread lives on when the main thread hangs.
    """

    def __init__(
        self, connection: socket.socket, on_fault: Callable[[str], None], busy_s: Callable[[], float] = lambda: 0.0
    ) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._on_fault, self._busy_s = on_fault, busy_s
        self._received: queue.SimpleQueue[messages.Message | None] = queue.SimpleQueue()
        self._sending = threading.Lock()
        self._over = threading.Event()
        self._once = threading.Lock()
        self._heard = time.monotonic()
        for target in (self._read, self._beat, self._watch):
            threading.Thread(target=target, daemon=True).start()

    def send(self, header: dict[str, Any], data: bytes = b"") -> None:
        """Raises OSError if the connection has ended, BadMessageError."""
        with self._sending:
            messages.send(self._connection, header, data)

    def take(self) -> messages.Message:
        """Waits for the next message. Raises EOFError."""
        message = self._received.get()
        if message is None:
            self._received.put(None)
            raise EOFError
        return message

    def close(self) -> None:
        self._finish(None)

    def _read(self) -> None:
        try:
            while True:
                message = messages.receive(self._connection, heard=self._hear)
                if "beat" not in message[0]:
                    self._received.put(message)
                elif not isinstance(busy := message[0]["beat"], int | float):
                    raise messages.BadMessageError(f"a heartbeat of {busy!r:.100}")
                elif busy > STUCK_S:
                    self._finish(f"has not finished a call for {STUCK_S:g} s")
        except (OSError, EOFError):
            self._finish(ENDED)
        except (messages.BadMessageError, MemoryError) as error:
            why = str(error).removesuffix(".") or "it is too long for this machine's memory"
            self._finish(f"sends what cannot be read: {why}")

    def _hear(self) -> None:
        """A long message is a sign of life as well, since no heartbeat comes until it has been sent."""
        self._heard = time.monotonic()

    def _beat(self) -> None:
        while not self._over.wait(BEAT_S):
            with contextlib.suppress(OSError):  # The reader notices as well.
                self.send({"beat": round(self._busy_s(), 1)})

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self._over.wait(BEAT_S / 2):
            now = time.monotonic()
            if now - looked > 2 * BEAT_S:  # This process itself was stopped, so it could not hear anything.
                self._heard = now
            looked = now
            if now - self._heard > SILENT_S:
                self._finish(f"has not answered for {SILENT_S:g} s")

    def _finish(self, fault: str | None) -> None:
        with self._once:
            first = not self._over.is_set()
            self._over.set()
        if first:
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()
            self._received.put(None)
            if fault is not None:
                self._on_fault(fault)
