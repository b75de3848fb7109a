"""Restores MLX's random state after a model was built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def kept_random_state() -> Iterator[None]:
    """Restores this thread's random state on exit, so that draws inside neither change later draws nor keep memory.

    A new module's weights are random numbers that are never evaluated. MLX computes the key after each draw from the
    key before it. It keeps that graph, 2 kB per draw, until a key is evaluated or the state is seeded.
    """
    import mlx.core as mx

    state: Any = mx.random.state
    high, low = state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # the key is the two halves of a seed
