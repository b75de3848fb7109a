"""Takes tokens back out of a prompt cache: by trimming where that works, else by a snapshot.

A snapshot holds the arrays of a cache's parts as they were. It copies nothing: an array that mlx-lm replaces stays as
it is in the snapshot, and MLX copies an array that mlx-lm writes into only then.
"""

from __future__ import annotations

import copy
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from ..layers.cache_parts import parts_of
from .cached_context import forgets


class Rewinder:
    """Marks a place in a prompt cache and leads back to it."""

    def __init__(self, cache: list[Any]) -> None:
        self.cache = cache
        self._saved: list[Any] = []  # for each part: its snapshot; None if trimming is enough

    def mark(self) -> None:
        """Marks the present end of the cache."""
        self._saved = [_aliased(part) if forgets(part) else None for part in parts_of(self.cache)]

    def rewind(self, fed: int, keep: int) -> int:
        """Takes tokens back, of the `fed` ones since the mark, so that the first `keep` of them stay.

        Returns how many stay: `keep`, or 0 if the cache can only be led back to the mark. The others must be fed again.
        """
        if any(saved is not None for saved in self._saved):
            keep = 0
        for part, saved in zip(parts_of(self.cache), self._saved, strict=True):
            if saved is None:
                part.trim(fed - keep)
            else:
                vars(part).clear()
                vars(part).update(vars(saved))
        self._saved = []
        return keep


def _aliased(part: Any) -> Any:
    """A copy of a part of a cache whose arrays share their memory with the part's, until either is written."""
    made = copy.copy(part)
    for name, value in vars(part).items():
        setattr(made, name, tree_map(lambda item: item[...] if isinstance(item, mx.array) else item, value))
    return made
