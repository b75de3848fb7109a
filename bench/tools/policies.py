"""Eviction rules for a full cache, built on the engine's own book-keeping."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from mlx_flash.flash.slot_cache import SlotCache

ENDLESS = 10**6  # tokens; a window or a half-life longer than any text
NEVER = 2**31 - 1


def least_recent(units: int, slots: int) -> SlotCache:
    return SlotCache(units, slots, window=ENDLESS)


def fading(units: int, slots: int, half_life: float) -> SlotCache:
    """Evicts by frequency of use that halves every `half_life` tokens: the engine's rule with another half-life."""
    cache = SlotCache(units, slots)
    cache.use_weight_growth = 2 ** (1 / half_life)
    return cache


class Pinned(SlotCache):
    """Keeps the units `hot` while another unit can be evicted. Evicts the others by least-recent use."""

    def __init__(self, units: int, slots: int, hot: np.ndarray) -> None:
        super().__init__(units, slots, ENDLESS)
        self.hot = np.zeros(units, bool)
        self.hot[hot] = True

    def eviction_scores(self) -> np.ndarray:
        scores = super().eviction_scores()
        scores[self.hot[self.unit_of]] += 2.0**50
        return scores


def hottest(calibration: np.ndarray, count: int) -> np.ndarray:
    """The ids of the most used units. calibration: bool (tokens, units)"""
    return np.argsort(-calibration.sum(axis=0), kind="stable")[:count]


def run(cache: SlotCache, sets: Iterable[np.ndarray]) -> np.ndarray:
    """Misses of every token, int (tokens,). sets: the ids that each token needs."""
    return np.array([step(cache, units) for units in sets])


def step(cache: SlotCache, units: np.ndarray) -> int:
    """Serves one token as the engine does, in rounds if it needs more units than slots. Returns its misses."""
    cache.mark_used(units)
    misses = 0
    for begin in range(0, len(units), max(1, cache.slots)):
        missing, slots = cache.reserve(units[begin : begin + cache.slots])
        cache.commit(missing, slots)
        misses += len(missing)
    return misses


def clairvoyant(mask: np.ndarray, slots: int) -> np.ndarray:
    """Misses of every token if the unit needed last is evicted first (Belady), the optimum. bool (T, U) -> (T,)

    A token has all its units at once. If they are more than the slots, the rest take no slot.
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
    """The next later token that needs each unit, or NEVER. bool (T, U) -> int32 (T, U)"""
    following = np.empty(mask.shape, np.int32)
    coming = np.full(mask.shape[1], NEVER, np.int32)
    for token in range(len(mask) - 1, -1, -1):
        following[token] = coming
        coming[mask[token]] = token
    return following
