"""Waiting for other ranks, and what that is counted as."""

from __future__ import annotations

import time
from collections.abc import Sequence

import mlx.core as mx

from ..flash.stats import Counters
from ..ranks.group import Group


def results_of(
    group: Group, counters: Counters, shapes: Sequence[Sequence[int | None]], dtype: mx.Dtype | None = None
) -> list[mx.array]:
    """`Group.results`. Adds the time that it took and what the ranks have read to a model's counters."""
    before, began = group.bytes_read, time.perf_counter()
    try:
        return group.results(shapes, dtype)
    finally:
        counters.ranks_s += time.perf_counter() - began
        counters.ranks_bytes += group.bytes_read - before
