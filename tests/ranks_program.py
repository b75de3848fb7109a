"""Rank 0 of a real group, as a process: `python ranks_program.py RANKS WHAT`. It prints JSON. A fault ends the process,
so a test cannot be rank 0 itself."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable

import mlx.core as mx
import numpy as np

from mlx_flash.errors import FlashError
from mlx_flash.ranks import channel
from mlx_flash.ranks.group import Call, Group, Handlers
from mlx_flash.ranks.hosts import local_hosts
from mlx_flash.ranks.leader import Leader
from mlx_flash.source.children import child_environment

OTHER_RANKS = "import json, sys, ranks_program; ranks_program.other_rank(json.loads(sys.stdin.readline()))"


def register(group: Group, handlers: Handlers) -> None:
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
        results = group.results()
        assert all(y.shape == (rows, 4) and y.dtype == mx.bfloat16 for y in results)
        sums.append([y.astype(mx.float32).sum().item() for y in results])
    group.call("product", np.arange(4), [mx.zeros((0, 3), mx.float16)])
    empty = [list(y.shape) for y in group.results()]
    read = group.bytes_read
    noted = [answer["noted"] for answer in group.ask({"notes": None})]
    said = []
    for kind in ("fail", "unknown"):
        group.call(kind, np.arange(1))
        said.append(_said(group.results))
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
    group = Leader(local_hosts(ranks), child_environment(), wrap=wrap)
    print(json.dumps({"pids": group.pids}), flush=True)
    if what == "use":
        print(json.dumps(use(group)), flush=True)
    elif what == "stuck":  # waits for ranks that do not reply
        group.call("note", np.arange(1), layer=0)
        group.results()
    elif what == "hang":  # the main thread of another rank, while its heartbeat lives
        channel.STUCK_S = 1.0
        group.call("hang", np.arange(1))
        group.results()
    elif what == "steps":  # works without end
        for step in range(10**9):
            group.call("product", np.arange(4), [mx.ones((1, 4), mx.bfloat16)], layer=step)
            group.results()
    elif what == "idle":
        time.sleep(60)
    group.close()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2])
    except FlashError as error:
        sys.exit(str(error))
