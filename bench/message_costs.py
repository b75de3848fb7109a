"""What do the messages of a layer cost, over the control connections and in MLX's ring, with latency between the ranks?

Each rank is a process in a network namespace of its own. Packets between namespaces are carried by a small program that
holds each for a fixed time. Rank 0 measures short messages, gathers in the ring, and the whole exchange of a layer in
two ways: as the ranks do it (the ids with x on each control connection, and the outputs back), and with MLX's ring (ids
on the control connections, x down the chain, a gather). The model of tools/rank_costs.py is fitted to the messages and
compared with the exchanges.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.cli.stopping import end_with_stdin
from mlx_flash.errors import FlashError
from mlx_flash.source.children import child_environment

from .quality import say
from .tools import figures, subprocess_json
from .tools.namespaces import Machines, machines
from .tools.rank_costs import Link, exchange_seconds, ring_seconds
from .tools.report import environment

DELAYS_MS = (0.0, 0.05, 0.3, 1.0)
HIDDEN = 2048  # x is one row of so many float32 numbers
SIZES = (4096, 16384, 65536, 262144)  # bytes of a rank's outputs
WARM_UP = 5  # rounds
IDS_BYTES = 64  # of a control message
RING_PORT, CONTROL_PORT = 5700, 5701
PART = "mlx_flash.bench.message_costs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=whole_number(2), action="append", help="may be repeated (default: 2 and 4)")
    parser.add_argument(
        "--delay-ms", type=float, action="append", help=f"each way; may be repeated (default: {DELAYS_MS})"
    )
    parser.add_argument(
        "--pairs", type=whole_number(1), default=5, help="rows of y on each rank (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=whole_number(10), default=200, help="to take the median of (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    results = []
    for delay_ms in arguments.delay_ms or DELAYS_MS:
        for count in arguments.ranks or (2, 4):
            say(f"{count} ranks, {delay_ms:g} ms each way")
            with machines(count, delay_ms / 1e3) as made:
                found = measure(made, arguments.pairs, arguments.rounds)
            results.append({"ranks": count, "delay_ms": delay_ms, **found, **compared(count, arguments.pairs, found)})
    show(results)
    result = {
        "command": "message-costs",
        "environment": environment(Path(tempfile.gettempdir())),
        "pairs": arguments.pairs,
    }
    print(json.dumps({**result, "rows": results}))


def measure(made: Machines, pairs: int, rounds: int) -> dict[str, Any]:
    """Starts the ranks and returns what rank 0 found, seconds each."""
    question = {"addresses": made.addresses, "pairs": pairs, "rounds": rounds}
    with ExitStack() as stack:
        for rank in reversed(range(len(made.names))):
            words = [
                sys.executable,
                "-B",
                "-m",
                "mlx_flash.bench.message_costs",
                json.dumps([{**question, "rank": rank}]),
            ]
            command, own = made.command(rank, words), made.environment()
            child = subprocess.Popen(
                command, env=child_environment(**own), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            stack.enter_context(child)
            stack.callback(child.kill)
        assert child.stdout is not None
        output = child.stdout.read()  # `communicate` would close the input, with which a rank ends.
        if child.wait() != 0:
            raise FlashError("rank 0 failed (see above).")
    found: dict[str, Any] = json.loads(output.splitlines()[-1])
    return found


def compared(ranks: int, pairs: int, found: dict[str, Any]) -> dict[str, Any]:
    """The link fitted to the messages, and the exchanges computed from it."""
    steps = ranks - 1
    per_byte = _per_byte([found[f"answer {size}"] / steps for size in SIZES])
    gathers = [found[f"gather {size}"] / steps for size in SIZES]
    in_ring = _per_byte(gathers)
    message = max(0.0, median(seconds - in_ring * size for seconds, size in zip(gathers, SIZES, strict=True)))
    link, ring = Link(message, found["control"] / 2, 1 / per_byte), Link(message, found["control"] / 2, 1 / in_ring)
    x_bytes = 4 * HIDDEN
    return {
        "link": vars(link),
        "ring_rate": ring.bytes_per_second,
        "exchange_computed": exchange_seconds(link, ranks, x_bytes, x_bytes * pairs),
        "ring_computed": ring_seconds(ring, ranks, x_bytes, x_bytes * pairs),
    }


def _per_byte(times: list[float]) -> float:
    """Seconds per byte, from the seconds for each of SIZES."""
    return max(1e-12, float(np.polyfit(SIZES, times, 1, w=1 / np.array(times))[0]))


def show(results: list[dict[str, Any]]) -> None:
    head = [
        "ranks",
        "delay ms",
        "control ms",
        "GB/s",
        "exchange",
        "computed",
        "message ms",
        "ring",
        "computed",
        "spins",
    ]
    rows = []
    for row in results:
        link = row["link"]
        rows.append(
            [
                str(row["ranks"]), f"{row['delay_ms']:g}", f"{1e3 * link['control_s']:.3f}",
                f"{link['bytes_per_second'] / 1e9:.2f}", f"{1e3 * row['exchange']:.3f}",
                f"{1e3 * row['exchange_computed']:.3f}", f"{1e3 * link['message_s']:.3f}", f"{1e3 * row['ring']:.3f}",
                f"{1e3 * row['ring_computed']:.3f}", f"{row['spinning']:.2f}",
            ]
        )  # fmt: skip
    figures.table(head, rows)


# -- in the ranks ----------------------------------------------------------------------------------------------------


class Rank:
    """One process. All ranks run the same list of measurements; rank 0 keeps the times."""

    def __init__(self, rank: int, addresses: list[str]) -> None:
        self.rank, self.size = rank, len(addresses)
        self.control = self._connect(addresses)
        with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
            json.dump([[f"{address}:{RING_PORT}"] for address in addresses], file)
        os.environ |= {"MLX_RANK": str(rank), "MLX_HOSTFILE": file.name}
        self.group = mx.distributed.init(strict=True, backend="ring")
        Path(file.name).unlink()

    def _connect(self, addresses: list[str]) -> list[socket.socket]:
        """Rank 0: a connection for each other rank, in their order. Others: one, to rank 0."""
        where = (addresses[0], CONTROL_PORT)
        if self.rank == 0:
            with socket.create_server(where) as server:
                accepted = [server.accept()[0] for _ in range(self.size - 1)]
            connections = sorted(accepted, key=lambda connection: connection.recv(1)[0])
        else:
            connections = [_patiently(lambda: socket.create_connection(where))]
            connections[0].sendall(bytes([self.rank]))
        for connection in connections:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connections

    def send(self, nbytes: int) -> None:
        for connection in self.control:
            connection.sendall(bytes(nbytes))

    def receive(self, nbytes: int) -> None:
        for connection in self.control:
            left = nbytes
            while left:
                left -= len(connection.recv(left)) or _lost()

    def gather(self, y: mx.array) -> mx.array:
        return mx.distributed.all_gather(y[None], group=self.group)

    def answer(self, nbytes: int, back: int) -> None:
        """A control message to every rank and one of `back` bytes from every rank."""
        if self.rank == 0:
            self.send(nbytes)
            self.receive(back)
        else:
            self.receive(nbytes)
            self.send(back)

    def in_ring(self, x: mx.array, pairs: int) -> None:
        """A layer's messages with MLX's ring: ids on the control connections, x down the chain, and a gather of `pairs`
        rows of each rank."""
        if self.rank == 0:
            self.send(IDS_BYTES)
            mx.async_eval(mx.distributed.send(x, 1, group=self.group))
            rows = x
        else:
            self.receive(IDS_BYTES)
            rows = mx.distributed.recv(x.shape, x.dtype, self.rank - 1, group=self.group)
            if self.rank + 1 < self.size:
                mx.async_eval(mx.distributed.send(rows, self.rank + 1, group=self.group))
        y = mx.repeat(rows, pairs, axis=0)
        mx.eval(self.gather(y))

    def spinning(self, seconds: float = 0.5) -> float:
        """Rank 1's processor time per second while it waits for rank 0, which sleeps; seen by rank 0."""
        x = mx.zeros(16)
        if self.rank == 0:
            time.sleep(seconds)
            mx.eval(mx.distributed.send(x, 1, group=self.group))
            return float(mx.distributed.recv_like(x, 1, group=self.group).max())
        if self.rank == 1:
            before = time.process_time()
            mx.eval(mx.distributed.recv_like(x, 0, group=self.group))
            took = (time.process_time() - before) / seconds
            mx.eval(mx.distributed.send(mx.full(16, took), 0, group=self.group))
        return 0.0

    def times(
        self, steps: dict[str, Callable[[], object]], rounds: int, meet: Callable[[], object]
    ) -> dict[str, float]:
        """The median seconds of each step. The steps take turns. meet: called before each, so that all ranks wait for
        each other."""
        taken: dict[str, list[float]] = {name: [] for name in steps}
        for turn in range(rounds + WARM_UP):
            for name, step in steps.items():
                meet()
                began = time.perf_counter()
                step()
                if turn >= WARM_UP:
                    taken[name].append(time.perf_counter() - began)
        return {name: median(times) for name, times in taken.items()}


