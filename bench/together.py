"""What do several requests at once bring? Tokens per second in sum, at equal memory, with the disk held at a rate.

Requests wait from the beginning, all at once, and are decoded one at a time or several together. The prompts are pieces
of a text, of different lengths. What follows there takes the place of the answers, so every way feeds the same tokens,
and units are needed as real text needs them. The KV caches and the logits of further rows are taken out of the same
memory budget, so that less of the model stays in memory. The numbers of rows take turns, each run in a process of its
own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import BudgetError, FlashError, UsageError

from .quality import say
from .tools import figures, pacing, subprocess_json
from .tools.report import environment
from .tools.texts import read_text


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="store, checkpoint or repository id (default: the packaged demo model)")
    parser.add_argument("--text", type=Path, required=True, help="file of plain text, whose pieces are the prompts")
    parser.add_argument("--share", type=float, default=0.3, help="share of the units in memory (default: %(default)s)")
    parser.add_argument(
        "--rate", type=int, action="append", help="MB per second of the disk, 0 as it is; may be repeated (default: 0)"
    )
    parser.add_argument(
        "--rows",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1, 2, 4, 8],
        help="comma-separated numbers of requests at once (default: 1,2,4,8)",
    )
    parser.add_argument(
        "--requests", type=whole_number(1), default=8, help="how many requests wait (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt-tokens", type=whole_number(8), default=64, metavar="N", help="of the longest (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=whole_number(2), default=32, help="tokens of each answer (default: %(default)s)"
    )
    parser.add_argument("--io", choices=("direct", "buffered"), default="direct", help="(default: %(default)s)")
    parser.add_argument("--rounds", type=whole_number(1, 100), default=1, help="(default: %(default)s)")


def main(arguments: argparse.Namespace) -> None:
    read_text(arguments.text)  # raises its errors
    rates = arguments.rate or [0]
    found: dict[tuple[int, int], list[dict[str, Any]]] = {}
    task = {
        "model": arguments.model,
        "text": str(arguments.text),
        "share": arguments.share,
        "requests": arguments.requests,
        "prompt_tokens": arguments.prompt_tokens,
        "tokens": arguments.tokens,
        "io": arguments.io,
    }
    with pacing.preloaded():
        for _ in range(arguments.rounds):
            for rate in rates:
                for rows in arguments.rows:
                    question = [{**task, "rate": rate * 10**6, "rows": rows}]
                    run = subprocess_json.ask("mlx_flash.bench.together", question, f"with {rows} rows")
                    say(f"{rate} MB/s, {rows} rows: {run.get('tokens_per_second', 0):.2f} tokens/s")
                    found.setdefault((rate, rows), []).append(run)
    table = [summary(rate, rows, runs) for (rate, rows), runs in found.items()]
    for row in table:
        one = next((other for other in table if (other["rate"], other["rows"]) == (row["rate"], 1)), None)
        known = one is not None and "tokens_per_second" in one and "tokens_per_second" in row
        row["times_one"] = row["tokens_per_second"] / one["tokens_per_second"] if known and one else None
        row["whole_times_one"] = row["whole_per_second"] / one["whole_per_second"] if known and one else None
    show(table)
    result = {"command": "together", "environment": environment(Path(arguments.model or ".")), **task}
    print(json.dumps({**result, "rounds": arguments.rounds, "table": table}))


def summary(rate: int, rows: int, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table: medians over the rounds."""
    row: dict[str, Any] = {"rate": rate, "rows": rows}
    if "smallest" in runs[0]:
        return {**row, "smallest": runs[0]["smallest"]}
    keys = [key for key, value in runs[0].items() if isinstance(value, (int, float))]
    return {**row, **{key: median(run[key] for run in runs) for key in keys}, "runs": runs}


def show(table: list[dict[str, Any]]) -> None:
    cells = []
    for row in table:
        head = [f"{row['rate'] or 'as it is'}", str(row["rows"])]
        if "smallest" in row:
            cells.append([*head, f"needs {row['smallest'] / 1e6:.0f} MB", *[""] * 11])
            continue
        ratio = [f"{row[name]:.2f}" if row[name] else "-" for name in ("times_one", "whole_times_one")]
        cells.append(
            [
                *head,
                f"{row['budget'] / 1e6:.0f}",
                f"{row['peak'] / 1e6:.0f}",
                f"{row['in_memory']:.0%}",
                f"{row['bytes_per_token'] / 1e6:.2f}",
                f"{1e3 * row['step_s']:.1f}",
                f"{1e3 * row['wait_s']:.1f}",
                f"{row['tokens_per_second']:.2f}",
                f"{row['tokens_per_second'] / row['rows']:.2f}",
                ratio[0],
                f"{row['first_token_s']:.2f}",
                f"{row['all_s']:.2f}",
                ratio[1],
            ]
        )
    head = ["MB/s", "rows", "MB", "peak MB", "in memory", "MB per token", "ms per step", "ms waiting", "tokens/s"]
    figures.table([*head, "of each", "x one", "first token s", "all s", "x one"], cells)


# -- in the child process ------------------------------------------------------------------------------------


