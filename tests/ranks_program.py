"""Rank 0 of a real group, as a process: `python ranks_program.py RANKS WHAT`. It prints JSON. A fault ends the process,
so a test cannot be rank 0 itself."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import flooding  # type: ignore[import-not-found]  # found beside this file
import mlx.core as mx
import numpy as np

from mlx_flash.cli.beginning import Interrupted
from mlx_flash.errors import FlashError
from mlx_flash.ranks import channel, leader
from mlx_flash.ranks.greetings import Greetings
from mlx_flash.ranks.group import Call, FollowingGroup, Group, Handlers
from mlx_flash.ranks.hosts import local_hosts
from mlx_flash.ranks.leader import Leader
from mlx_flash.source.children import child_environment

AFTER = "CONNECT_AFTER"  # the file that other ranks wait for before they connect, if it is set
OTHER_RANKS = "import json, sys, ranks_program; ranks_program.other_rank(json.loads(sys.stdin.readline()))"


def register(group: FollowingGroup, handlers: Handlers) -> None:
    """Each rank multiplies x by its rank."""
    noted: list[int] = []
    handlers.bytes_read = lambda: 10 * len(noted)

    def product(call: Call) -> mx.array:
        (x,) = call.arrays
        return x * group.rank + mx.array(call.ids.sum()).astype(x.dtype)

    def note(call: Call) -> None:  # returns nothing
        noted.append(call.numbers["layer"])

    def notes(_: object) -> dict[str, object]:
        return {"noted": noted}

    def fail(_: Call) -> mx.array:
        raise FlashError("its disk is broken.")

    def hang(_: Call) -> mx.array:
        time.sleep(600)
        raise AssertionError

    def refuse(_: object) -> dict[str, object]:
        raise FlashError("it has another model.")

    handlers.questions["echo"] = lambda value: {"rank": group.rank, "value": value}
    handlers.questions["refuse"] = refuse
    handlers.questions["notes"] = notes
    handlers.calls.update(product=product, note=note, fail=fail, hang=hang)


def other_rank(setup: dict[str, object]) -> None:
    import os

    from mlx_flash.ranks.follower import Follower
    from mlx_flash.ranks.group import follow

    while AFTER in os.environ and not Path(os.environ[AFTER]).exists():
        time.sleep(0.01)
    handlers = Handlers()
    group = Follower(setup, handlers)
    register(group, handlers)
    follow(group, handlers)
    os._exit(0)


def use(group: Group) -> dict[str, object]:
    """The same steps for every form of a Group; the result is compared with what is expected."""
    answers = group.ask({"echo": [1, "two"]})
    sums = []
    for step in range(20):
        rows, ranks = 1 + step % 3, [1] if step % 5 == 4 else None
        group.call("product", np.arange(4), [mx.zeros((2, 2))])  # is not waited for, as after Ctrl-C
        x = mx.full((4, rows), 2, mx.bfloat16).T + step % 2
        group.call("product", np.arange(4).reshape(2, 2), [x], ranks, layer=step)
        group.tell("note", np.zeros(0, np.int32), layer=step)
        results = group.results([(rows, 4)] * (1 if ranks else group.size - 1), mx.bfloat16)
        sums.append([y.astype(mx.float32).sum().item() for y in results])
    group.call("product", np.arange(4), [mx.zeros((0, 3), mx.float16)])
    empty = [list(y.shape) for y in group.results([(None, 3)] * (group.size - 1))]
    read = group.bytes_read
    noted = [answer["noted"][-20:] for answer in group.ask({"notes": None})]
    said = []
    for kind in ("fail", "unknown"):
        group.call(kind, np.arange(1))
        said.append(_said(lambda: group.results([()] * (group.size - 1))))
    for shape, dtype in (((1, 4), None), ((2,), None), ((2, None, 1), None), ((2, None), mx.float16)):
        group.call("product", np.arange(1), [mx.zeros((2, 4))])
        said.append(_said(partial(group.results, [shape] * (group.size - 1), dtype)))
    said.append(_said(lambda: group.ask({"refuse": None})))
    said.append(_said(lambda: group.call("product", np.arange(1), [mx.zeros(1, mx.complex64)])))
    again = len(group.ask({"echo": None}))
    return {
        "read": read,
        "answers": answers,
        "sums": sums,
        "empty": empty,
        "noted": noted,
        "said": said,
        "again": again,
    }


def interrupted(group: Group, most: int) -> int:
    """Works while Ctrl-C comes at random moments. Returns how often it came; what each step returns must be right."""
    source, came, listening = random.Random(0), 0, False

    def interrupt(*_: object) -> None:
        nonlocal came, listening
        if listening:
            came, listening = came + 1, False
            raise Interrupted

    def press() -> None:
        while came < most:
            time.sleep(source.random() / 500)
            os.kill(os.getpid(), signal.SIGINT)

    signal.signal(signal.SIGINT, interrupt)
    threading.Thread(target=press, daemon=True).start()
    step = 0
    while came < most:
        step += 1
        with contextlib.suppress(Interrupted):
            listening = True
            if step % 10 == 0:
                assert [each["value"] for each in group.ask({"echo": step})] == [step] * (group.size - 1)
            if step % 3 == 0:
                group.tell("note", np.zeros(0, np.int32), layer=step)
            ranks = [1] if step % 4 == 3 else range(1, group.size)
            width = 1 << 20 if step % 5 == 0 else 1 + step  # A long message is interrupted while it is being sent.
            group.call("product", np.array([step]), [mx.full((1, width), float(step))], ranks, layer=step)
            for rank, y in zip(ranks, group.results([(1, width)] * len(ranks), mx.float32), strict=True):
                assert (y == step * rank + step).all().item()
            listening = False
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    return came


floods: list[subprocess.Popen[bytes]] = []  # They end when their standard input closes.


def flood(address: tuple[str, int]) -> None:
    process = subprocess.Popen(
        [sys.executable, flooding.__file__, *map(str, address), "150"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    floods.append(process)
    assert process.stdout is not None and process.stdout.readline() == b"open\n"
    Path(os.environ[AFTER]).touch()


def _said(act: Callable[[], object]) -> str:
    try:
        act()
        return ""
    except FlashError as error:
        return str(error)


def expected(size: int) -> dict[str, object]:
    """What `use` returns, but the sentences."""
    sums = []
    for step in range(20):
        rows, x = 1 + step % 3, 2 + step % 2
        sums.append([rows * 4.0 * (x * rank + 6) for rank in range(1, 2 if step % 5 == 4 else size)])
    return {
        "answers": [{"rank": rank, "value": [1, "two"]} for rank in range(1, size)],
        "sums": sums,
        "empty": [[0, 3]] * (size - 1),
        "read": 10 * 20 * (size - 1),
        "noted": [list(range(20))] * (size - 1),
        "again": size - 1,
    }


def main(ranks: int, what: str) -> None:
    wrap = lambda rank, command: [command[0], "-c", OTHER_RANKS]  # noqa: E731
    if what == "broken":
        wrap = lambda rank, command: [command[0], "-c", "raise SystemExit('no such module')"]  # noqa: E731
    if what == "flooded":
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        leader.START_S = 60.0
        accept = Leader._accept

        def flooded(group: Leader, server: socket.socket, greetings: Greetings) -> None:
            threading.Thread(target=flood, args=(server.getsockname(),)).start()
            accept(group, server, greetings)

        Leader._accept = flooded  # type: ignore
    group = Leader(local_hosts(ranks), child_environment(), wrap=wrap)
    print(json.dumps({"pids": group.pids}), flush=True)
    sys.stdin.readline()  # until the test knows their processes
    if what in ("use", "flooded"):
        print(json.dumps(use(group)), flush=True)
    elif what == "interrupted":
        print(interrupted(group, 300), flush=True)
        print(json.dumps(use(group)), flush=True)
    elif what == "stuck":  # waits for ranks that do not reply
        group.call("note", np.arange(1), layer=0)
        group.results([(1, 4)] * (ranks - 1))
    elif what == "hang":  # the main thread of another rank, while its heartbeat lives
        channel.STUCK_S = 1.0
        group.call("hang", np.arange(1))
        group.results([(1, 4)] * (ranks - 1))
    elif what == "steps":  # works without end
        for step in range(10**9):
            group.call("product", np.arange(4), [mx.ones((1, 4), mx.bfloat16)], layer=step)
            group.results([(1, 4)] * (ranks - 1))
    elif what == "idle":
        time.sleep(60)
    group.close()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2])
    except FlashError as error:
        sys.exit(str(error))
