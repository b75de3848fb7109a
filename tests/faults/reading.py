"""Faults in the files that a running model reads: while it loads, for its tokens, and in a server."""

from __future__ import annotations

import json
import os
import random
import zlib
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from faults import SILENT, VISIBLE  # type: ignore[import-not-found]
from outcomes import inject  # type: ignore[import-not-found]

from mlx_flash import load, stream_generate
from mlx_flash.errors import BudgetError, ReadError
from mlx_flash.source.resolve import find_store

PROMPT = "It was a dark night, and the wind went over the hills"
TOKENS = 12
MODEL = os.environ.get("FAULTS_MODEL")  # the folder of a store; None: the demo model

BUDGETS: dict[Any, int] = {}  # (model, options) -> budget


def answer(model: Any, tokenizer: Any) -> tuple[list[int], int]:
    """(token ids, a checksum of all their log-probabilities) of a greedy answer."""
    ids, crc = [], 0
    for response in stream_generate(model, tokenizer, PROMPT, max_tokens=TOKENS):
        ids.append(response.token)
        logprobs = response.logprobs.astype(mx.float32)
        mx.eval(logprobs)
        crc = zlib.crc32(np.array(logprobs).tobytes(), crc)
    return ids, crc


def loaded(path: Path, **options: Any) -> tuple[Any, Any]:
    """Model and tokenizer within little more than the smallest budget, so that tokens must be read."""
    options = {"context": 128, "threads": 4, **options}
    known = (path, *options.items())
    try:
        return load(path, memory=BUDGETS.get(known, 1), **options)
    except BudgetError as error:
        BUDGETS[known] = error.smallest_bytes + (2 << 20)
        return load(path, memory=BUDGETS[known], **options)


def mixture(work: Path) -> Path:
    """Makes a tiny mixture of experts with a tokenizer."""
    from conftest import write_tokenizer  # type: ignore[import-not-found]
    from mixtures import make_mixture  # type: ignore[import-not-found]

    folder = work / "mixture"
    if not folder.exists():
        make_mixture(folder, "qwen3_moe", "4 bits")
        write_tokenizer(folder)
    return folder


def models(work: Path, silent: bool) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(the folder that is loaded and read, options): a store with two sets of options, and a mixture."""
    options = {"verify": True} if silent else {}
    yield find_store(MODEL), options
    yield find_store(MODEL), {**options, "predictor": "none"}
    yield mixture(work), options


def decode(rng: random.Random, runs: int, work: Path, silent: bool = False) -> None:
    for path, options in models(work, silent):
        model, tokenizer = loaded(path, **options)
        action = partial(answer, model, tokenizer)
        inject(rng, runs // 3, SILENT if silent else VISIBLE, "read", path, action(), action)
        model.flash.close()


def load_and_answer(path: Path, options: dict[str, Any]) -> tuple[list[int], int]:
    model, tokenizer = loaded(path, **options)
    try:
        return answer(model, tokenizer)
    finally:
        model.flash.close()


def loading(rng: random.Random, runs: int, work: Path, silent: bool = False) -> None:
    for path, options in models(work, silent):
        action = partial(load_and_answer, path, options)
        inject(rng, runs // 3, SILENT if silent else VISIBLE, "read", path, action(), action)


def serve(rng: random.Random, runs: int, work: Path) -> None:
    """Sends requests to a server, half of them streamed."""
    from serving import serving  # type: ignore[import-not-found]

    store = find_store(MODEL)
    with serving(partial(loaded, store)) as server:
        action = partial(_ask, server, rng)
        inject(rng, runs, VISIBLE, "read", store, action(), action)


def _ask(server: Any, rng: random.Random) -> str:
    stream = rng.random() < 0.5
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": stream}
    response = server.post("/v1/completions", body)
    if stream:
        *lines, end = [event.removeprefix("data: ") for event in response.text.split("\n\n") if event]
        assert end == "[DONE]"
        events = [json.loads(line) for line in lines if not line.startswith(":")]
    else:
        events = [response.json()]
    for event in events:
        if "error" in event and event["error"]["code"] == "read_failed":
            raise ReadError(event["error"]["message"])
    return "".join(event["choices"][0]["text"] for event in events)
