"""Perplexity on the decode path, alone and beside the dense model, which shows the quality lost by a predictor."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.defaults import PREFILL_TOKENS
from mlx_flash.flash.host_arrays import to_numpy


@dataclass(frozen=True)
class Score:
    """The score of a text. nats: summed negative log-likelihood of `tokens` tokens."""

    nats: float
    tokens: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats / self.tokens)


def windows(ids: list[int], prefix: list[int], window: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Cuts `ids` into windows of `window` positions that begin with `prefix`: (given, targets), int32 (T,) each."""
    body = window - len(prefix)
    for begin in range(0, len(ids), body):
        line = np.array([*prefix, *ids[begin : begin + body]], np.int32)
        yield line[:-1], line[1:]


def score(
    model: Callable[..., mx.array],
    make_cache: Callable[[], list[Any]],
    ids: list[int],
    prefix: list[int],
    window: int,
    step: int,
    progress: Callable[[int], object] = lambda _: None,
) -> Score:
    """Scores `ids` in windows of `window` positions that begin with `prefix`, with `step` tokens per call.

    A step of at most the store's `decode_tokens` takes the decode path, where each position has its own selection.
    """
    nats, count = 0.0, 0
    for given, targets in windows(ids, prefix, window):
        cache = make_cache()
        for at in range(0, len(given), step):
            logits = model(mx.array(given[at : at + step])[None], cache=cache)[0].astype(mx.float32)
            goal = mx.array(targets[at : at + step])
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            nats -= float(mx.take_along_axis(logprobs, goal[:, None], axis=-1).sum().item())  # type: ignore[arg-type]
            count += len(goal)
            progress(len(goal))
    return Score(nats, count)


# -- beside the dense model ----------------------------------------------------------------------------------


@dataclass
class Comparison:
    """The streamed model beside the dense one, token by token."""

    nats: float = 0.0  # summed negative log-likelihood
    dense_nats: float = 0.0
    agreed: int = 0  # tokens for which both models have the same likeliest token
    losses: list[float] = field(default_factory=list)  # dense - streamed log-probability of each token, in nats
    divergences: list[float] = field(default_factory=list)  # KL(dense || streamed) at every token, in nats

    @property
    def streamed(self) -> Score:
        return Score(self.nats, len(self.losses))

    @property
    def dense(self) -> Score:
        return Score(self.dense_nats, len(self.losses))

    @property
    def rise(self) -> float:
        """The rise of the perplexity, as a share of the dense model's."""
        return math.expm1(math.fsum(self.losses) / len(self.losses))

    @property
    def rise_error(self) -> float:
        """The standard error of `rise`, which estimates its variation over other texts of this kind."""
        return float(np.std(self.losses)) / math.sqrt(len(self.losses)) * (1 + self.rise)

    def add(self, dense: np.ndarray, streamed: np.ndarray, targets: np.ndarray) -> None:
        """Adds n tokens. dense, streamed: logits (n, V). targets: (n,)"""
        p, q = log_softmax(dense), log_softmax(streamed)
        rows = np.arange(len(targets))
        dense_here, here = p[rows, targets], q[rows, targets]
        self.dense_nats -= float(dense_here.sum())
        self.nats -= float(here.sum())
        self.losses += (dense_here - here).tolist()
        self.agreed += int(np.count_nonzero(p.argmax(axis=-1) == q.argmax(axis=-1)))
        divergence = (np.exp(p) * (p - q)).sum(axis=-1)
        self.divergences += np.maximum(divergence, 0).tolist()  # rounding may give -1e-16 for equal models


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-softmax in float64. In float32 the divergence of two similar models would be only rounding noise."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


@contextmanager
def all_neurons(model: Any) -> Iterator[None]:
    """Turns the streamed model into the dense one: within the block, even short calls take the prefill path."""
    limits = [layer.mlp.decode_tokens for layer in model.layers]
    for layer in model.layers:
        layer.mlp.decode_tokens = 0
    try:
        yield
    finally:
        for layer, limit in zip(model.layers, limits, strict=True):
            layer.mlp.decode_tokens = limit


class Tapped:
    """Wraps a layer and keeps its last output."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.output: mx.array | None = None

    def __call__(self, *arguments: Any, **keywords: Any) -> mx.array:
        self.output = self.layer(*arguments, **keywords)
        return self.output

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def dense_hidden(model: Any, given: np.ndarray, cache: list[Any]) -> list[mx.array]:
    """The inputs of the dense model's `head`, in chunks of PREFILL_TOKENS tokens: (n, D) each.

    Each chunk reads every layer's neurons once. Logits are far larger, so the caller computes them when it needs them.
    """
    chunks, last = [], Tapped(model.layers[-1])
    model.layers[-1] = last
    try:
        with all_neurons(model):
            for at in range(0, len(given), PREFILL_TOKENS):
                model(mx.array(given[at : at + PREFILL_TOKENS])[None], cache=cache)  # its logits are not evaluated
                assert last.output is not None
                chunks.append(last.output[0])
                last.output = None
                mx.eval(chunks[-1], [c.state for c in cache])
                mx.clear_cache()
    finally:
        model.layers[-1] = last.layer
    return chunks


def compare(
    model: Any,
    make_cache: Callable[[], list[Any]],
    ids: list[int],
    prefix: list[int],
    progress: Callable[[int], object] = lambda _: None,
    make_dense_cache: Callable[[], list[Any]] | None = None,
) -> Comparison:
    """Scores `ids` in windows of the planned context, streamed on the decode path and dense.

    Both are the same streamed model, so the dense model need not fit into memory.

    make_dense_cache: makes the dense model's caches; None for `make_cache`.
    """
    result, step = Comparison(), model.flash.manifest.decode_tokens
    for given, targets in windows(ids, prefix, model.flash.plan.context):
        chunks = dense_hidden(
            model, given, (make_dense_cache or make_cache)()
        )  # frees this KV cache before the next one is made
        cache = make_cache()
        for begin, hidden in zip(range(0, len(given), PREFILL_TOKENS), chunks, strict=True):
            for at in range(0, len(hidden), step):
                here = slice(begin + at, begin + min(at + step, len(hidden)))
                streamed = model(mx.array(given[here])[None], cache=cache)[0].astype(mx.float32)
                dense = model.head(hidden[at : at + step][None])[0].astype(mx.float32)
                mx.eval(streamed, dense)
                result.add(to_numpy(dense), to_numpy(streamed), targets[here])
                progress(len(targets[here]))
    return result
