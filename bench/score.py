"""Perplexity through the decode way: what a predictor costs in quality."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np


@dataclass(frozen=True)
class Score:
    """nats: summed negative log-likelihood of `tokens` tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)


def score(
    model: Callable[..., mx.array],
    make_cache: Callable[[], list[Any]],
    ids: list[int],
    prefix: list[int],
    window: int,
    step: int,
    progress: Callable[[int], object] = lambda _: None,
) -> Score:
    """Scores `ids` in windows of `window` positions, each begun with `prefix`, `step` tokens per call.

    A step of at most the store's `decode_tokens` goes the decode way: each position with its own selection.
    """
    nats, count, body = 0.0, 0, window - len(prefix)
    for begin in range(0, len(ids), body):
        wanted = ids[begin : begin + body]
        given = np.array((prefix + wanted)[:-1], np.int32)
        targets = np.array((prefix + wanted)[1:], np.int32)
        cache = make_cache()
        for at in range(0, len(given), step):
            logits = model(mx.array(given[at : at + step])[None], cache=cache)[0].astype(mx.float32)
            goal = mx.array(targets[at : at + step])
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            nats -= float(mx.take_along_axis(logprobs, goal[:, None], axis=-1).sum().item())  # type: ignore[arg-type]
            count += len(goal)
            progress(len(goal))
    return Score(nats, count)