def work(question: dict[str, Any]) -> dict[str, Any]:
    end_with_stdin()  # A rank that waits in MLX outlives an interrupted parent otherwise, and keeps a core busy.
    rank = Rank(question["rank"], question["addresses"])
    pairs = question["pairs"]
    x = mx.random.normal((1, HIDDEN))
    mx.eval(x)

    def answer(nbytes: int) -> Callable[[], object]:
        return lambda: rank.answer(IDS_BYTES, nbytes)

    def gather(nbytes: int) -> Callable[[], object]:
        y = mx.zeros(nbytes // 4)
        return lambda: mx.eval(rank.gather(y + 1))

    own = {
        "control": lambda: rank.answer(IDS_BYTES, IDS_BYTES),
        "exchange": lambda: rank.answer(IDS_BYTES + x.nbytes, pairs * x.nbytes),
        **{f"answer {size}": answer(size) for size in SIZES},
    }
    in_ring = {"ring": lambda: rank.in_ring(x, pairs), **{f"gather {size}": gather(size) for size in SIZES}}
    # A rank that still waits in the ring would slow down the other way, so that comes first.
    found: dict[str, Any] = rank.times(own, question["rounds"], lambda: rank.answer(1, 1))
    found |= rank.times(in_ring, question["rounds"], lambda: mx.eval(rank.gather(mx.zeros(1))))
    found["spinning"] = rank.spinning()
    mx.eval(rank.gather(mx.zeros(1)))  # no rank leaves before the others are done
    return found


def _patiently(connect: Callable[[], socket.socket]) -> socket.socket:
    """Tries for 20 seconds, because the other process may begin later."""
    for _ in range(200):
        try:
            return connect()
        except OSError:
            time.sleep(0.1)
    return connect()


def _lost() -> int:
    raise FlashError("the other rank closed its connection.")


if __name__ == "__main__":
    subprocess_json.answer(work)
