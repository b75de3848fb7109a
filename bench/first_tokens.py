"""Does a warm start pay? Misses and seconds of the first tokens after a load, with slots filled in several ways.

Every way loads the model anew and answers the same prompt, greedily, in turns. An earlier run has answered another part
of the text, and the uses of its units were kept. The ways: `cold`, with empty slots; `scores`, where only the scores of
eviction continue; `behind`, where the most used units are read after the prompt, beside the first decoded tokens; and
`warm`, where they are read while the model is loaded. If every unit has a slot, the ways are `unfilled`, where units
are read when a token needs them, and `filled`, where all are read while the model is loaded. The times begin when the
weights that stay are in memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.flash.units import Units
from mlx_flash.loading import fill_slots, streaming_needs, warm_start

from .quality import say
from .tools.report import describe, environment, forget_cached
from .tools.texts import read_text

WAYS = ("cold", "scores", "behind", "warm")
WAYS_OF_WHOLE_LAYERS = ("unfilled", "filled")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="store, checkpoint or repository id (default: the packaged demo model)")
    parser.add_argument("--text", type=Path, required=True, help="file of plain text, whose parts are the prompts")
    parser.add_argument("--memory", metavar="SIZE", help="memory budget (default: a share of free memory)")
    parser.add_argument("--share", type=float, metavar="S", help="instead of --memory: share of the units with a slot")
    parser.add_argument("--context", type=whole_number(2), default=1024, help="(default: %(default)s)")
    parser.add_argument(
        "--earlier", type=whole_number(1), default=256, help="tokens of the earlier answer (default: %(default)s)"
    )
    parser.add_argument(
        "--prompt", type=whole_number(1), default=32, help="tokens of each prompt (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=whole_number(2), default=64, help="decoded tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=whole_number(1, 100), default=3, help="(default: %(default)s)")


def main(arguments: argparse.Namespace) -> None:
    text = read_text(arguments.text)
    # All plans count the same process, and so have the same slots.
    streaming_needs.current_memory_bytes = functools.cache(streaming_needs.current_memory_bytes)
    with _opened(arguments, "cold") as (model, tokenizer):
        folder = model.flash.folder
        ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))
        whole = all(layer.units.all_resident for layer in model.flash.layers if isinstance(layer.units, Units))
    ways = WAYS_OF_WHOLE_LAYERS if whole else WAYS
    length = arguments.prompt
    if len(ids) < 4 * length:
        raise UsageError(f"--text has {len(ids)} tokens, expected {4 * length} (four times --prompt).")
    earlier, prompt = ids[:length], ids[len(ids) // 2 :][:length]
    arguments.model = str(folder)
    rows: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
    with _uses_apart():
        with _opened(arguments, "warm") as (model, tokenizer):
            _answer(model, tokenizer, earlier, arguments.earlier)
        for turn in range(arguments.rounds):
            for way in ways if turn % 2 == 0 else ways[::-1]:
                rows[way].append(_measure(arguments, way, prompt))
    texts = {tuple(row.pop("ids")) for each in rows.values() for row in each}
    if len(texts) != 1:
        raise FlashError("the ways gave different texts")
    shown = {way: {key: median(row[key] for row in each) for key in each[0]} for way, each in rows.items()}
    _show(shown)
    where = environment(folder)
    say(describe(where))
    result = {"command": "warm-start", "environment": where, "text": arguments.text.name, "prompt": length}
    result |= {"tokens": arguments.tokens, "earlier": arguments.earlier, "rounds": rows}
    print(json.dumps({**result, "ways": shown}))


@contextmanager
def _uses_apart() -> Iterator[None]:
    """Inside this context, uses are kept in a folder of their own."""
    before = os.environ.get("MLX_FLASH_CACHE")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MLX_FLASH_CACHE"] = folder
        try:
            yield
        finally:
            if before is None:
                del os.environ["MLX_FLASH_CACHE"]
            else:
                os.environ["MLX_FLASH_CACHE"] = before


@contextmanager
def _opened(arguments: argparse.Namespace, way: str) -> Iterator[tuple[Any, Any]]:
    from mlx_flash.loading.load import load, plan

    memory = arguments.memory
    if arguments.share is not None:
        memory = plan(arguments.model, context=arguments.context).bytes_for(arguments.share)
    longest, whole = warm_start.LONGEST_S, fill_slots.whole_layers
    warm_start.LONGEST_S = longest if way == "warm" else 0.0
    if way == "unfilled":
        setattr(fill_slots, "whole_layers", lambda _: [])  # noqa: B010
    warm = way in ("scores", "behind", "warm")
    try:
        model, tokenizer = load(arguments.model, memory=memory, context=arguments.context, warm_start=warm)
    finally:
        warm_start.LONGEST_S = longest
        setattr(fill_slots, "whole_layers", whole)  # noqa: B010
    try:
        tokenizer.eos_token_ids = [-1]  # All answers have one length.
        yield model, tokenizer
    finally:
        model.flash.close()


def _answer(model: Any, tokenizer: Any, prompt: list[int], tokens: int, **options: Any) -> list[Any]:
    from mlx_flash.text.generation import stream_generate

    return list(stream_generate(model, tokenizer, prompt, tokens, **options))


def _measure(arguments: argparse.Namespace, way: str, prompt: list[int]) -> dict[str, Any]:
    """One load and one answer."""
    with _opened(arguments, way) as (model, tokenizer):
        flash = model.flash
        for file in flash.layers[0].units.shared.files:
            forget_cached(file.path)
        filled = flash.streamer.counters.copy()
        layers = [layer.units for layer in flash.layers if isinstance(layer.units, Units)]

        def after_prompt(done: int, total: int) -> None:
            if way == "behind" and done == total:
                for units in layers:
                    hottest = np.argsort(-units.cache.uses(), kind="stable")[: units.cache.slots]
                    Units.prefetch(units, np.sort(hottest))

        began = time.perf_counter()
        answer = _answer(model, tokenizer, prompt, arguments.tokens, prompt_progress_callback=after_prompt)
        ended = time.perf_counter()
        flash.warm_start = None  # the uses stay those of the earlier run
        counted = answer[-1].statistics
        return {
            "ids": [each.token for each in answer],
            "fill_s": filled.read_s,
            "fill_MB": filled.bytes / 1e6,
            "prompt_misses": counted.prompt.misses,
            "first_token_s": counted.first_token_s,
            "misses": counted.decode.misses,
            "hit_rate": counted.hit_rate,
            "wait_s": counted.prompt.wait_s + counted.decode.wait_s,
            "MB": (counted.prompt.bytes + counted.decode.bytes) / 1e6,
            "decode_s": ended - began - counted.first_token_s,
            "total_s": filled.read_s + ended - began,
        }


def _show(rows: dict[str, dict[str, Any]]) -> None:
    names = ("fill_MB", "fill_s", "prompt_misses", "first_token_s", "misses", "hit_rate", "MB", "wait_s", "decode_s")
    say("  ".join(["way     ", *(f"{name:>13}" for name in names)]))
    for way, row in rows.items():
        figures = (f"{row[name] if row[name] is not None else float('nan'):13.3f}" for name in names)
        say("  ".join([f"{way:8}", *figures]))