def work(task: dict[str, Any]) -> dict[str, Any]:
    from mlx_flash.loading.load import load, plan
    from mlx_flash.loading.memory_needs import LOGITS_COPIES
    from mlx_flash.loading.plan import ENDLESS, RUN_TO_RUN_BYTES

    rows, context = task["rows"], task["prompt_tokens"] + task["tokens"]
    whole = plan(task["model"], memory=ENDLESS, context=context, io=task["io"])
    budget = max(whole.bytes_for(task["share"]), whole.smallest + RUN_TO_RUN_BYTES)
    vocabulary = _vocabulary(whole)
    beside = (rows - 1) * (whole.demand.kv_cache + LOGITS_COPIES * 4 * vocabulary)
    try:
        model, tokenizer = load(task["model"], memory=budget - beside, context=context, io=task["io"], trials=False)
    except BudgetError as error:
        return {"smallest": error.smallest_bytes + beside}
    with closing(model.flash):
        prompts = _prompts(tokenizer, task)
        _serve(model, prompts[-1:], 1)
        if task["rate"]:
            pacing.hold(task["rate"])
        result = _serve(model, prompts[:-1], rows)
        plan_of = model.flash.plan
        return {**result, "budget": budget, "in_memory": _share_in_memory(plan_of), "plan": plan_of.as_dict()}


def _vocabulary(plan: Any) -> int:
    from mlx_flash.loading.plan import GRAMMAR_BYTES, GRAMMAR_BYTES_PER_TOKEN

    return int((plan.demand.grammars - GRAMMAR_BYTES) // GRAMMAR_BYTES_PER_TOKEN)


def _share_in_memory(plan: Any) -> float:
    from mlx_flash.loading.in_place_plan import InPlacePlan

    if isinstance(plan, InPlacePlan) and plan.layer_bytes_per_token:
        return 1 - plan.layer_bytes_per_token / plan.parameters_bytes
    return float(plan.slot_share)


def _prompts(tokenizer: Any, task: dict[str, Any]) -> list[tuple[list[int], list[int]]]:
    """Pieces of the text, evenly spread over it, as prompts and what follows. The last one is to warm up.

    The prompts have a half to all of the longest length.
    """
    count, longest, tokens = task["requests"] + 1, task["prompt_tokens"], task["tokens"]
    text = Path(task["text"]).read_text(encoding="utf-8")
    ids = list(tokenizer.encode(text[: 40 * longest * count], add_special_tokens=False))
    step = len(ids) // count
    if step < longest + tokens:
        raise UsageError(f"--text has {len(ids)} tokens, expected {count} x {longest + tokens} (--requests, ...).")
    found = []
    for at in range(count):
        begin, middle = at * step, at * step + longest - longest // 2 * at // count
        found.append((ids[begin:middle], ids[middle : middle + tokens]))
    return found


def _serve(model: Any, requests: list[tuple[list[int], list[int]]], rows: int) -> dict[str, Any]:
    """Answers requests of (prompt, what follows), `rows` at a time. All of them wait from the beginning."""
    from mlx_lm.models.cache import make_prompt_cache

    from mlx_flash.flash.system import peak_memory_bytes
    from mlx_flash.text.batch_generation import DecodeBatch
    from mlx_flash.text.token_loop import Chooser, TokenLoop

    waiting, batch = list(requests), DecodeBatch(model)
    left: list[int] = []  # tokens that each row still wants
    firsts: list[float] = []
    steps_s = 0.0
    steps = tokens = 0
    began = time.perf_counter()
    while waiting or left:
        while waiting and len(left) < rows:
            prompt, answer = waiting.pop(0)
            cache = make_prompt_cache(model)
            TokenLoop(model, cache).prefill(prompt, model.flash.prefill_tokens, lambda *_: None)
            batch.join(cache, prompt[-1], Chooser(prompt, _saying(answer), []))
            left.append(len(answer))
            firsts.append(0.0)
        step_began = time.perf_counter()
        steps, tokens = steps + 1, tokens + len(batch.step())
        now = time.perf_counter()
        steps_s += now - step_began
        firsts = [at or now - began for at in firsts]
        left = [count - 1 for count in left]
        for row in [row for row, count in enumerate(left) if count == 0][::-1]:
            batch.leave(row)
            del left[row]
    whole_s = time.perf_counter() - began
    if not tokens:
        raise FlashError("no token was decoded.")
    return {
        "steps": steps,
        "tokens": tokens,
        "tokens_per_second": tokens / steps_s,
        "whole_per_second": tokens / whole_s,
        "step_s": steps_s / steps,
        "wait_s": batch.counted.wait_s / steps,
        "manage_s": batch.counted.manage_s / steps,
        "bytes_per_token": batch.counted.bytes / tokens,
        "first_token_s": sum(firsts) / len(firsts),
        "all_s": whole_s,
        "peak": peak_memory_bytes(),
    }


def _saying(answer: list[int]) -> Callable[[mx.array], mx.array]:
    """A sampler that chooses the tokens of an answer, whatever the model thinks is likely."""
    rest = iter(answer)
    return lambda _: mx.array([next(rest)])


if __name__ == "__main__":
    subprocess_json.answer(work)
