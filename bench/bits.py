"""Compares stores in 16, 8 and 4 bits: perplexity on held-out text, bytes, and speed at an equal share of slots."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.defaults import BITS, CONTEXT, PREFILL_TOKENS
from mlx_flash.errors import UsageError
from mlx_flash.flash.files import GROUP_SIZE, GROUP_SIZES
from mlx_flash.flash.system import current_memory_bytes
from mlx_flash.loading import load, streaming_needs
from mlx_flash.source.resolve import demo_folder, find_checkpoint

from .tools.report import environment, spread
from .tools.score import score

LEAST_TOKENS = 64


@dataclass
class StoreRow:
    """One store and its measurements."""

    bits: int
    resident_bits: int
    group_size: int
    store: Path
    result: dict[str, Any]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="checkpoint to convert (default: the packaged demo model)")
    parser.add_argument("--text", type=Path, required=True, help="file of held-out plain text")
    parser.add_argument(
        "--tokens", type=whole_number(LEAST_TOKENS, 10**9), default=8000, help="tokens to score (default: %(default)s)"
    )
    parser.add_argument(
        "--stores",
        type=_stores,
        default="16,8,8/8,4,4/4",
        help="comma-separated list of NEURON_BITS or NEURON_BITS/RESIDENT_BITS (default: %(default)s)",
    )
    parser.add_argument(
        "--groups",
        default=str(GROUP_SIZE),
        help="comma-separated list of group sizes; a group shares one scale (default: %(default)s)",
    )
    parser.add_argument(
        "--timed",
        type=whole_number(0),
        default=192,
        help="tokens to time in each of two rounds; 0 measures only the perplexity with all neurons "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--percent",
        type=whole_number(1, 100),
        default=33,
        help="percentage of the neurons that have a slot (default: %(default)s)",
    )


def main(arguments: argparse.Namespace) -> None:
    try:
        text = arguments.text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --text {arguments.text}: {error}") from None
    try:
        groups = [int(group) for group in arguments.groups.split(",")]
    except ValueError:
        groups = []
    if not groups or set(groups) - {*GROUP_SIZES}:
        raise UsageError(f"--groups is {arguments.groups!r}, expected some of {', '.join(map(str, GROUP_SIZES))}.")
    source = demo_folder() if arguments.model is None else find_checkpoint(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        rows = make_stores(source, Path(folder), arguments.stores, groups)
        if not rows:
            raise UsageError(f"{source} cannot be stored in any of these ways (see above). Choose other --stores.")
        ids: list[int] = []
        prefix: list[int] = []
        for row in rows:
            ids, prefix = measure_quality(row, text, arguments.tokens, predicted=arguments.timed > 0)
        if arguments.timed:
            measure_speed(rows, prefix + ids, arguments.timed, arguments.percent / 100)
    show(rows)
    result = {"command": "bits", "text": arguments.text.name, "tokens": len(ids), "model": source.name}
    result |= {"environment": environment(source), "rows": [row.result for row in rows]}
    print(json.dumps(result))


def make_stores(source: Path, folder: Path, stores: list[tuple[int, int]], groups: list[int]) -> list[StoreRow]:
    rows = []
    for bits, resident in stores:
        for group in groups if bits < 16 else groups[:1]:
            store = folder / f"{bits}-{resident}-{group}"
            settings = Settings(bits=bits, resident_bits=resident, group_size=group)
            try:
                manifest = convert(source, store, settings)
            except UsageError as error:
                tqdm.write(f"left out: {bits} bits in groups of {group}: {error}")
                continue
            size = sum(entry["bytes"] for entry in manifest.files.values())
            result = {
                "bits": bits,
                "resident_bits": resident,
                "group_size": manifest.layout.group_size,
                "store_bytes": size,
                "neurons_bytes": manifest.layout.file_bytes,
                "row_bits": 8 * manifest.layout.row_bytes / manifest.layout.width,
                "neurons_per_block": manifest.layout.neurons_per_block,
                "block_bytes": manifest.layout.block_bytes,
            }
            rows.append(StoreRow(bits, resident, group, store, result))
    return rows


def measure_quality(row: StoreRow, text: str, tokens: int, predicted: bool) -> tuple[list[int], list[int]]:
    """Measures perplexity with all neurons and, if `predicted`, with the predictor's choice. Returns ids and prefix."""
    from mlx_lm.models.cache import make_prompt_cache

    model, tokenizer = load.load(row.store, context=CONTEXT)
    ids = list(tokenizer.encode(text, add_special_tokens=False, verbose=False))[:tokens]
    if len(ids) < LEAST_TOKENS:
        raise UsageError(f"--text has {len(ids)} tokens, expected at least {LEAST_TOKENS}.")
    prefix = [tokenizer.bos_token_id] if tokenizer.bos_token_id is not None else []
    runtime = model.flash
    steps = {"perplexity": PREFILL_TOKENS, "predicted_perplexity": runtime.manifest.decode_tokens}
    for name, step in steps.items() if predicted else [*steps.items()][:1]:
        with tqdm(total=len(ids), desc=f"{row.store.name} {name}", unit="token", dynamic_ncols=True) as bar:
            found = score(model, lambda: make_prompt_cache(model), ids, prefix, runtime.plan.context, step, bar.update)
        row.result[name] = found.perplexity
    runtime.close()
    return ids, prefix


