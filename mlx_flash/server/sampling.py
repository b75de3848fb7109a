"""mlx-lm's sampler and logits processors for a request's settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.sample_utils import make_sampler as make_mlx_lm_sampler

from .jobs import Sampling

PENALTY_TOKENS = 20  # that penalties look back on, mlx-lm's default


def make_sampler(sampling: Sampling) -> Callable[[mx.array], mx.array]:
    """Log-probabilities (1, V) -> the chosen token (1,)."""
    sampler: Callable[[mx.array], mx.array] = make_mlx_lm_sampler(
        sampling.temperature, sampling.top_p, sampling.min_p, top_k=sampling.top_k
    )
    return sampler


def make_processors(sampling: Sampling, cached: Sequence[int]) -> list[Callable[[mx.array, mx.array], mx.array]]:
    """For `stream_generate`, which shows them the tokens after `cached`: they are to see those as well."""
    processors: list[Any] = make_logits_processors(
        sampling.logit_bias or None,
        sampling.repetition_penalty or None,
        PENALTY_TOKENS,
        sampling.presence_penalty or None,
        PENALTY_TOKENS,
        sampling.frequency_penalty or None,
        PENALTY_TOKENS,
    )
    before = list(cached[-PENALTY_TOKENS:])
    if not before or not processors:
        return processors
    first = mx.array(before)

    def seeing_all(processor: Any) -> Callable[[mx.array, mx.array], mx.array]:
        return lambda tokens, logits: processor(mx.concatenate([first, tokens]), logits)

    return [seeing_all(processor) for processor in processors]
