"""Measures lookup tables whose rows are read: memory, reads and time per token, beside the same tables in memory.

Each run is a process of its own. All take the same tokens: a prompt, then single tokens that are given, not sampled.
Tokens are drawn by Zipf's law (the n-th most frequent one 1 / n as often as the first), and are frequent in the order
of their ids. With `synthetic-tables`, the layers are small, so looking up takes a larger share of a token's time than
in a published model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.cli.run import whole_number
from mlx_flash.defaults import THREADS
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.flash.disk_rate import ReadTrial
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.system import available_memory_bytes, peak_memory_bytes
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.in_place_plan import InPlacePlan
from mlx_flash.loading.load import load, plan
from mlx_flash.loading.plan import ENDLESS, parse_memory
from mlx_flash.loading.resident_weights import open_files
from mlx_flash.source.checkpoint_files import read_config

from .tools import disk, subprocess_json
from .tools.report import describe, environment, spread

RESIDENT = "in memory"
WARM_UP = 8  # decoded tokens that are not timed, because they build caches and kernels
SEED = 0
READ_TOKENS = 2048  # tokens whose rows are drawn
TURNS = 3  # of each way to read them


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", type=Path, required=True, help="checkpoint, such as one of `synthetic-tables`")
    parser.add_argument(
        "--more",
        default="0MB,256MB",
        help="comma-separated list of memory for rows, beside the least (default: %(default)s)",
    )
    parser.add_argument(
        "--prompt", type=whole_number(1), default=512, help="tokens of the prompt (default: %(default)s)"
    )
    parser.add_argument(
        "--tokens", type=whole_number(WARM_UP + 1), default=256, help="tokens to decode (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    tokens = [arguments.prompt, arguments.tokens]
    files = sorted(arguments.model.glob("*.safetensors"))
    state = disk.prepare(files)
    sizes = subprocess_json.ask("mlx_flash.bench.row_reads", ["sizes", str(arguments.model), sum(tokens)], "plan")
    rows = []
    for more in (parse_memory(text, "more") for text in arguments.more.split(",")):
        budget = sizes["without_tables"] + more
        rows.append({"rows": f"read, {budget / 1e6:.0f} MB"} | run(arguments.model, budget, tokens))
    if sizes["everything"] < available_memory_bytes():
        rows.append({"rows": RESIDENT} | run(arguments.model, None, tokens))
    else:
        print(f"The tables are not measured in memory: {sizes['everything'] / 1e9:.1f} GB are not free.")
    show(rows)
    reads = subprocess_json.ask("mlx_flash.bench.row_reads", ["reads", str(arguments.model)], "reads alone")
    print(
        f"A row of each of {reads['tables']} tables, drawn at random: {1e3 * reads['in_turn_s']:.2f} ms if the tables "
        f"are read in turn, {1e3 * reads['together_s']:.2f} ms in one batch (medians of {TURNS})."
    )
    if len({row["digest"] for row in rows}) > 1:
        raise FlashError("the logits of the runs differ (see above), expected the same bits.")
    where = environment(arguments.model)
    print(f"disk: {state['bytes'] / state['seconds'] / 1e9:.2f} GB/s in sequence; {state['state']}")
    print(describe(where))
    result = {"command": "table-rows", "environment": where, "model": arguments.model.name, "disk": state}
    print(json.dumps(result | {"prompt": tokens[0], "tokens": tokens[1], "rows": rows, "reads": reads}))


def run(model: Path, budget: int | None, tokens: list[int]) -> dict[str, Any]:
    """A run in a process of its own. budget: in bytes; None for mlx-lm with everything in memory."""
    name = RESIDENT if budget is None else f"with {budget} bytes"
    return subprocess_json.ask("mlx_flash.bench.row_reads", ["run", str(model), budget, *tokens], name)


def answer(question: str, *arguments: Any) -> dict[str, Any]:
    """What a process of its own finds out: "sizes", "run" or "reads"."""
    parts: dict[str, Callable[..., dict[str, Any]]] = {"sizes": sizes_of, "run": measure, "reads": reads_alone}
    return parts[question](*arguments)


def sizes_of(folder: str, context: int) -> dict[str, int]:
    """Budgets in bytes: with everything in memory, and with everything but tables.

    It is found in a process like the one of a run, because a plan counts the process's own size.
    """
    whole = plan(folder, memory=ENDLESS, context=context, prompt_cache=0)
    if not isinstance(whole, InPlacePlan) or not whole.rows_saved:
        raise UsageError(f"{folder} has no lookup table whose rows can be read. Choose another --model.")
    return {"everything": whole.everything, "without_tables": whole.everything - whole.rows_saved}


def measure(folder: str, budget: int | None, prompt: int, tokens: int) -> dict[str, Any]:
    """The figures of a run, and a digest of the logits of all decoded tokens."""
    from mlx_lm.models.cache import make_prompt_cache
    from mlx_lm.utils import load_model

    began = time.perf_counter()
    if budget is None:
        model: Any = load_model(Path(folder))[0]
        counters = None
    else:
        model, _ = load(folder, memory=budget, context=prompt + tokens, prompt_cache=0)
        counters = model.flash.streamer.counters
    loaded_s = time.perf_counter() - began
    config = read_config(Path(folder))
    ids = zipf(config.get("text_config", config)["vocab_size"], prompt + tokens)
    cache, digest, seconds = make_prompt_cache(model), hashlib.sha256(), []
    marks = []
    for begin, end in [(0, prompt), *((at, at + 1) for at in range(prompt, prompt + tokens))]:
        before = None if counters is None else counters.copy()
        given = mx.array(ids[None, begin:end])
        mx.eval(given)
        began = time.perf_counter()
        logits = model(given, cache=cache)
        if end == prompt:  # Like mlx-lm, this evaluates no logits of the prompt.
            mx.eval([part.state for part in cache])
        else:
            digest.update(to_numpy(logits.astype(mx.float32)).tobytes())
        seconds.append(time.perf_counter() - began)
        if counters is not None:
            marks.append(counters - before)
    row: dict[str, Any] = {"budget": budget, "peak_bytes": peak_memory_bytes(), "loaded_s": loaded_s}
    row |= {"prompt_s": seconds[0], "token_s": spread(seconds[1 + WARM_UP :]), "digest": digest.hexdigest()}
    if counters is not None:
        timed = marks[1 + WARM_UP :]
        row |= {key: sum(getattr(mark, key) for mark in timed) / len(timed) for key in ("bytes", "reads", "wait_s")}
        row |= {"prompt_reads": marks[0].reads, "prompt_bytes": marks[0].bytes, "plan": model.flash.plan.as_dict()}
        model.flash.close()
    return row


def reads_alone(folder: str) -> dict[str, Any]:
    """Median seconds to read one row of every table: table after table, and all in one batch.

    Rows are drawn at random, as the hashed ids of n-grams are. Both ways take turns.
    """
    mixture = open_in_place(Path(folder))
    random = np.random.default_rng(SEED)
    one_by_one, together = [], []
    for _ in range(READ_TOKENS):
        rows = []
        for table in mixture.lookup_tables:
            row = random.integers(table.rows, size=1)
            places = [(np.full(1, tensor.file), *tensor.segments(row, 1)) for tensor in table.tensors.values()]
            rows.append(np.concatenate([np.stack(place, axis=1) for place in places]))  # (tensors, 3)
        one_by_one += rows
        together.append(np.concatenate(rows))
    nbytes = sum(batch[:, 2].sum() for batch in together) / READ_TOKENS
    files, reader = open_files(mixture.files, direct=True), Reader(THREADS)
    try:
        trials = [ReadTrial(files, reader, batches) for batches in (one_by_one, together)]
        seconds = [[nbytes / trial.rate(in_flight=1) for trial in trials] for _ in range(TURNS)]
    finally:
        reader.close()
        for file in files:
            file.close()
    in_turn_s, together_s = (float(np.median(each)) for each in zip(*seconds, strict=True))
    return {"tables": len(mixture.lookup_tables), "in_turn_s": in_turn_s, "together_s": together_s}


def zipf(vocabulary: int, count: int) -> np.ndarray:
    """`count` token ids, int32, of which id n comes with a probability in proportion to 1 / (n + 1)."""
    weights = 1 / np.arange(1, vocabulary + 1)
    return np.random.default_rng(SEED).choice(vocabulary, count, p=weights / weights.sum()).astype(np.int32)


def show(rows: list[dict[str, Any]]) -> None:
    heads = ("peak MB", "load s", "prompt s", "ms/token", "p90", "waited", "reads", "kB", "prompt reads", "MB")
    print(f"{'rows':<16}" + "".join(f"{head:>13}" for head in heads))
    for row in rows:
        cells = [f"{row['peak_bytes'] / 1e6:.0f}", f"{row['loaded_s']:.1f}", f"{row['prompt_s']:.3f}"]
        cells += [f"{1e3 * row['token_s'][key]:.2f}" for key in ("median", "p90")]
        if "reads" in row:
            cells += [f"{1e3 * row['wait_s']:.2f}", f"{row['reads']:.2f}", f"{row['bytes'] / 1e3:.1f}"]
            cells += [f"{row['prompt_reads']}", f"{row['prompt_bytes'] / 1e6:.1f}"]
        print(f"{row['rows']:<16}" + "".join(f"{cell:>13}" for cell in cells))
    print("Per token: median, 90th percentile, mean of the time waited for reads, of reads and of bytes read.")


if __name__ == "__main__":
    subprocess_json.answer(answer)
