"""mlx-lm's sampler and logits processors for a request's settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
from mlx_lm.sample_utils import make_logits_processors
from mlx_lm.sample_utils import make_sampler as make_mlx_lm_sampler

from .jobs import Sampling

PENALTY_TOKENS = 20  # that penalties look back on, mlx-lm's default

Processor = Callable[[mx.array, mx.array], mx.array]  # tokens so far (n,), logits (1, V) -> logits


def make_sampler(sampling: Sampling) -> Callable[[mx.array], mx.array]:
    """Log-probabilities (1, V) -> the chosen token (1,)."""
    sampler: Callable[[mx.array], mx.array] = make_mlx_lm_sampler(
        sampling.temperature, sampling.top_p, sampling.min_p, top_k=sampling.top_k
    )
    return sampler


def make_processors(
    sampling: Sampling, cached: Callable[[], Sequence[int]]
) -> list[Callable[[mx.array, mx.array], mx.array]]:
    """For a prompt of which `cached()` is in the cache already: they are to see those tokens as well."""
    processors: list[Processor] = make_logits_processors(
        sampling.logit_bias or None,
        sampling.repetition_penalty or None,
        PENALTY_TOKENS,
        sampling.presence_penalty or None,
        PENALTY_TOKENS,
        sampling.frequency_penalty or None,
        PENALTY_TOKENS,
    )

    def seeing_all(processor: Processor) -> Processor:
        def process(tokens: mx.array, logits: mx.array) -> mx.array:
            before = mx.array(list(cached()[-PENALTY_TOKENS:]), tokens.dtype)
            return processor(mx.concatenate([before, tokens]), logits)

        return process

    return [seeing_all(processor) for processor in processors]
