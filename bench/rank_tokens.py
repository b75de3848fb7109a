"""Do several ranks choose the tokens that one machine chooses? Counts equal greedy tokens of a store's model.

Ranks add up their own neurons, so the last bits of their logits are not those of one machine. All ranks are processes
of this machine.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import mlx.core as mx

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import UsageError
from mlx_flash.loading.load import load
from mlx_flash.ranks.hosts import local_hosts
from mlx_flash.ranks.leader import Leader
from mlx_flash.source.children import child_environment
from mlx_flash.source.resolve import find_store

from .tools.figures import table
from .tools.report import describe, environment
from .tools.subprocess_json import answer, ask

PROMPTS = (
    "It was a dark and stormy night",
    "The old man looked at the sea and",
    "My dear sister, you ask me",
    "When the train had left the station",
    "In the year of our Lord",
)
MOST_RANKS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="store or repository id (default: the packaged demo model)")
    parser.add_argument("--memory", default="1GB", help="memory budget of each rank (default: 1GB)")
    parser.add_argument(
        "--ranks", default="1,2,3,4", help="comma-separated list, the first is compared with the others"
    )
    parser.add_argument(
        "--tokens",
        type=whole_number(1),
        default=60,
        help=f"tokens that continue each of {len(PROMPTS)} prompts (default: 60)",
    )


def main(arguments: argparse.Namespace) -> None:
    folder = str(find_store(arguments.model))
    ranks = [whole_number(1, MOST_RANKS)(each) for each in arguments.ranks.split(",")]
    runs = []
    for count in ranks:
        question = [folder, count, arguments.memory, arguments.tokens]
        runs.append(ask(__name__, question, f"{count} ranks"))
    rows, first = [], runs[0]["ids"]  # [prompt][token]
    for run in runs:
        pairs = [pair for a, b in zip(first, run["ids"], strict=True) for pair in zip(a, b, strict=True)]
        run["equal"], run["tokens"] = sum(a == b for a, b in pairs), len(pairs)
        held = f"{run['held'] / run['blocks']:.0%}"
        del run["ids"]
        rows.append([str(run["ranks"]), held, f"{run['equal']} of {run['tokens']}", f"{run['ms']:.1f}"])
    table(["ranks", "neurons of rank 0", f"tokens as with {ranks[0]}", "ms per token"], rows)
    where = environment(find_store(arguments.model))
    print(describe(where))
    print(json.dumps({"command": "rank-tokens", "runs": runs, "environment": where}))


def continue_prompts(folder: str, ranks: int, memory: str, tokens: int) -> dict[str, Any]:
    """The greedy tokens after each prompt, and the median time of one. Runs in a process of its own."""
    from mlx_lm.models.cache import make_prompt_cache

    group = Leader(local_hosts(ranks), child_environment()) if ranks > 1 else None
    try:
        model, tokenizer = load(folder, memory=memory, group=group, trials=False, warm_start=False)
        ids: list[list[int]] = []
        seconds = []
        for prompt in PROMPTS:
            cache, call = make_prompt_cache(model), tokenizer.encode(prompt)
            if len(call) + tokens > model.flash.plan.context:
                raise UsageError(f"the model has {model.flash.plan.context} positions. Lower --tokens.")
            ids.append([])
            for _ in range(tokens):
                began = time.perf_counter()
                call = [int(model(mx.array([call]), cache=cache)[0, -1].argmax())]
                seconds.append(time.perf_counter() - began)
                ids[-1] += call
        units = model.flash.layers[0].units
        held, blocks = units.count, units.layout.blocks
        model.flash.close()
    finally:
        if group is not None:
            group.close()
    return {"ranks": ranks, "ids": ids, "ms": 1e3 * median(seconds), "held": held, "blocks": blocks}


if __name__ == "__main__":
    answer(continue_prompts)
