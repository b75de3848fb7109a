"""What do several ranks bring? Tokens per second on 1, 2 and 4 ranks, each with its own memory and disk.

A synthetic mixture of experts, or a dense model, is written. Each rank is a process in a network namespace and a memory
cgroup of its own, and its reads are held at a fixed rate, so two ranks have twice the memory and twice the disk. They
share the processor's cores, though. Packets between ranks are held for a fixed time, those of the heartbeat included.
All decode the same tokens, drawn at random; their logits must have the same bits. Beside each measurement stands what
tools/rank_costs.py computes from the messages alone, measured between the same namespaces, and the time of one rank.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import FlashError
from mlx_flash.source.children import child_environment

from . import message_costs
from .quality import say
from .synthetic.dense_checkpoint import write_dense
from .synthetic.mixture_checkpoint import Shape, write_mixture
from .tools import figures, subprocess_json
from .tools.cgroup import run_child
from .tools.namespaces import Machines, machines
from .tools.pacing import paced_environment
from .tools.rank_costs import Link, exchange_seconds, largest_share, token_seconds
from .tools.report import environment

FOUR_BITS = {"group_size": 64, "bits": 4}
SHAPE = Shape("qwen3_moe", 6, 1024, 1024, 128, 8, 8, 2, 64, FOUR_BITS, True)
REPEATED = 0.2  # share of a token's experts that the next token reuses: most of them change, so much is read
SHARE = 0.25  # of the experts that one rank's memory has room for
FOR_RANKS = 90 * 10**6  # bytes more for each of several ranks, for the messages of a prompt's chunk
FOR_RANKS_DENSE = 10 * 10**6
CONTEXT = 512
DELAYS_MS = (0.0, 0.05, 0.3, 1.0)
WARM_UP = 32  # tokens
DENSE_SHAPE, DENSE_LAYERS, DENSE_TYPE = "1b", 16, "4bit"
WARM_UP_DENSE = 4
MESSAGE_ROUNDS = 40
PART = "mlx_flash.bench.several_ranks"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ranks", type=whole_number(1, 8), action="append", help="repeatable (default: 1, 2 and 4)")
    parser.add_argument("--delay-ms", type=float, action="append", help=f"each way; repeatable (default: {DELAYS_MS})")
    parser.add_argument("--tokens", type=whole_number(4), default=64, help="to time (default: %(default)s)")
    parser.add_argument(
        "--dense", action="store_true", help="a dense model, whose layers are shared out in ranges (default: a mixture)"
    )
    parser.add_argument(
        "--disk",
        type=whole_number(1),
        default=60,
        metavar="MB",
        help="MB per second of each rank (default: %(default)s)",
    )


def main(arguments: argparse.Namespace) -> None:
    counts = sorted({1, *(arguments.ranks or (1, 2, 4))})  # all are compared with one
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="mlx_flash-ranks-") as folder:
        path = Path(folder) / "model"
        if arguments.dense:
            write_dense(path, DENSE_SHAPE, DENSE_LAYERS, DENSE_TYPE, 0)
        else:
            write_mixture(path, SHAPE, SHAPE.layers, mx.float32, 0, REPEATED)
        budget = subprocess_json.ask(PART, ["budget", {"model": str(path)}], "the plan")["budget"]
        question = {"model": str(path), "tokens": arguments.tokens, "cache": folder}
        question["warm_up"] = WARM_UP_DENSE if arguments.dense else WARM_UP
        more = FOR_RANKS_DENSE if arguments.dense else FOR_RANKS
        for count in counts:
            for delay_ms in (arguments.delay_ms or DELAYS_MS) if count > 1 else (0.0,):
                say(f"{count} ranks, {delay_ms:g} ms each way")
                memory = budget + (more if count > 1 else 0)
                with machines(count, delay_ms / 1e3, memory) as made:
                    found = decode(made, {**question, "memory": memory}, arguments.disk * 10**6)
                    pairs = rows_of_rank(count)
                    messages = message_costs.measure(made, pairs, MESSAGE_ROUNDS) if count > 1 else None
                rows.append({"ranks": count, "delay_ms": delay_ms, **found, "messages": messages})
    for row in rows:
        compare(row, rows[0], arguments.disk * 1e6, arguments.dense)
    show(rows)
    dense = {"shape": DENSE_SHAPE, "layers": DENSE_LAYERS, "dtype": DENSE_TYPE}
    shape = dense if arguments.dense else vars(SHAPE)
    settings = {"share": SHARE, "budget": budget, "disk_bytes_per_second": arguments.disk * 10**6, "shape": shape}
    print(json.dumps({"command": "ranks", "environment": environment(Path.cwd()), **settings, "rows": rows}))


def decode(made: Machines, question: dict[str, Any], rate: int) -> dict[str, Any]:
    """Starts rank 0 on the first machine; it starts the others."""
    hosts = [{"ssh": name, "ips": [address]} for name, address in zip(made.names, made.addresses, strict=True)]
    (made.folder / "hosts.json").write_text(json.dumps(hosts))
    asked = {**question, "hosts": str(made.folder / "hosts.json") if len(hosts) > 1 else None}
    asked["groups"] = [str(group.folder) for group in made.groups]
    words = [sys.executable, "-B", "-m", PART, json.dumps(["decode", asked])]
    where = child_environment(**made.environment(), **paced_environment(rate), MLX_FLASH_CACHE=question["cache"])
    done = run_child(made.command(0, words), where)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    if done.returncode != 0 or "error" in found:
        kills = sum(group.kills() for group in made.groups)
        raise FlashError(
            found.get("error") or f"rank 0 ended with {done.returncode}; the kernel killed {kills} processes."
        )
    return {**found, "peak_bytes": [group.peak_bytes() for group in made.groups]}


def rows_of_rank(ranks: int) -> int:
    """Rows that each rank returns for one token, on average, rounded."""
    return max(1, round(SHAPE.choices / ranks))


def compare(row: dict[str, Any], alone: dict[str, Any], rate: float, dense: bool) -> None:
    """Adds what the model says of a row, and whether its logits have the bits of one rank."""
    row["same_bits"] = row["logits"] == alone["logits"]
    row["speed"] = alone["token_s"] / row["token_s"]
    if row["messages"] is None or dense:  # A dense model's layers are read while others compute, which has no formula.
        row["computed_s"] = None
        return
    pairs, x_bytes = rows_of_rank(row["ranks"]), 4 * SHAPE.hidden
    row["link"] = message_costs.compared(row["ranks"], pairs, row["messages"])["link"]
    resident = alone["token_s"] - sum(alone["bytes"]) / rate
    exchange = exchange_seconds(Link(**row["link"]), row["ranks"], x_bytes, pairs * x_bytes)
    missing = sum(row["bytes"]) / row["expert_bytes"] / SHAPE.layers
    read = row["expert_bytes"] / rate * largest_share(SHAPE.experts, missing, row["ranks"])
    row["exchange_s"] = exchange
    row["computed_s"] = token_seconds(resident, SHAPE.layers, exchange, read)


def show(rows: list[dict[str, Any]]) -> None:
    head = [
        "ranks",
        "delay ms",
        "tokens/s",
        "of one",
        "ms/token",
        "computed",
        "MB/rank",
        "waiting ms",
        "peaks MB",
        "bits",
    ]
    cells = [
        [
            str(row["ranks"]), f"{row['delay_ms']:g}", f"{1 / row['token_s']:.2f}", f"{row['speed']:.2f}",
            f"{1e3 * row['token_s']:.1f}", "-" if row["computed_s"] is None else f"{1e3 * row['computed_s']:.1f}",
            " ".join(f"{each / 1e6:.2f}" for each in row["bytes"]),
            f"{1e3 * row['waiting_s']:.1f}" if row["ranks"] > 1 else "-",
            " ".join(f"{each / 1e6:.0f}" for each in row["peak_bytes"]),
            "same" if row["same_bits"] else "OTHER",
        ]
        for row in rows
    ]  # fmt: skip
    figures.table(head, cells)


# -- in the child processes ------------------------------------------------------------------------------------------


def work(part: str, question: dict[str, Any]) -> dict[str, Any]:
    return {"budget": budget_of, "decode": decode_here}[part](question)


def budget_of(question: dict[str, Any]) -> dict[str, Any]:
    from mlx_flash.loading.load import plan
    from mlx_flash.loading.plan import ENDLESS

    return {"budget": plan(question["model"], memory=ENDLESS, context=CONTEXT).bytes_for(SHARE)}


def decode_here(question: dict[str, Any]) -> dict[str, Any]:
    """Decodes tokens on rank 0. All times are medians per token; bytes: read per token, by each rank."""
    from mlx_flash.loading.load import load

    group: Any = None
    if question["hosts"]:
        from mlx_flash.ranks.hosts import read_hosts
        from mlx_flash.ranks.leader import Leader

        group = Leader(read_hosts(question["hosts"]), say=say, environment=child_environment())
    try:
        options = {"memory": question["memory"], "context": CONTEXT, "threads": 8, "io": "direct", "trials": False}
        model, _ = load(question["model"], group=group, say=say, **options)
        return measure(model, group, [Path(each) for each in question["groups"]], question)
    finally:
        if group is not None:
            group.close()


def measure(model: Any, group: Any, ranks: list[Path], question: dict[str, Any]) -> dict[str, Any]:
    """ranks: the cgroup of each."""
    from mlx_lm.models.cache import make_prompt_cache

    tokens, warm_up = question["tokens"], question["warm_up"]
    ids = np.random.default_rng(0).integers(0, model.args.vocab_size, warm_up + tokens)
    cache, digest = make_prompt_cache(model), hashlib.sha256()

    def step(token: int) -> float:
        began = time.perf_counter()
        logits = model(mx.array([[token]]), cache=cache)
        mx.eval(logits)
        took = time.perf_counter() - began
        digest.update(memoryview(logits.astype(mx.float32)))
        return took

    for token in ids[:warm_up]:
        step(int(token))
    before = [bytes_read(each) for each in ranks]
    waited = model.flash.streamer.counters.ranks_s
    times = [step(int(token)) for token in ids[warm_up:]]
    nbytes = [(bytes_read(each) - old) / tokens for each, old in zip(ranks, before, strict=True)]
    return {
        "token_s": sum(times) / len(times),
        "median_s": median(times),
        "bytes": nbytes,
        "waiting_s": (model.flash.streamer.counters.ranks_s - waited) / tokens,
        "expert_bytes": getattr(model.flash.layers[0].units, "unit_bytes", None),
        "logits": digest.hexdigest(),
    }


def bytes_read(group: Path) -> int:
    """Bytes that the processes of a cgroup have read from disks."""
    text = [Path(f"/proc/{process}/io").read_text() for process in (group / "cgroup.procs").read_text().split()]
    return sum(int(line.split()[1]) for each in text for line in each.splitlines() if line.startswith("read_bytes"))


if __name__ == "__main__":
    subprocess_json.answer(work)
