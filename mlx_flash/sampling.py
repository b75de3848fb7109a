"""The arguments that say how tokens are chosen: the same for every command that makes text by itself."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from .errors import UsageError


def add_sampling_arguments(group: Any, max_tokens: int) -> None:
    """To a parser or a group of one; `max_tokens` is the default."""
    group.add_argument(
        "--max-tokens", "-m", type=int, default=max_tokens, metavar="N", help="tokens to make (default: %(default)s)"
    )
    group.add_argument("--temp", type=float, default=0.0, help="sampling temperature, 0 is greedy (default: 0)")
    group.add_argument("--top-p", type=float, default=1.0, help="nucleus sampling (default: 1, off)")
    group.add_argument("--top-k", type=int, default=0, help="sample among the k likeliest (default: 0, off)")
    group.add_argument("--min-p", type=float, default=0.0, help="drop what is this much less likely (default: 0, off)")
    group.add_argument("--seed", type=int, help="seed of the sampler")


def check_sampling(arguments: argparse.Namespace) -> None:
    """Raises UsageError for numbers that mean nothing; before anything is loaded."""
    if arguments.max_tokens < 1:
        raise UsageError(f"--max-tokens is {arguments.max_tokens}, expected at least 1.")
    if arguments.temp != 0 and not 1e-3 <= arguments.temp <= 1e3:  # beyond, logits over- or underflow
        raise UsageError(f"--temp is {arguments.temp}, expected 0, or 0.001 to 1000.")
    if not 1e-6 <= arguments.top_p <= 1:
        raise UsageError(f"--top-p is {arguments.top_p}, expected 0.000001 to 1.")
    if not 0 <= arguments.min_p <= 1:
        raise UsageError(f"--min-p is {arguments.min_p}, expected 0 to 1.")
    if arguments.seed is not None and not 0 <= arguments.seed < 2**64:
        raise UsageError(f"--seed is {arguments.seed}, expected 0 to 2**64 - 1.")
    if arguments.top_k < 0:
        raise UsageError(f"--top-k is {arguments.top_k}, expected 0 or more.")


def sampler_of(arguments: argparse.Namespace, vocabulary: int) -> Callable[[Any], Any]:
    """mlx-lm's sampler, compiled and seeded: log-probabilities (B, V) -> token ids (B,). Raises UsageError."""
    import mlx.core as mx
    from mlx_lm.sample_utils import make_sampler

    if arguments.top_k >= vocabulary:
        raise UsageError(f"--top-k is {arguments.top_k}, expected less than the vocabulary of {vocabulary}.")
    sampler: Callable[[Any], Any] = make_sampler(
        arguments.temp, arguments.top_p, arguments.min_p, top_k=arguments.top_k
    )
    mx.eval(sampler(mx.zeros((1, vocabulary))))  # compiled here, not in the first token's time
    if arguments.seed is not None:
        mx.random.seed(arguments.seed)
    return sampler
