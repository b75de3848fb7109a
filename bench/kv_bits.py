"""Measures the quality lost by a quantised KV cache: perplexity, top-1 agreement and KL beside the model's own cache.

The text is read as prompts, so no predictor plays a part. All caches take the same tokens, chunk by chunk.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mlx.core as mx
from tqdm import tqdm

from mlx_flash.defaults import KV_BITS
from mlx_flash.errors import UsageError
from mlx_flash.flash.host_arrays import to_numpy

from .quality import LEAST_TOKENS, add_window_arguments, readable, say
from .tools.report import environment, spread
from .tools.score import Comparison, windows
from .tools.texts import read_text

STEP = 128  # tokens per call, whose logits are compared at once


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="store, checkpoint or repository id (default: the packaged demo model)")
    parser.add_argument("--text", type=Path, required=True, help="file of plain text")
    add_window_arguments(parser, tokens=8192)


def main(arguments: argparse.Namespace) -> None:
    text = read_text(arguments.text)
    from mlx_flash.loading.load import load
    from mlx_flash.loading.quantised_cache import QuantisedCaches

    first, *others = KV_BITS
    model, tokenizer = load(
        arguments.model, memory=arguments.memory, context=arguments.context, kv_bits=first, say=say, trials=False
    )
    try:
        caches = {
            first: model.make_cache,
            **{bits: QuantisedCaches(model, model.make_cache.groups, bits) for bits in others},
        }
        ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))[: arguments.tokens]
        if len(ids) < LEAST_TOKENS:
            raise UsageError(f"--text {arguments.text} has {len(ids)} tokens, expected at least {LEAST_TOKENS}.")
        prefix = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
        context = model.flash.plan.context
        with tqdm(total=len(ids), desc="perplexity", unit="token", dynamic_ncols=True) as bar:
            found, sizes = compare(model, caches, ids, prefix, context, bar.update)
    finally:
        model.flash.close()
    plain = found[first].dense
    rows: list[dict[str, Any]] = [{"kv_bits": None, "cache_bytes": sizes[None], "perplexity": plain.perplexity}]
    rows += [{"kv_bits": bits, "cache_bytes": sizes[bits], **row_of(found[bits])} for bits in KV_BITS]
    show(rows)
    print(f"{plain.tokens} tokens of {arguments.text.name} in windows of {context}; KL in nats per token")
    result = {"command": "kv-bits", "environment": environment(Path(arguments.model or ".")), "model": arguments.model}
    result |= {"text": arguments.text.name, "tokens": plain.tokens, "context": context, "rows": rows}
    print(json.dumps(result))


def compare(
    model: Any, caches: dict[int, Any], ids: list[int], prefix: list[int], context: int, progress: Any
) -> tuple[dict[int, Comparison], dict[int | None, int]]:
    """Each kind of cache beside the model's own, by its bits, and the bytes that a full window took; None: its own."""
    found = {bits: Comparison() for bits in caches}
    sizes: dict[int | None, int] = {}
    for given, targets in windows(ids, prefix, context):
        plain, quantised = caches[KV_BITS[0]].plain(), {bits: make() for bits, make in caches.items()}
        for at in range(0, len(given), STEP):
            here = slice(at, at + STEP)
            tokens = mx.array(given[here])[None]
            logits = {bits: model(tokens, cache=cache)[0].astype(mx.float32) for bits, cache in quantised.items()}
            own = model(tokens, cache=plain)[0].astype(mx.float32)
            mx.eval(own, logits)
            for bits, each in logits.items():
                found[bits].add(to_numpy(own), to_numpy(each), targets[here])
            progress(len(targets[here]))
        for kind, cache in [(None, plain), *quantised.items()]:
            sizes[kind] = max(sizes.get(kind, 0), sum(part.nbytes for part in cache))
    return found, sizes


def row_of(found: Comparison) -> dict[str, Any]:
    tokens, divergences = len(found.losses), found.divergences
    return {
        "perplexity": found.streamed.perplexity,
        "rise": found.rise,
        "rise_error": found.rise_error,
        "top1_agreement": found.agreed / tokens,
        "kl_nats": {"mean": sum(divergences) / tokens, **spread(divergences), "max": max(divergences)},
    }


def show(rows: list[dict[str, Any]]) -> None:
    heads = ("cache MB", "perplexity", "rise", "std. error", "same top-1", "KL mean", "median", "p99")
    print(f"{'KV bits':<10}" + "".join(f"{head:>12}" for head in heads))
    for row in rows:
        cells = [f"{row['cache_bytes'] / 1e6:.2f}", readable(row["perplexity"])]
        if row["kv_bits"] is not None:
            cells += [f"{row['rise']:+.3%}", f"{row['rise_error']:.3%}", f"{row['top1_agreement']:.2%}"]
            cells += [f"{row['kl_nats'][key]:.1e}" for key in ("mean", "median", "p99")]
        print(f"{row['kv_bits'] or 'own':<10}" + "".join(f"{cell:>12}" for cell in cells))
