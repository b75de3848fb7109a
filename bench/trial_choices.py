"""Do trials choose rightly? Each choice measured apart, and what the trials choose, on disks held at a rate.

A synthetic mixture of experts is written, and decodes tokens that are drawn at random. First each choice of each option
is measured apart, with the others at their defaults: rounds of tokens, the choices in turn. Then the model is loaded
anew and decodes until every option was tried.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.cli.run import whole_number

from .quality import say
from .synthetic.mixture_checkpoint import Shape, write_mixture
from .tools import figures, pacing, subprocess_json
from .tools.report import environment

SHAPE = Shape("qwen3_moe", 8, 512, 256, 32, 4, 8, 2, 64, {"group_size": 64, "bits": 4}, True)
SHARE = 0.25  # of the experts that have a slot
CONTEXT = 256  # tokens, after which a new text begins
NEAR = 0.02  # Choices whose medians differ by less than this share are called equal.
MOST_TOKENS = 6000  # of the trials


@dataclass(frozen=True)
class Setting:
    """A disk. rate: bytes per second, 0 as it is. latency_s: of each read. cached: whether the whole file is in the
    page cache, so that buffered reads are not paced. io: a choice that the user has made."""

    about: str
    rate: int = 0
    latency_s: float = 0.0
    cached: bool = False
    io: str | None = None


SETTINGS = {
    "slow": Setting("a slow disk, and no memory to spare for the page cache", 60 * 10**6),
    "warm": Setting("the same disk, with the whole file in the page cache", 60 * 10**6, cached=True),
    "fast": Setting("a disk as fast as memory: buffered reads of a cached file, fixed by the user", io="buffered"),
    "distant": Setting("a disk of high latency, such as one on a network", 10**9, latency_s=0.004),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="may be repeated (default: all)")
    parser.add_argument(
        "--tokens", type=whole_number(1), default=8, help="of each choice in a round (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=whole_number(1), default=12, help="of measuring each choice (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    results = []
    with tempfile.TemporaryDirectory(prefix="mlx_flash-trials-") as folder, pacing.preloaded():
        model = Path(folder) / "model"
        write_mixture(model, SHAPE, SHAPE.layers, mx.float32, 0)
        for name in arguments.setting or SETTINGS:
            say(f"{name}: {SETTINGS[name].about}")
            question = [str(model), asdict(SETTINGS[name]), arguments.tokens, arguments.rounds]
            found = subprocess_json.ask("mlx_flash.bench.trial_choices", question, name)
            results.append({"setting": name, **found})
            show(results[-1])
        result = {"command": "trials", "environment": environment(model), "share": SHARE, "settings": results}
    print(json.dumps(result))


def show(result: dict[str, Any]) -> None:
    print(
        f"\n{result['setting']}: {SETTINGS[result['setting']].about}. {result['bytes_per_token'] / 1e6:.2f} MB per "
        f"token; {result['trial_tokens']} tokens of trials, {result['trial_ms']:.1f} ms each; then "
        f"{result['after_ms']:.1f} ms"
    )
    cells = []
    for option, rows in result["options"].items():
        for row in rows:
            mark = "fastest" if row["ms"] == min(each["ms"] for each in rows) else ""
            if row["chosen"]:
                mark += (", " if mark else "") + f"chosen by {row['by']}: {row['right']}"
            ratio = f"{row['paired_ratio']:.3f}" if row["paired_ratio"] else "-"
            spread = f"{row['low_ms']:.1f} to {row['high_ms']:.1f}"
            cells.append([option, str(row["choice"]), f"{row['ms']:.1f}", spread, f"{row['ratio']:.3f}", ratio, mark])
    figures.table(["option", "choice", "ms/token", "quartiles", "x default", "in trial", ""], cells)


# -- in the child process --------------------------------------------------------------------------------------------


def work(folder: str, setting: dict[str, Any], tokens: int, rounds: int) -> dict[str, Any]:
    from mlx_flash.loading.load import load, plan
    from mlx_flash.loading.plan import ENDLESS

    disk, path = Setting(**setting), Path(folder)
    with tempfile.TemporaryDirectory(prefix="mlx_flash-trials-") as cache:
        os.environ["MLX_FLASH_CACHE"] = cache  # earlier results do not count
        budget = plan(path, memory=ENDLESS, context=CONTEXT).bytes_for(SHARE)
        options: dict[str, Any] = {"memory": budget, "context": CONTEXT, "io": disk.io}
        for file in path.glob("*.safetensors"):
            file.read_bytes()  # into the page cache, which only settings with buffered reads see
        model, _ = load(path, **options)  # whose trials are told nothing
        with closing(model.flash):
            pacing.hold(disk.rate, disk.latency_s, disk.cached)
            apart, bytes_per_token = measure(model, tokens, rounds)
            pacing.hold(0)
        model, _ = load(path, **options)
        with closing(model.flash):
            pacing.hold(disk.rate, disk.latency_s, disk.cached)
            tried = try_all(model, 4 * tokens)
    rows = {option: rows_of(model.flash.trials[option], choices) for option, choices in apart.items()}
    return {"options": rows, "bytes_per_token": bytes_per_token, **tried}


def rows_of(trial: Any, choices: dict[Any, list[float]]) -> list[dict[str, Any]]:
    """A row for each choice of an option. choices: the milliseconds per token of each round."""
    default = median(next(iter(choices.values())))
    best = min(map(median, choices.values()))
    rows = []
    for choice, times in choices.items():
        ms = median(times)
        low, high = np.percentile(times, [25, 75])
        right = "right" if ms == best else "equal" if ms <= best * (1 + NEAR) else "not the fastest"
        row = {"choice": choice, "ms": ms, "low_ms": low, "high_ms": high, "ratio": ms / default}
        row |= {"paired_ratio": trial.ratios.get(str(choice)), "chosen": choice == trial.present, "right": right}
        rows.append({**row, "by": "the user" if trial.fixed else "trial"})
    return rows


def measure(model: Any, tokens: int, rounds: int) -> tuple[dict[str, dict[Any, list[float]]], float]:
    """The milliseconds per token of every choice in every round, and the bytes per token of the defaults."""
    trials, text = model.flash.trials, endless(model)
    choices = {name: trial.choices for name, trial in trials.items()}
    found: dict[str, dict[Any, list[float]]] = {name: {each: [] for each in ways} for name, ways in choices.items()}
    for _ in range(48):  # until the caches are as they stay
        next(text)
    nbytes = model.flash.streamer.counters.bytes
    for _ in range(tokens):
        next(text)
    nbytes = model.flash.streamer.counters.bytes - nbytes
    for turn in range(rounds):
        for name, ways in choices.items():
            for choice in ways if turn % 2 else ways[::-1]:
                trials.fix(name, choice)
                next(text)
                found[name][choice].append(1e3 * median(next(text) for _ in range(tokens)))
            trials.fix(name, ways[0])
    return found, nbytes / tokens


def try_all(model: Any, after: int) -> dict[str, Any]:
    """Decodes until every option was tried, and `after` tokens more."""
    trials, text, times = model.flash.trials, endless(model, told=True), []
    open_ones = [trial for trial in trials.values() if trial.open]
    while any(trial.tried_at is None for trial in open_ones) or trials.trying is not None:
        times.append(next(text))
        if len(times) == MOST_TOKENS:
            break
    afterwards = [next(text) for _ in range(after)]
    told = {"trial_tokens": len(times), "trial_ms": 1e3 * sum(times) / len(times)}
    return {**told, "after_ms": 1e3 * median(afterwards)}


def endless(model: Any, told: bool = False) -> Iterator[float]:
    """Decodes tokens drawn at random, and yields the seconds of each. told: whether the trials are told of them."""
    from mlx_lm.models.cache import make_prompt_cache

    random, flash = np.random.default_rng(0), model.flash
    while True:
        cache = make_prompt_cache(model)
        flash.trials.interrupted()
        for token in random.integers(0, flash.vocabulary, CONTEXT):
            misses, began = flash.streamer.counters.misses, time.perf_counter()
            mx.eval(model(mx.array([[int(token)]]), cache=cache))
            seconds = time.perf_counter() - began
            if told:
                flash.trials.took(1, 1, seconds, flash.streamer.counters.misses - misses)
            yield seconds


if __name__ == "__main__":
    subprocess_json.answer(work)
