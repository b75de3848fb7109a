"""MLX's own group over a ring of TCP connections, which carries activations."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator

import mlx.core as mx

from ..errors import FlashError

PROBE_S = 5.0
JOIN_S = 10.0  # MLX's init keeps the interpreter's lock, so nothing of ours could end it later
LAST_LATER_S = 0.05  # The last rank connects first. A refused connection costs it a second.


class Ring:
    """A rank's place in the ring: rank r listens, and rank r - 1 connects to it. One process joins one ring."""

    def __init__(self, rank: int, size: int, address: str) -> None:
        """Listens on a free port of the address. Raises FlashError."""
        self.rank, self.size, self._ip = rank, size, address
        self._group: mx.distributed.Group | None = None
        try:
            # A socket that is bound and does not listen keeps the port for MLX, which sets SO_REUSEPORT as well.
            self._kept = _bound(address, 0)
            self._listener: socket.socket | None = _bound(address, self._kept.getsockname()[1])
            self._listener.listen()
        except OSError as error:
            raise FlashError(
                f"rank {rank} cannot listen on {address}: {error.strerror}. Give its own address in the host file."
            ) from None
        self.address = f"{address}:{self._kept.getsockname()[1]}"

    def probe(self, addresses: list[str]) -> None:
        """Tries whether the next rank can be reached. Raises FlashError with a sentence for the user."""
        following = (self.rank + 1) % self.size
        host, port = addresses[following].rsplit(":", 1)
        try:
            socket.create_connection((host, int(port)), PROBE_S, source_address=(self._ip, 0)).close()
        except OSError as error:
            raise FlashError(
                f"rank {self.rank} cannot reach rank {following} at {host}: {error.strerror or error}. Check the "
                "addresses in the host file and the firewalls."
            ) from None

    def join(self, addresses: list[str]) -> None:
        """Connects to the others through MLX; all ranks must do so together. addresses: "ip:port" by rank.

        If a rank does not come within JOIN_S, the process ends. Raises FlashError.
        """
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        if self.rank == self.size - 1:
            time.sleep(LAST_LATER_S)
        try:
            with _told_to_mlx(self.rank, addresses), _at_most(JOIN_S):
                self._group = mx.distributed.init(strict=True, backend="ring")
        except (RuntimeError, ValueError) as error:
            raise FlashError(f"rank {self.rank} cannot join the ring: {error}") from None
        self._kept.close()
        if (self._group.rank(), self._group.size()) != (self.rank, self.size):
            raise FlashError("this process already belongs to another group of ranks; start a new process.")

    def spread(self, x: mx.array) -> mx.array:
        self.send_next(x)
        return x

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        group = self._joined()
        x = mx.distributed.recv(shape, dtype, self.rank - 1, group=group)
        if self.rank + 1 < self.size:
            x = mx.distributed.send(x, self.rank + 1, group=group)
        mx.async_eval(x)
        return x

    def gather(self, y: mx.array) -> mx.array:
        gathered = mx.distributed.all_gather(y, group=self._joined())  # (size * n, ...)
        mx.async_eval(gathered)
        return gathered.reshape(self.size, *y.shape)

    def send_next(self, x: mx.array) -> None:
        mx.async_eval(mx.distributed.send(x, (self.rank + 1) % self.size, group=self._joined()))

    def receive_previous(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        x = mx.distributed.recv(shape, dtype, (self.rank - 1) % self.size, group=self._joined())
        mx.async_eval(x)
        return x

    def close(self) -> None:
        self._kept.close()
        if self._listener is not None:
            self._listener.close()

    def _joined(self) -> mx.distributed.Group:
        if self._group is None:
            raise FlashError("the ranks are not connected yet.")
        return self._group


def _bound(address: str, port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.bind((address, port))
    except OSError:
        found.close()
        raise
    return found


@contextlib.contextmanager
def _told_to_mlx(rank: int, addresses: list[str]) -> Iterator[None]:
    """MLX reads the rank and a file of addresses from the environment."""
    before = {name: os.environ.get(name) for name in ("MLX_RANK", "MLX_HOSTFILE")}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([[address] for address in addresses], file)
        file.flush()
        os.environ.update(MLX_RANK=str(rank), MLX_HOSTFILE=file.name)
        try:
            yield
        finally:
            for name, value in before.items():
                if value is None:
                    os.environ.pop(name, None)
                else:
                    os.environ[name] = value


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Ends the process, from a thread in C, if the block takes longer."""
    try:
        faulthandler.dump_traceback_later(seconds, exit=True, file=sys.__stderr__ or 2)
    except (OSError, ValueError, RuntimeError):  # standard error is closed
        yield
        return
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()
