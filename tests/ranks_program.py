"""Rank 0 of a real group, as a process: `python ranks_program.py RANKS WHAT`. It prints JSON. MLX joins one ring per
process, so a test cannot be rank 0 itself."""

from __future__ import annotations

import json
import sys
import time

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

    def product(call: Call) -> None:
        x = group.receive((call.numbers["rows"], 4), mx.bfloat16)
        group.gather(x * group.rank + mx.array(call.ids.sum()).astype(mx.bfloat16))

    def blind(call: Call) -> None:  # does not use x
        group.receive((call.numbers["rows"], 4), mx.bfloat16)
        group.gather(mx.zeros((call.numbers["rows"], 4), mx.bfloat16))

    def hang(_: Call) -> None:
        time.sleep(600)

    def refuse(_: object) -> dict[str, object]:
        raise FlashError("it has another model.")

    handlers.questions["echo"] = lambda value: {"rank": group.rank, "value": value}
    handlers.questions["refuse"] = refuse
    handlers.calls["product"] = product
    handlers.calls["blind"] = blind
    handlers.calls["hang"] = hang


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
        rows = 1 + step % 3
        kind = "blind" if step % 5 == 4 else "product"
        group.call(kind, np.arange(4).reshape(2, 2), layer=step, rows=rows)
        x = group.spread(mx.full((rows, 4), 2, mx.bfloat16) + step % 2)
        gathered = group.gather(x * 0)
        sums.append(gathered.astype(mx.float32).sum(axis=(1, 2)).tolist())
    try:
        group.ask({"refuse": None})
        refused = ""
    except FlashError as error:
        refused = str(error)
    return {"answers": answers, "sums": sums, "refused": refused, "again": len(group.ask({"echo": None}))}


def expected(size: int) -> dict[str, object]:
    sums = []
    for step in range(20):
        rows, x = 1 + step % 3, 2 + step % 2
        sums.append([0.0] + [0.0 if step % 5 == 4 else rows * 4.0 * (x * rank + 6) for rank in range(1, size)])
    return {
        "answers": [{"rank": rank, "value": [1, "two"]} for rank in range(1, size)],
        "sums": sums,
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
    elif what == "stuck":  # waits in MLX for ranks that know nothing of it
        with group.guarded():
            mx.eval(group.gather(mx.zeros((1, 4))))
    elif what == "hang":  # the main thread of another rank, while its heartbeat lives
        channel.STUCK_S = 1.0
        group.call("hang", np.arange(1))
        with group.guarded():
            mx.eval(group.gather(mx.zeros((1, 4))))
    elif what == "steps":  # works without end
        with group.guarded():
            for step in range(10**9):
                group.call("product", np.arange(4), layer=step, rows=1)
                mx.eval(group.gather(group.spread(mx.ones((1, 4), mx.bfloat16))))
    elif what == "idle":
        time.sleep(60)
    group.close()


if __name__ == "__main__":
    try:
        main(int(sys.argv[1]), sys.argv[2])
    except FlashError as error:
        sys.exit(str(error))
