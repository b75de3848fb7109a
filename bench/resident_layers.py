"""Would some layers with all their experts in memory pay, at equal memory? Such a layer does not wait for the device.

The experts that tokens choose come from a model (--model, --text), or are planted: popular ones, or recent ones.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import UsageError
from mlx_flash.flash.slot_cache import SlotCache

from . import routing, traces
from .synthetic.mixture_checkpoint import REPEATED, SHAPES, popularity
from .tools import policies
from .tools.figures import table

SHARES = (0.25, 0.5, 0.75, 0.875)  # slots / experts
WHOLE = (1 / 8, 1 / 4, 1 / 2)  # layers with all their experts / layers
WAITS_MS = (0.2, 0.5, 1.0, 2.0)  # what a layer loses when it waits for the device
READS_MS = (0.2, 0.4, 0.9)  # time to read an expert: 2.7 MB at 13, 7 and 3 GB/s
WARM_UP = 100  # tokens
# Planted routing: where the repeated share comes from -> the share that popularity alone repeats.
BY_CHANCE = {"popular experts": REPEATED, "recent experts": 0.12}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="a mixture of experts (default: planted routing of Qwen3-30B-A3B's shape)")
    parser.add_argument("--text", type=Path, help="file of plain text that the model was not trained on")
    parser.add_argument(
        "--tokens", type=whole_number(2 * WARM_UP, 10**9), default=400, help="tokens to decode (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    if (arguments.model is None) != (arguments.text is None):
        raise UsageError("--model and --text belong together. Give both, or neither.")
    if arguments.model is None:
        routings = {name: planted(arguments.tokens, share) for name, share in BY_CHANCE.items()}
    else:
        arguments.predictor = "auto"
        with traces.opened(arguments, print) as traced:
            taps = routing.record(traced.model, traced.ids, traced.prefix, "held-out text")
        routings = {"the model's": [tap.trace.chosen for tap in taps]}
    found = {name: rows(chosen) for name, chosen in routings.items()}
    show({"command": "resident-layers", "model": arguments.model, "tokens": arguments.tokens, "routings": found})


def planted(tokens: int, by_chance: float) -> list[np.ndarray]:
    """The experts that tokens choose, bool (tokens, E) for each layer. A token uses a share REPEATED of its experts
    again after the one before.

    by_chance: the share that popularity alone repeats. The rest comes from scores that change slowly.
    """
    shape, found = SHAPES["qwen3-30b-a3b"], []
    bias = popularity(shape.experts, shape.choices, by_chance, np.random.default_rng(0))
    low, high = 0.0, 1.0
    for _ in range(12 if by_chance < REPEATED else 0):
        memory = (low + high) / 2
        mask = _choices(bias, memory, tokens, np.random.default_rng(1))
        share = (mask[1:] & mask[:-1]).sum() / mask[1:].sum()
        low, high = (memory, high) if share < REPEATED else (low, memory)
    for layer in range(shape.layers):
        rng = np.random.default_rng([2, layer])
        found.append(_choices(rng.permutation(bias), low, tokens, rng))
    return found


def _choices(bias: np.ndarray, memory: float, tokens: int, rng: np.random.Generator) -> np.ndarray:
    """bool (tokens, E): the largest of a bias and normal noise, whose correlation from token to token is `memory`."""
    choices = SHAPES["qwen3-30b-a3b"].choices
    noise = rng.standard_normal((tokens, len(bias)))
    for token in range(1, tokens):
        noise[token] = memory * noise[token - 1] + (1 - memory**2) ** 0.5 * noise[token]
    scores = noise + bias
    mask = np.zeros(scores.shape, np.bool_)
    np.put_along_axis(mask, np.argpartition(-scores, choices, axis=1)[:, :choices], True, 1)
    return mask


def rows(chosen: list[np.ndarray]) -> list[dict[str, Any]]:
    """For each share of slots and number of whole layers: misses per token, and what whole layers save or cost.

    Layers with more misses become whole first. The others share the remaining slots evenly.
    """
    layers, experts = len(chosen), chosen[0].shape[1]
    least = int(chosen[0].sum(axis=1).max())
    sets = [[np.flatnonzero(row) for row in mask] for mask in chosen]
    found = []
    with tqdm(total=len(SHARES) * (1 + len(WHOLE)), desc="caches", dynamic_ncols=True) as bar:
        for share in SHARES:
            total = round(share * experts) * layers
            even = [misses(each, experts, total // layers) for each in sets]
            bar.update()
            by_need = np.argsort(even)[::-1]
            for part in WHOLE:
                bar.update()
                whole = round(part * layers)
                slots = (total - whole * experts) // (layers - whole)
                if slots < least:
                    continue
                rest = sum(misses(sets[layer], experts, slots) for layer in by_need[whole:])
                found.append(
                    {
                        "share": share, "whole": whole, "slots": slots, "even_misses": sum(even), "misses": rest,
                        "saved_ms": {
                            f"{wait}/{read}": whole * wait - (rest - sum(even)) * read
                            for wait in WAITS_MS for read in READS_MS
                        },
                    }
                )  # fmt: skip
    return found


def misses(sets: list[np.ndarray], experts: int, slots: int) -> float:
    """Misses per token of one layer, after the warm-up."""
    return float(policies.run(SlotCache(experts, slots), sets)[WARM_UP:].mean())


def show(result: dict[str, Any]) -> None:
    print(
        "misses per token with slots spread evenly, and with some layers whole; then ms per token that whole layers "
        "save (+)\nor cost (-), by what a layer's wait for the device costs and what reading an expert costs\n"
    )
    pairs = [f"{wait}/{read}" for wait in WAITS_MS for read in READS_MS]
    for name, found in result["routings"].items():
        print(f"routing: {name}")
        lines = [
            [
                f"{row['share']:.1%}", str(row["whole"]), f"{row['even_misses']:.1f}", f"{row['misses']:.1f}",
                *(f"{row['saved_ms'][pair]:+.1f}" for pair in pairs),
            ]
            for row in found
        ]  # fmt: skip
        table(["slots", "whole layers", "even", "with them", *(f"{pair} ms" for pair in pairs)], lines)
        print()
    print(json.dumps(result))
