"""Enlarges a prompt cache to many tokens, by how it grew with few. Nothing is evaluated, and no kind of cache is named.

What a model keeps of its tokens grows in proportion to them, or not at all once a window is full: keys and values,
pooled keys with one entry for several tokens, the counts beside them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

Array = tuple[mx.array, Callable[[mx.array], None]]  # an array of a cache, with a function that replaces it


def counts_of(part: Any) -> dict[str, int]:
    """The whole numbers that a part of a prompt cache has, by name."""
    return {name: value for name, value in vars(part).items() if type(value) is int}


def grown(earlier: int, later: int, tokens: Sequence[int]) -> int:
    """The size at tokens[2] of what has these sizes at tokens[0] and tokens[1]. It only grows, and is rounded up."""
    before, after, wanted = tokens
    return max(later, later - (earlier - later) * (wanted - after) // (after - before)) if earlier < later else later


def enlarge(
    parts: Sequence[Any],
    arrays_of: Callable[[Any], Sequence[Array]],
    counts: Sequence[dict[str, int]],
    shapes: Sequence[Sequence[tuple[int, ...]]],
    tokens: Sequence[int],
) -> None:
    """Gives every part of a prompt cache the arrays and the counts that it has after tokens[2] tokens.

    parts: the cache's, after tokens[1] tokens. counts, shapes: what each had after tokens[0]. Raises ValueError for a
    part that has come to hold other arrays meanwhile.
    """
    for part, counted, held in zip(parts, counts, shapes, strict=True):
        for (array, put), before in zip(arrays_of(part), held, strict=True):
            put(mx.zeros([grown(*sizes, tokens) for sizes in zip(before, array.shape, strict=True)], array.dtype))
        for name, count in counts_of(part).items():
            setattr(part, name, grown(counted.get(name, count), count, tokens))