def measure_speed(rows: list[StoreRow], ids: list[int], timed: int, share: float) -> None:
    """Times single tokens with `share` of the neurons in slots. The stores take turns, in two rounds."""
    from mlx_lm.models.cache import make_prompt_cache

    for turn in range(2):
        for row in rows if turn == 0 else reversed(rows):
            model = open_with(row.store, share)
            cache = make_prompt_cache(model)
            mx.eval(model(mx.array([ids[:32]]), cache))
            counters = model.flash.streamer.counters
            times: list[float] = []
            before = counters.copy()
            for i in range(timed):
                if i == timed // 3:  # the slots are warm now
                    before, times = counters.copy(), []
                began = time.perf_counter()
                mx.eval(model(mx.array([[ids[(32 + i) % len(ids)]]]), cache))
                times.append(time.perf_counter() - began)
            used = counters - before
            row.result.setdefault("seconds", []).extend(times)
            row.result["bytes_per_token"] = used.bytes / len(times)
            row.result["reads_per_token"] = used.reads / len(times)
            row.result["slot_share"] = model.flash.plan.slot_share
            row.result["slots_bytes"] = model.flash.plan.slots_bytes
            model.flash.close()
    for row in rows:
        row.result["seconds"] = spread(row.result["seconds"])


def open_with(store: Path, share: float) -> Any:
    """Loads the model with `share` of its neurons in slots.

    Every plan measures the process's own size, which varies by more than a small model's slots. The size is therefore
    held fixed here.
    """
    process = current_memory_bytes()
    with patch.object(streaming_needs, "current_memory_bytes", lambda: process):
        model, _ = load.load(store, context=CONTEXT)
        plan = model.flash.plan
        model.flash.close()
        budget = plan.demand.total + int(share * plan.units.layers * plan.units.per_layer * plan.slot_bytes)
        model, _ = load.load(store, memory=budget, context=CONTEXT)
    return model


def show(rows: list[StoreRow]) -> None:
    sizes = ("group", "bits/number", "store MB", "neurons MB")
    heads = (*sizes, "perplexity", "change", "predicted", "slots", "tokens/s", "MB/token")
    print(f"{'bits':<8}" + "".join(f"{head:>12}" for head in heads))
    first = rows[0].result
    for row in rows:
        r = row.result
        name = str(row.bits) if row.resident_bits == 16 else f"{row.bits}/{row.resident_bits}"
        cells = [
            str(r["group_size"] or "-"),
            f"{r['row_bits']:.2f}",
            f"{r['store_bytes'] / 1e6:.2f}",
            f"{r['neurons_bytes'] / 1e6:.2f}",
            f"{r['perplexity']:.3f}",
            f"{r['perplexity'] / first['perplexity'] - 1:+.2%}",
            f"{r['predicted_perplexity']:.3f}" if "predicted_perplexity" in r else "-",
        ]
        if "seconds" in r:
            rate, read = 1 / r["seconds"]["median"], r["bytes_per_token"] / 1e6
            cells += [f"{r['slot_share']:.0%}", f"{rate:.1f}", f"{read:.3f}"]
        print(f"{name:<8}" + "".join(f"{cell:>12}" for cell in cells))


def _stores(text: str) -> list[tuple[int, int]]:
    result = []
    for part in text.split(","):
        bits, _, resident = part.partition("/")
        if bits not in map(str, BITS) or (resident or "16") not in map(str, BITS):
            raise argparse.ArgumentTypeError(f"{part!r}: expected BITS or BITS/RESIDENT_BITS, each of {BITS}")
        result.append((int(bits), int(resident or 16)))
    return result
