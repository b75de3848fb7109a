"""The prompt cache of the last request, for the next turn of a chat to go on with.

The memory plan has room for the keys and values of one context, so one cache is kept; it goes before another is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mlx_lm.models.cache import can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

LEAST_REUSED = 16  # tokens; a shorter beginning in common saves nothing


class ChatCache:
    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokens: list[int] = []  # what `cache` holds
        self.cache: list[Any] | None = None

    def take(self, ids: Sequence[int], anew: bool = False) -> tuple[list[Any], int]:
        """A cache for prompt `ids`, and how many of its tokens it holds already: fewer than all, one must be fed.

        It is gone from here until `keep`: a generation that fails leaves none behind. anew: an empty one is wanted.
        """
        cache, tokens = self.cache, self.tokens
        self.drop()
        if cache is not None and not anew:
            common = min(common_prefix(tokens, ids), len(ids) - 1)
            if common >= LEAST_REUSED and (common == len(tokens) or can_trim_prompt_cache(cache)):
                trim_prompt_cache(cache, len(tokens) - common)
                return cache, common
        del cache  # never two at once
        return make_prompt_cache(self.model), 0

    def keep(self, cache: list[Any], tokens: Sequence[int]) -> None:
        """`cache` holds the keys and values of exactly `tokens`."""
        self.cache, self.tokens = cache, list(tokens)

    def drop(self) -> None:
        self.cache, self.tokens = None, []


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """With how many equal tokens both begin."""
    for place, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return place
    return min(len(a), len(b))
