"""Compares two ways of doing the same by turns, and decides whether one is faster by more than the noise.

Seconds per token drift: the context grows, the cache fills, the machine warms up or does something else. So the two
ways take turns of a few tokens each. Two turns make a pair, and each pair gives one number: the logarithm of the ratio
of the two medians. The order within a pair alternates, so that a steady drift cancels out.

The candidate wins if it is faster in a one-sided Wilcoxon signed-rank test of these numbers, at LEVEL, and by at least
LEAST_GAIN in the median. The test is exact and assumes nothing about the times except that, if both ways are equally
fast, a pair is as likely to favour one as the other. It is made after LOOKS pairs. In between, a candidate that is not
faster at all loses early. Where the two do not differ, about one comparison in thirty ends with a winner
(`tests/test_paired_turns.py`), and then it does not matter which one is used.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import median

TURN = 4  # measured tokens per turn
UNMEASURED = 1  # tokens before them, in which the change takes effect
LOOKS = (6, 12, 24)  # pairs after which the test is made; after the last one, the candidate has not won
FIRST_PAIRS = 4  # a candidate that is slower in all of them has lost
LEVEL = 1 / 64
LEAST_GAIN = 0.01  # share of the time of a token
OTHER_TOKENS = 16  # tokens of another kind during a turn, after which the pair begins again with theirs


class PairedTurns:
    """The turns of a present choice and a candidate. trying: whether the candidate is to be used for the next token.

    pairs: the logarithms of (candidate's time / present choice's time), of pairs that were finished.
    """

    def __init__(self, settle: int = 0, pairs: Sequence[float] = ()) -> None:
        """settle: tokens with the candidate before the first turn, so that caches are as they would be with it.

        pairs: those of an earlier comparison of the two that was not finished.
        """
        self.pairs = list(pairs)
        self._settle = settle
        self._kind: Hashable = None  # of the tokens of this pair
        self.trying = settle > 0
        self._begin_pair()

    def took(self, kind: Hashable, seconds: float) -> bool | None:
        """Counts a token. Returns whether the candidate has won, or None while that is open.

        kind: only tokens of one kind are compared, such as those of passes with equally many tokens.
        """
        if self._settle > 0:
            self._settle -= 1
        elif self._unmeasured > 0:
            self._unmeasured -= 1
        elif self._kind not in (None, kind):
            self._others += 1
            if self._others >= OTHER_TOKENS:
                self._begin_pair()
        else:
            self._kind = kind
            self._seconds.append(seconds)
            if len(self._seconds) == TURN:
                self._end_turn()
                if not self._medians and (won := verdict(self.pairs)) is not None:
                    return won
        self.trying = self._settle > 0 or self._candidate_is_next()
        return None

    def interrupted(self) -> None:
        """Drops the pair under way, because something else came between its tokens."""
        self._begin_pair()
        self.trying = self._settle > 0 or self._candidate_is_next()

    def _begin_pair(self) -> None:
        self._medians: list[float] = []
        self._kind = None
        self._begin_turn()

    def _begin_turn(self) -> None:
        self._seconds: list[float] = []
        self._unmeasured, self._others = UNMEASURED, 0

    def _end_turn(self) -> None:
        self._medians.append(median(self._seconds))
        self._begin_turn()
        if len(self._medians) == 2:
            first, second = (math.log(max(1e-9, each)) for each in self._medians)
            self.pairs.append(first - second if len(self.pairs) % 2 else second - first)
            self._begin_pair()

    def _candidate_is_next(self) -> bool:
        """The candidate comes second in the first pair, first in the second one, and so on."""
        return bool(len(self.pairs) % 2) != bool(self._medians)


def verdict(pairs: Sequence[float]) -> bool | None:
    """Whether the candidate has won after these pairs; None if more are needed. pairs: see `PairedTurns`."""
    if len(pairs) == FIRST_PAIRS and min(pairs) > 0:
        return False
    if len(pairs) not in LOOKS:
        return False if len(pairs) > LOOKS[-1] else None
    if chance(pairs) <= LEVEL and gain(pairs) >= LEAST_GAIN:
        return True
    if len(pairs) == LOOKS[-1] or gain(pairs) <= 0 or sum(pairs) >= 0:
        return False
    return None


def gain(pairs: Sequence[float]) -> float:
    """The share of a token's time that the candidate saves, in the median of the pairs."""
    return 1 - math.exp(median(pairs))


def chance(pairs: Sequence[float]) -> float:
    """The probability that pairs of two equally fast ways favour the candidate at least as much as these do.

    This is the one-sided Wilcoxon signed-rank test over all 2**n signs. Equal sizes share their mean rank.
    """
    sizes = sorted(abs(each) for each in pairs if each)
    # Twice the mean rank, so that it is whole. The ranks of equal sizes follow each other, from 1.
    twice = {size: sizes.index(size) * 2 + sizes.count(size) + 1 for size in sizes}
    against = sum(twice[each] for each in pairs if each > 0)
    ways = [1] + [0] * (len(sizes) * (len(sizes) + 1))  # rank sum -> number of sign patterns that have it
    for size in sizes:
        for total in range(len(ways) - 1, twice[size] - 1, -1):
            ways[total] += ways[total - twice[size]]
    return float(sum(ways[: against + 1]) / 2 ** len(sizes))
