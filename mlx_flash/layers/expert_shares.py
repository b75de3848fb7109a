"""Which rank holds which experts of a layer, and how a call's (token, expert) pairs are divided among the ranks.

Every rank knows the ids of a call, so all of them work out the same division.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class DividedPairs:
    """The pairs of a call, by rank.

    members: for each rank, the numbers of its pairs, ascending, int (n,). back: for each pair, the row of its output
    when those of all ranks stand one after another, int32 (P,).
    """

    members: list[np.ndarray]
    back: np.ndarray


class ExpertShares:
    """The shares of one layer's experts.

    holder: the rank that holds each expert, int (E,). place: the expert's number among those of its rank, int32 (E,).
    """

    def __init__(self, counts: Sequence[int]) -> None:
        """counts: how many experts each rank holds. They are dealt out in turns, so that neighbours are spread."""
        self.ranks = len(counts)
        self.holder = dealt(counts)
        self.place = np.zeros(len(self.holder), np.int32)
        for rank in range(self.ranks):
            held = self.of(rank)
            self.place[held] = np.arange(len(held))

    def of(self, rank: int) -> np.ndarray:
        """The experts of a rank, ascending."""
        return np.flatnonzero(self.holder == rank)

    def divide(self, experts: np.ndarray) -> DividedPairs:
        """experts: the expert of every pair, int (P,)."""
        holders = self.holder[experts]
        by_rank = np.argsort(holders, kind="stable")
        ends = np.cumsum(np.bincount(holders, minlength=self.ranks))
        back = np.empty(len(experts), np.int32)
        back[by_rank] = np.arange(len(experts))
        return DividedPairs(np.split(by_rank, ends[:-1]), back)


def dealt(counts: Sequence[int]) -> np.ndarray:
    """Deals numbers out to ranks in turns: int (sum of counts,), the rank of each number."""
    total = sum(counts)
    due = np.concatenate([(np.arange(count) + 0.5) * total / count for count in counts if count])
    ranks = np.repeat(np.arange(len(counts)), counts)
    return ranks[np.argsort(due, kind="stable")]
