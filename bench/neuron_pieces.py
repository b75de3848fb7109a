"""What does it cost to sum a token's neurons in four pieces that the model fixes, instead of in one product?

Ranks that each hold some of the pieces would then have the bits of one machine. The model continues a text of its own.
Each token is decoded in both ways at the same position, after a decoding that is not timed and that reads its neurons.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from statistics import median
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import UsageError
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.rows import PackedRows, StoredRows
from mlx_flash.layers.neurons import StreamedNeurons
from mlx_flash.loading.load import load
from mlx_flash.source.resolve import find_store

from .host_share import CONFIDENCE, median_interval
from .tools.report import describe, environment

PIECES = 4
WAYS = ("one product", "four pieces")
WARM_UP = 4  # tokens that are not timed
SEED_TOKENS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="store or repository id (default: the packaged demo model)")
    parser.add_argument("--memory", help="memory budget, as for `generate` (default: a share of the free memory)")
    parser.add_argument("--tokens", type=whole_number(2), default=200, help="pairs to time (default: 200)")


def main(arguments: argparse.Namespace) -> None:
    length = SEED_TOKENS + WARM_UP + arguments.tokens
    folder = find_store(arguments.model)
    model, _ = load(folder, memory=arguments.memory, context=length)
    try:
        most = getattr(model.args, "max_position_embeddings", length)
        if length > most:
            raise UsageError(f"a run has {length} tokens, but the model has {most} positions. Lower --tokens.")
        result = {"command": "neuron-pieces", **measure(model, arguments.tokens), "environment": environment(folder)}
    finally:
        model.flash.close()
    low, high = result["interval"]
    for way in WAYS:
        print(f"{way}: {result['ms'][way]:.2f} ms per token")
    print(
        f"four pieces / one product: {result['ratio']:.4f} (median of {arguments.tokens} pairs; "
        f"{CONFIDENCE:.0%} interval {low:.4f} to {high:.4f}); processor time {result['processor_ratio']:.4f}"
    )
    print(
        f"likeliest token equal in {result['equal']} of {arguments.tokens} tokens, all logits in {result['same_bits']}"
    )
    print(describe(result["environment"]))
    print(json.dumps(result))


def measure(model: Any, tokens: int) -> dict[str, Any]:
    """Decodes `tokens` tokens in both ways, which take turns in going first."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(model)
    seed = np.random.default_rng(0).integers(4, model.args.vocab_size, SEED_TOKENS)
    token = int(model(mx.array(seed[None]), cache=cache)[0, -1].argmax())
    layers: Sequence[StreamedNeurons] = [layer for layer in model.flash.layers if layer.predictor is not None]
    model.flash.fix_look_ahead(False)
    took = np.empty((2, tokens, 2))  # seconds: by the clock, and of all processors
    equal = same_bits = 0
    for turn in range(-WARM_UP, tokens):
        logits = [np.empty(0)] * 2
        for way in (0, 1):
            logits[way] = _decode(model, layers, token, cache, way)[0]
        for way in (0, 1) if turn % 2 else (1, 0):
            _, seconds = _decode(model, layers, token, cache, way)
            if turn >= 0:
                took[way, turn] = seconds
        if turn >= 0:
            equal += int(logits[0].argmax() == logits[1].argmax())
            same_bits += int((logits[0] == logits[1]).all())
        mx.eval(model(mx.array([[token]]), cache=cache))
        token = int(logits[0].argmax())
    for layer in layers:
        layer.__class__ = StreamedNeurons
    clock, processors = (took[1] / took[0]).T.tolist()
    return {
        "pairs": tokens,
        "ms": dict(zip(WAYS, (1e3 * np.median(took[:, :, 0], axis=1)).tolist(), strict=True)),
        "ratio": median(clock),
        "interval": median_interval(clock),
        "processor_ratio": median(processors),
        "equal": equal,
        "same_bits": same_bits,
    }


def _decode(
    model: Any, layers: Sequence[StreamedNeurons], token: int, cache: Any, way: int
) -> tuple[np.ndarray, tuple[float, float]]:
    """The logits (V,) of a token in one way, and its seconds. The context is left as it was."""
    for layer in layers:
        layer.__class__ = InPieces if way else StreamedNeurons
    call = mx.array([[token]])
    began, busy = time.perf_counter(), time.process_time()
    logits = model(call, cache=cache)
    mx.eval(logits)
    took = time.perf_counter() - began, time.process_time() - busy
    for each in cache:
        each.trim(1)
    return to_numpy(logits)[0, -1], took


class InPieces(StreamedNeurons):
    """Multiplies the neurons of each quarter of a layer apart, and adds the quarters' outputs in their order."""

    def _output(
        self, x: mx.array, ids: np.ndarray, rows: StoredRows, mask: mx.array | None, activations: mx.array | None
    ) -> mx.array:
        bounds = np.searchsorted(ids, self.units.layout.neurons * np.arange(1, PIECES) // PIECES)
        outputs = None
        for begin, end in zip([0, *bounds.tolist()], [*bounds.tolist(), len(ids)], strict=True):
            if begin == end:
                continue
            own = tuple(_rows_of(part, begin, end) for part in rows)
            y = super()._output(x, ids[begin:end], own, mask, activations)
            outputs = y if outputs is None else outputs + y
        assert outputs is not None
        return outputs


def _rows_of(rows: mx.array | PackedRows, begin: int, end: int) -> mx.array | PackedRows:
    if not isinstance(rows, PackedRows):
        return rows[begin:end]
    packed, scales, biases = (part[begin:end] for part in rows.components)
    return PackedRows(packed, scales, biases, rows.group_size, rows.bits)
