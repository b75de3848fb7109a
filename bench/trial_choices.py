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
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.cli.run import whole_number
from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.flash.paired_turns import chance
from mlx_flash.flash.trials import WARM_UP
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.options import LoadOptions
from mlx_flash.loading.reading_trials import reader_for, reading_trials
from mlx_flash.loading.resident_weights import open_files
from mlx_flash.loading.runtime import evaluate_constants

from .quality import say
from .synthetic.mixture_checkpoint import Shape, write_mixture
from .tools import figures, pacing, subprocess_json
from .tools.report import environment

FOUR_BITS = {"group_size": 64, "bits": 4}
WIDE = Shape("qwen3_moe", 3, 1024, 512, 32, 4, 8, 2, 64, FOUR_BITS, True)  # The processor multiplies most of the time.
SMALL = Shape("qwen3_moe", 8, 64, 64, 32, 4, 4, 2, 32, FOUR_BITS, True)  # The host's own work takes most of the time.
FEW = replace(SMALL, layers=3)  # because a token waits for tens of milliseconds
TEXT = 256  # tokens, after which a new text begins
NEAR = 0.02  # Choices whose medians differ by less than this share are called equal,
UNSURE = 0.05  # and so are those that a test does not tell apart at this level.
MOST_TOKENS = 6000  # of the trials


@dataclass(frozen=True)
class Setting:
    """A model and a disk. slots: of a layer's 32 experts. rate: bytes per second, 0 as it is. latency_s: of each read.
    cached: whether the whole file is in the page cache, so that buffered reads are not paced. io: the user's choice."""

    about: str
    shape: Shape
    slots: int = 8
    rate: int = 0
    latency_s: float = 0.0
    cached: bool = False
    io: str | None = None


