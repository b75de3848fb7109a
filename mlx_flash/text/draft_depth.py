"""Chooses how many tokens to draft for a request, from what earlier requests measured.

With depth k, a pass over the weights takes the newest token and up to k drafts. It yields one token, and one more for
each draft that is accepted in a row. For each depth the measurements give the expected tokens and seconds of a pass,
and the depth with the most tokens per second is chosen, 0 if drafts lose.
"""

from __future__ import annotations

import statistics
import threading
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

# Drafts for the first requests. Few, because nothing is known yet: a wrong draft costs reads of its own in a mixture,
# while three right ones already save three passes of four.
FIRST_DEPTH = 3
MOST_DEPTH = 15
LEAST_PASSES = 8  # of a kind, before their mean counts
REMEMBERED_PASSES = 512  # older ones count less and less
LEAST_GAIN = 1.03  # tokens per second with drafts, relative to none
STOPPED = 50  # A pass of so many times the usual seconds was not computing: the process was stopped meanwhile.
TRY_AGAIN = 16  # requests without drafts after which another one tries, because texts differ


class Pass(NamedTuple):
    """One pass over the weights, with the choice of its tokens.

    offered: number of drafts. accepted: how many of them were accepted. seconds: without the time of drafting.
    """

    offered: int
    accepted: int
    seconds: float
    draft_seconds: float


class DraftDepth:
    """The measurements for one model and one way of drafting. May be used from several threads."""

    def __init__(self, most: int = MOST_DEPTH) -> None:
        """most: the largest depth."""
        self.most = most
        self._lock = threading.Lock()
        self._requests_off = 0
        self._count: dict[int, float] = defaultdict(float)  # by number of drafts: passes
        self._seconds: dict[int, float] = defaultdict(float)  # and their time
        self._allowed: dict[int, float] = defaultdict(float)  # passes that might have had at least so many drafts
        self._offered: dict[int, float] = defaultdict(float)  # passes that had
        self._accepted: dict[int, float] = defaultdict(float)  # passes with at least so many accepted
        self._drafting = [0.0, 0.0]  # drafts, and the seconds of making them

    def choose(self) -> int:
        """The depth for the next request."""
        with self._lock:
            depth = self._choice()
            self._requests_off = self._requests_off + 1 if depth == 0 else 0
            if self._requests_off > TRY_AGAIN:
                depth, self._requests_off = min(FIRST_DEPTH, self.most), 0
            return depth

    def _choice(self) -> int:
        if sum(count for drafts, count in self._count.items() if drafts) < LEAST_PASSES:
            return min(FIRST_DEPTH, self.most)
        if self._count[0] < LEAST_PASSES:
            return 0  # to know what a pass without drafts takes
        deepest = max(depth for depth, count in self._offered.items() if count >= 1)
        depths = range(min(self.most, 2 * deepest + 1) + 1)
        rates = [self.rate(depth) for depth in depths]
        best = max(depths, key=lambda depth: (rates[depth], -depth))
        return best if rates[best] >= LEAST_GAIN * rates[0] else 0

    def rate(self, depth: int) -> float:
        """The expected tokens per second with this depth, once both kinds of pass were measured."""
        reached, tokens, share, kept = 1.0, 1.0, [1.0], 1.0
        ratio = 1.0
        for draft in range(1, depth + 1):
            if self._allowed[draft] >= LEAST_PASSES and self._offered[draft] >= 1:
                share.append(self._offered[draft] / self._allowed[draft])
                before, kept = kept, self._accepted[draft] / self._offered[draft]
                ratio = min(1.0, kept / before) if before else 0.0
            else:  # as if one more draft were accepted as often as the last one was
                share.append(share[-1])
                kept *= ratio
            share[-1] = min(share[-1], reached)
            reached = share[-1]
            tokens += share[-1] * kept
        share.append(0.0)
        seconds = sum((share[drafts] - share[drafts + 1]) * self._time(drafts) for drafts in range(depth + 1))
        drafted, spent = self._drafting
        return tokens / max(1e-9, seconds + (depth * spent / drafted if drafted else 0.0))

    def _time(self, drafts: int) -> float:
        """Seconds of a pass with so many drafts: measured, or on the line through the two nearest measurements."""
        means = {
            n: self._seconds[n] / count for n, count in self._count.items() if n == drafts or count >= LEAST_PASSES
        }
        if drafts in means:
            return means[drafts]
        below = [n for n in means if n < drafts]
        above = [n for n in means if n > drafts]
        if below and above:
            low, high = max(below), min(above)
        elif len(below) > 1:
            low, high = sorted(below)[-2:]
        else:
            return means[max(below)]
        slope = (means[high] - means[low]) / (high - low)
        return means[low] + max(0.0, slope) * (drafts - low)

    def record(self, depth: int, passes: Sequence[Pass]) -> None:
        """Adds the passes of a request with this depth, apart from its first one, which finds the slots as the prompt
        left them."""
        most_s = STOPPED * statistics.median([each.seconds for each in passes] or [0.0])
        with self._lock:
            for each in passes[1:]:
                if each.seconds > most_s:
                    continue
                self._count[each.offered] += 1
                self._seconds[each.offered] += each.seconds
                self._drafting[0] += each.offered
                self._drafting[1] += each.draft_seconds
                for draft in range(1, depth + 1):
                    self._allowed[draft] += 1
                    self._offered[draft] += each.offered >= draft
                    self._accepted[draft] += each.accepted >= draft
            if sum(self._count.values()) > REMEMBERED_PASSES:
                for counts in (self._count, self._seconds, self._allowed, self._offered, self._accepted):
                    for key in counts:
                        counts[key] /= 2
                self._drafting = [each / 2 for each in self._drafting]
