"""Who goes when a cache is full: the rules that were tried, each on the engine's own book-keeping."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mlx_flash.flash.slot_cache import SlotCache

ENDLESS = 10**6  # tokens: a window, or a half-life, longer than any text
NEVER = 2**31 - 1


def least_recent(units: int, slots: int) -> SlotCache:
    return SlotCache(units, slots, window=ENDLESS)


def fading(units: int, slots: int, half_life: float) -> SlotCache:
    """Frequency of use that fades by half in so many tokens; the engine's rule with another half-life."""
    cache = SlotCache(units, slots)
    cache.use_weight_growth = 2 ** (1 / half_life)
    return cache


class Pinned(SlotCache):
    """The units `hot` stay once they are here, as long as there is another to go; the rest by least-recent use."""

    def __init__(self, units: int, slots: int, hot: np.ndarray) -> None:
        super().__init__(units, slots, ENDLESS)
        self.hot = np.zeros(units, bool)
        self.hot[hot] = True

    def eviction_scores(self) -> np.ndarray:
        scores = super().eviction_scores()
        scores[self.hot[self.unit_of]] += 2.0**50
        return scores


def hottest(calibration: np.ndarray, count: int) -> np.ndarray:
    """Ids of the units that were used most. calibration: bool (tokens, units)"""
    return np.argsort(-calibration.sum(axis=0), kind="stable")[:count]


def run(cache: SlotCache, sets: Iterable[np.ndarray]) -> np.ndarray:
    """Misses of every token, int (tokens,), for the ids that each needs; in rounds where they are more than slots."""
    return np.array([step(cache, units) for units in sets])


def step(cache: SlotCache, units: np.ndarray) -> int:
    """One token as the engine does it. Returns its misses."""
    cache.mark_used(units)
    misses = 0
    for begin in range(0, len(units), max(1, cache.slots)):
        missing, slots = cache.reserve(units[begin : begin + cache.slots])
        cache.commit(missing, slots)
        misses += len(missing)
    return misses


def clairvoyant(mask: np.ndarray, slots: int) -> np.ndarray:
    """Misses of every token if whoever is needed last goes first (Belady): no rule can do better. bool (T, U) -> (T,)

    All that a token needs is here at once; where that is more than there are slots, the rest goes past them.
    """
    following = next_use(mask)
    held = np.zeros(mask.shape[1], bool)
    misses = np.zeros(len(mask), int)
    for token, wanted in enumerate(mask):
        misses[token] = np.count_nonzero(wanted & ~held)
        held |= wanted
        excess = np.count_nonzero(held) - slots
        if excess > 0:
            fits = np.count_nonzero(wanted) <= slots
            candidates = np.flatnonzero(held & ~wanted if fits else held)
            latest = np.argpartition(-following[token, candidates].astype(np.int64), excess - 1)[:excess]
            held[candidates[latest]] = False
    return misses


def next_use(mask: np.ndarray) -> np.ndarray:
    """The first later token that needs a unit, NEVER if none does. bool (T, U) -> int32 (T, U)"""
    following = np.empty(mask.shape, np.int32)
    coming = np.full(mask.shape[1], NEVER, np.int32)
    for token in range(len(mask) - 1, -1, -1):
        following[token] = coming
        coming[mask[token]] = token
    return following