SETTINGS = {
    "slow": Setting("wide experts on a slow disk, no memory to spare for the page cache", WIDE, rate=100 * 10**6),
    "warm": Setting("the same, with the whole file in the page cache", WIDE, rate=100 * 10**6, cached=True),
    "fast": Setting("small experts on a disk as fast as memory (buffered reads, by the user)", SMALL, io="buffered"),
    "distant": Setting("small experts on a disk of high latency, few slots", FEW, 4, rate=10**9, latency_s=0.002),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--setting", choices=SETTINGS, action="append", help="may be repeated (default: all)")
    parser.add_argument(
        "--tokens", type=whole_number(1), default=8, help="of each choice in a round (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=whole_number(1), default=8, help="of measuring each choice (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    results = []
    with pacing.preloaded():
        for name in arguments.setting or SETTINGS:
            say(f"{name}: {SETTINGS[name].about}")
            question = [name, arguments.tokens, arguments.rounds]
            found = subprocess_json.ask("mlx_flash.bench.trial_choices", question, name)
            results.append({"setting": name, "about": SETTINGS[name].about, **found})
            show(results[-1])
    result = {"command": "trials", "environment": environment(Path(tempfile.gettempdir())), "settings": results}
    print(json.dumps(result))


def show(result: dict[str, Any]) -> None:
    print(
        f"\n{result['setting']}: {result['about']}. {result['bytes_per_token'] / 1e6:.2f} MB per "
        f"token; {result['trial_tokens']} tokens of trials, {result['trial_ms']:.1f} ms each; then "
        f"{result['after_ms']:.1f} ms"
    )
    cells = []
    for option, rows in result["options"].items():
        for row in rows:
            ratio = f"{row['paired_ratio']:.3f}" if row["paired_ratio"] else "-"
            spread = f"{row['low']:.3f} to {row['high']:.3f}"
            name = f"{option} {row['choice']}"
            cells.append([name, f"{row['ms']:.1f}", f"{row['ratio']:.3f}", spread, ratio, row["verdict"]])
    figures.table(["", "ms/token", "x default", "quartiles", "in trial", "apart, and chosen"], cells)


# -- in the child process --------------------------------------------------------------------------------------------


def work(name: str, tokens: int, rounds: int) -> dict[str, Any]:
    setting = SETTINGS[name]
    with tempfile.TemporaryDirectory(prefix="mlx_flash-trials-") as folder:
        os.environ["MLX_FLASH_CACHE"] = folder  # earlier results do not count
        path = Path(folder) / "model"
        write_mixture(path, setting.shape, setting.shape.layers, mx.float32, 0)
        for file in path.glob("*.safetensors"):
            file.read_bytes()  # into the page cache, which buffered reads see
        with closing(TriedModel(path, setting)) as model:
            apart, bytes_per_token = measure(model, tokens, rounds)
        with closing(TriedModel(path, setting)) as model:
            tried = try_all(model, 4 * tokens)
            trials = model.trials
    rows = {option: rows_of(trials[option], choices) for option, choices in apart.items()}
    return {"options": rows, "bytes_per_token": bytes_per_token, **tried}


class TriedModel:
    """A mixture with so many slots per layer, on the disk of a setting, and its trials."""

    def __init__(self, folder: Path, setting: Setting) -> None:
        options = LoadOptions(io=setting.io)
        mixture = open_in_place(folder)
        self.streamer = InPlaceFiles(open_files(mixture.files, setting.io != "buffered"), reader_for(options))
        mixture.stream_experts(self.streamer, [setting.slots] * len(mixture.switches), None)
        self.model, layers = mixture.model, mixture.streamed_experts()
        share = setting.slots / mixture.experts
        self.trials = reading_trials(self.streamer, layers, options, folder, share, "experts")
        self._vocabulary = mixture.config["vocab_size"]
        evaluate_constants(self.model)
        pacing.hold(setting.rate, setting.latency_s, setting.cached)

    def tokens(self, told: bool) -> Iterator[float]:
        """Decodes tokens drawn at random, and yields the seconds of each. told: whether the trials are told of them."""
        random, counters = np.random.default_rng(0), self.streamer.counters
        while True:
            cache = make_prompt_cache(self.model)
            self.trials.interrupted()
            for token in random.integers(0, self._vocabulary, TEXT):
                misses, began = counters.misses, time.perf_counter()
                mx.eval(self.model(mx.array([[int(token)]]), cache=cache))
                seconds = time.perf_counter() - began
                if told:
                    self.trials.took(1, 1, seconds, counters.misses - misses)
                yield seconds

    def close(self) -> None:
        pacing.hold(0)
        self.streamer.close()


def rows_of(trial: Any, choices: dict[Any, list[float]]) -> list[dict[str, Any]]:
    """A row for each choice of an option. choices: the milliseconds per token of each round.

    Ratios are medians over the rounds, because the choices of a round follow each other. "verdict" of the chosen one:
    "right" if no other is shown to be faster, by the test of the trials at UNSURE and by NEAR.
    """

    def against(choice: Any, other: Any) -> list[float]:
        """The logarithms of the ratios, round by round."""
        return list(np.log(np.divide(choices[choice], choices[other])))

    def is_faster(choice: Any, other: Any) -> bool:
        pairs = against(choice, other)
        return chance(pairs) <= UNSURE and median(pairs) < -NEAR

    default, rows = next(iter(choices)), []
    for choice, times in choices.items():
        low, middle, high = np.exp(np.percentile(against(choice, default), [25, 50, 75]))
        row = {"choice": choice, "ms": median(times), "ratio": middle, "low": low, "high": high}
        row |= {"paired_ratio": trial.ratios.get(str(choice)), "chosen": choice == trial.present, "verdict": ""}
        if choice != default:
            row["verdict"] = (
                "faster" if is_faster(choice, default) else "slower" if is_faster(default, choice) else "not shown"
            )
        if row["chosen"] and not trial.fixed:
            better = [other for other in choices if is_faster(other, choice)]
            row["verdict"] += f"{', ' if row['verdict'] else ''}chosen: {'wrong' if better else 'right'}"
        rows.append(row)
    return rows


def measure(model: TriedModel, tokens: int, rounds: int) -> tuple[dict[str, dict[Any, list[float]]], float]:
    """The milliseconds per token of every choice in every round, and the bytes per token of the defaults."""
    text, counters = model.tokens(told=False), model.streamer.counters
    choices = {name: trial.choices for name, trial in model.trials.items()}
    found: dict[str, dict[Any, list[float]]] = {name: {each: [] for each in ways} for name, ways in choices.items()}
    for _ in range(WARM_UP):
        next(text)
    before = counters.bytes
    for _ in range(WARM_UP):
        next(text)
    nbytes = counters.bytes - before
    for turn in range(rounds):
        for name, ways in choices.items():
            for choice in ways if turn % 2 else ways[::-1]:
                model.trials.fix(name, choice)
                next(text)
                found[name][choice].append(1e3 * median(next(text) for _ in range(tokens)))
            model.trials.fix(name, ways[0])
    return found, nbytes / WARM_UP


def try_all(model: TriedModel, after: int) -> dict[str, Any]:
    """Decodes until every option was tried, and `after` tokens more."""
    trials, text = model.trials, model.tokens(told=True)
    times: list[float] = []
    open_ones = [trial for trial in trials.values() if trial.open]
    while len(times) < MOST_TOKENS and (trials.trying or any(trial.tried_at is None for trial in open_ones)):
        times.append(next(text))
    afterwards = [next(text) for _ in range(after)]
    told = {"trial_tokens": len(times), "trial_ms": 1e3 * sum(times) / len(times)}
    return {**told, "after_ms": 1e3 * median(afterwards)}


if __name__ == "__main__":
    subprocess_json.answer(work)
