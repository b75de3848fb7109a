"""MLX's random state, as it was before a model was built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def kept_random_state() -> Iterator[None]:
    """What is drawn while it lasts changes nothing that this thread draws later, and takes no memory afterwards.

    A new module's weights are random numbers that are never evaluated. The key after each draw is computed from the
    key before, and MLX keeps that graph, 2 kB a draw, until a key is evaluated or the state is seeded.
    """
    import mlx.core as mx

    state: Any = mx.random.state
    high, low = state[0].tolist()
    try:
        yield
    finally:
        mx.random.seed(high << 32 | low)  # a seed's two halves are the key
