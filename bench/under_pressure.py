"""Who lives when another program takes the memory? Generates in a memory cgroup in which a second process allocates.

Three runs in processes of their own: alone, beside the second process without giving slots back, and with it. The
kernel kills a process when both need more than the cgroup allows (Linux, root).
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import FlashError
from mlx_flash.flash.pressure import memory_pressure
from mlx_flash.flash.system import current_memory_bytes
from mlx_flash.loading.load import load
from mlx_flash.loading.plan import parse_memory
from mlx_flash.source.children import child_environment

from .tools.cgroup import memory_group

PROMPT_TOKENS = 16
LOOKS = 50  # at the system's memory, whose time is measured
BEGIN_AT = 40  # tokens until the second process begins
STEP_BYTES = 8 << 20  # which the second process allocates at a time
RUNS = {"alone": (False, False), "without giving": (True, False), "with giving": (True, True)}
OTHER = """
import sys, time
from pathlib import Path
folder, total, step, pause, hold = Path(sys.argv[1]), *map(float, sys.argv[2:])
while not (folder / "begin").exists():
    time.sleep(0.01)
(folder / "began").write_text(str(time.monotonic()))
taken = []
while len(taken) * step < total:
    taken.append(b"x" * int(step))
    time.sleep(pause)
(folder / "holds").write_text(str(time.monotonic()))
time.sleep(hold)
taken.clear()
(folder / "frees").write_text(str(time.monotonic()))
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="a store, or the checkpoint of a mixture of experts")
    parser.add_argument("--memory", required=True, metavar="SIZE", help="the model's budget")
    parser.add_argument("--beside", default="200MB", metavar="SIZE", help="cgroup minus budget (default: %(default)s)")
    parser.add_argument(
        "--taken", default="700MB", metavar="SIZE", help="what the second process allocates (default: %(default)s)"
    )
    parser.add_argument(
        "--rate", type=float, default=50.0, help="MB that it allocates per second (default: %(default)s)"
    )
    parser.add_argument(
        "--hold", type=float, default=5.0, help="seconds for which it keeps that (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=whole_number(50), default=600, help="tokens to generate (default: %(default)s)"
    )
    parser.add_argument(
        "--calm", type=float, default=2.0, help="seconds of calm until slots are taken again (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    rows = {}
    for name, (other, gives) in RUNS.items():
        rows[name] = run(arguments, other, gives)
        print(line(name, rows[name]), flush=True)
    texts = [row["tokens"] for row in rows.values()]
    same = all(text == texts[0][: len(text)] for text in texts)
    print(f"the same tokens in all runs, as far as they came: {'yes' if same else 'NO'}")
    for row in rows.values():
        del row["tokens"]
    print(json.dumps({"command": "pressure", "same": same, "rows": rows}))
    if not same:
        raise FlashError("slots that came and went changed the text.")


def run(arguments: argparse.Namespace, other: bool, gives: bool) -> dict[str, Any]:
    """Generates in a cgroup, beside the other process if there is one."""
    budget, taken = parse_memory(arguments.memory), parse_memory(arguments.taken)
    with tempfile.TemporaryDirectory() as name, memory_group(budget + parse_memory(arguments.beside)) as group:
        folder = Path(name)
        question = [str(arguments.model), budget, arguments.tokens, arguments.calm, gives, name]
        command = [sys.executable, "-m", "mlx_flash.bench.under_pressure", json.dumps(question)]
        with ThreadPoolExecutor() as pool:
            figures = [str(value) for value in (taken, STEP_BYTES, STEP_BYTES / arguments.rate / 1e6, arguments.hold)]
            second = pool.submit(group.run, [sys.executable, "-S", "-c", OTHER, name, *figures], {}) if other else None
            first = group.run(command, child_environment())
            (folder / "begin").touch()  # for a model that ended before
            exits = [first.returncode, *([] if second is None else [second.result().returncode])]
        log = folder / "log"
        tokens = [json.loads(text) for text in log.read_text().splitlines()] if log.exists() else []
        times = [float((folder / part).read_text()) for part in ("began", "holds", "frees") if (folder / part).exists()]
        look_s = float((folder / "look").read_text()) if (folder / "look").exists() else None
        return {"exits": exits, "kills": group.kills(), "look_s": look_s, **figures_of(tokens, times)}


def figures_of(tokens: list[dict[str, Any]], times: list[float]) -> dict[str, Any]:
    """Figures of a run. times: when the second process began, held everything and freed it, as far as it came."""
    bounds = [0.0, *times, float("inf")]
    kinds = ("before", "while it allocates", "while it holds", "after")
    spans = zip(kinds, bounds, bounds[1:], strict=False)
    row: dict[str, Any] = {"tokens": [each["token"] for each in tokens], "count": len(tokens), "phases": {}}
    for kind, begin, end in spans:
        here = [each for each in tokens if begin <= each["at"] < end]
        if not here:
            continue
        row["phases"][kind] = {
            "tokens": len(here),
            "median_ms": 1e3 * median(each["seconds"] for each in here),
            "slots_bytes": here[-1]["slots_bytes"],
            "rss_bytes": here[-1]["rss_bytes"],
            "hit_rate": rate(here),
        }
    if tokens:
        least = min(tokens, key=lambda each: each["slots_bytes"])
        row |= {"given_bytes": tokens[-1]["given_back"], "taken_bytes": tokens[-1]["taken_again"]}
        row["longest_ms"] = 1e3 * max(each["seconds"] for each in tokens)
        row["least_slots_bytes"] = least["slots_bytes"]
        row["peak_rss_bytes"] = max(each["rss_bytes"] for each in tokens)
    return row


def rate(tokens: list[dict[str, Any]]) -> float | None:
    hits, misses = (sum(each[key] for each in tokens) for key in ("hits", "misses"))
    return hits / (hits + misses) if hits + misses else None


def line(name: str, row: dict[str, Any]) -> str:
    ended = ["lives" if code == 0 else f"dies ({code})" for code in row["exits"]]
    lines = [f"{name}: the model {ended[0]}" + (f", the other program {ended[1]}" if len(ended) > 1 else "")]
    for kind, phase in row["phases"].items():
        hits = "" if phase["hit_rate"] is None else f"{phase['hit_rate']:>7.1%} hits"
        lines.append(
            f"  {kind:<19}{phase['tokens']:>5} tokens {phase['median_ms']:>8.1f} ms{hits} "
            f"{phase['slots_bytes'] / 1e6:>7.0f} MB slots {phase['rss_bytes'] / 1e6:>7.0f} MB resident"
        )
    if row["count"]:
        lines.append(
            f"  given {row['given_bytes'] / 1e6:.0f} MB, taken again {row['taken_bytes'] / 1e6:.0f} MB, "
            f"longest token {row['longest_ms']:.0f} ms, peak {row['peak_rss_bytes'] / 1e6:.0f} MB"
            + ("" if row["look_s"] is None else f", a look at the system {1e3 * row['look_s']:.2f} ms")
        )
    return "\n".join(lines)


def generate(model: str, budget: int, tokens: int, calm: float, gives: bool, name: str) -> None:
    """Generates, and writes a line of JSON to a log in the folder `name` for every token."""
    import mlx_flash.loading.slot_keeper as keeping
    from mlx_flash.text.generation import stream_generate

    keeping.CALM_S = calm
    loaded, tokenizer = load(model, memory=budget, context=PROMPT_TOKENS + tokens)
    flash = loaded.flash
    if not gives:
        flash.streamer.before_layer = lambda _: None
    tokenizer.eos_token_ids.clear()
    ids = np.random.default_rng(0).integers(0, flash.vocabulary, PROMPT_TOKENS).tolist()
    before, folder = time.monotonic(), Path(name)
    with (folder / "log").open("w", buffering=1) as log:
        last = flash.streamer.counters.copy()
        for count, response in enumerate(stream_generate(loaded, tokenizer, ids, tokens)):
            now, counters = time.monotonic(), flash.streamer.counters.copy()
            each = {"at": now, "seconds": now - before, "token": response.token, "rss_bytes": current_memory_bytes()}
            each |= {"slots_bytes": flash.keeper.slots_bytes - flash.keeper.given_bytes}
            each |= {"given_back": counters.given_back, "taken_again": counters.taken_again}
            each |= {"hits": counters.hits - last.hits, "misses": counters.misses - last.misses}
            print(json.dumps(each), file=log)
            before, last = now, counters
            if count == BEGIN_AT:
                (folder / "begin").touch()
    looks = []
    for _ in range(LOOKS):
        began = time.perf_counter()
        memory_pressure()
        looks.append(time.perf_counter() - began)
    (folder / "look").write_text(str(median(looks)))


if __name__ == "__main__":
    generate(*json.loads(sys.argv[1]))
