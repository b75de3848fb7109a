"""Where does the host's time go? Times each step of the decode loop in the main thread, in ms per token.

`--tiny` makes models of many layers that compute next to nothing, a mixture of experts and one of neurons, and compares
each with a twin that has everything in memory.
"""

from __future__ import annotations

import argparse
import functools
import json
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import UsageError
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.neurons import NeuronSlots
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.rows import BlockRows
from mlx_flash.flash.slot_cache import SlotCache
from mlx_flash.layers import neurons
from mlx_flash.loading.load import load
from mlx_flash.source.resolve import find_store

from . import host_share

TIMED, TINY_TIMED = 32, 80  # tokens
# The functions that are timed: (class, function, printed text).
STEPS: tuple[tuple[Any, str, str], ...] = (
    (NeuronSlots, "prefetch", "request the missing neurons of the guess"),
    (SlotCache, "mark_used", "  slots: mark as used"),
    (SlotCache, "reserve", "  slots: find victims"),
    (SlotCache, "commit", "  slots: register arrivals"),
    (Reader, "submit", "  submit reads"),
    (Reader, "wait", "wait for reads"),
    (BlockRows, "take_stored", "build the gathers"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="store, checkpoint or repository id (default: the packaged demo model)")
    parser.add_argument("--memory", help="memory budget, as for `generate` (default: a share of the free memory)")
    parser.add_argument(
        "--tiny", action="store_true", help="compare tiny models with twins that have everything in memory"
    )
    parser.add_argument(
        "--tokens",
        type=whole_number(1),
        help=f"tokens to time (default: {TIMED} after 32 untimed ones; with --tiny {TINY_TIMED} in each condition)",
    )


def main(arguments: argparse.Namespace) -> None:
    if arguments.tiny:
        if arguments.model or arguments.memory:
            raise UsageError("--tiny makes its own models. Leave --model and --memory out.")
        host_share.show(host_share.measure(arguments.tokens or TINY_TIMED))
        return
    arguments.tokens = arguments.tokens or TIMED
    from mlx_lm.models.cache import make_prompt_cache

    seconds: dict[str, float] = defaultdict(float)
    model, _ = load(find_store(arguments.model), memory=arguments.memory, context=64 + arguments.tokens)
    most = getattr(model.args, "max_position_embeddings", 64 + arguments.tokens)
    if 64 + arguments.tokens > most:
        model.flash.close()
        raise UsageError(
            f"a run has {64 + arguments.tokens} tokens, but the model has {most} positions. Lower --tokens."
        )
    cache = make_prompt_cache(model)
    ids = np.random.default_rng(0).integers(0, model.args.vocab_size, 64 + arguments.tokens)
    mx.eval(model(mx.array(ids[None, :32]), cache=cache))
    for token in ids[32:64]:
        to_numpy(model(mx.array([[int(token)]]), cache=cache))
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in STEPS]
    evaluate = mx.eval
    try:
        for owner, name, function in originals:
            setattr(owner, name, timed(function, seconds, name))
        neurons.mx.eval = timed(evaluate, seconds, "eval")  # type: ignore[assignment]
        counters = model.flash.streamer.counters.copy()
        began = time.perf_counter()
        for token in ids[64:]:
            to_numpy(model(mx.array([[int(token)]]), cache=cache))
        total = time.perf_counter() - began
        used = model.flash.streamer.counters - counters
    finally:
        mx.eval = evaluate
        for owner, name, function in originals:
            setattr(owner, name, function)
    model.flash.close()
    each = 1e3 / arguments.tokens
    rows = {name: seconds[name] * each for _, name, _ in STEPS} | {"eval": seconds["eval"] * each}
    for _, name, text in STEPS:
        print(f"{text:<55}{rows[name]:>9.2f} ms")
    print(f"{'wait for the device: ids, and slots to be written':<55}{rows['eval']:>9.2f} ms")
    print(f"{'whole token':<55}{total * each:>9.2f} ms")
    share = used.manage_s / total
    print(f"management (ids, maps, slots): {used.manage_s * each:.2f} ms, {share:.1%} of a token")
    result = {"command": "host", "ms_per_token": rows, "total_ms": total * each, "manage_share": share}
    print(json.dumps(result))


def timed(function: Callable[..., Any], seconds: dict[str, float], name: str) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        began = time.perf_counter()
        try:
            return function(*arguments, **keywords)
        finally:
            seconds[name] += time.perf_counter() - began

    return wrapper
