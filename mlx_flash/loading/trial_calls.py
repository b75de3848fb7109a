"""Keeps a model that is called on trial from evaluating anything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx


@contextmanager
def nothing_scheduled() -> Iterator[None]:
    """Inside this context, `mx.async_eval` does nothing.

    Where there is no Metal, models of mlx-vlm with a gated delta rule schedule each layer of a prompt. A trial call
    would read all of the layers' weights.
    """
    real = mx.async_eval
    mx.async_eval = lambda *_: None
    try:
        yield
    finally:
        mx.async_eval = real
