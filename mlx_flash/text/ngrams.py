"""Prompt lookup: finds the longest end of a text that occurred before, and what followed it there."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

SHORTEST = 2  # tokens of an end that counts as a match; one token alone occurs too often by chance
LONGEST = 16  # tokens after which a match is not followed further back
MOST_PLACES = 64  # earlier places that are compared, the newest first, so that the work per token is bounded
BYTES_PER_TOKEN = 160  # of the index; at most 149 were measured, for a text without any repetition


class NgramIndex:
    """The tokens of a text, indexed by pairs of neighbours. `extend` takes constant time per token."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self._newest: dict[int, int] = {}  # pair -> the number of tokens up to its end, where it occurred last
        self._earlier = array("i")  # for each number of tokens: that of the same pair's occurrence before; 0: none

    def extend(self, tokens: Sequence[int]) -> None:
        known, newest, earlier = self.tokens, self._newest, self._earlier
        for token in tokens:
            known.append(token)
            place = len(known)
            if place < SHORTEST:
                earlier.append(0)
                continue
            pair = known[-2] << 32 | token
            earlier.append(newest.get(pair, 0))
            newest[pair] = place

    def continuation(self, count: int) -> list[int]:
        """The `count` tokens that followed the longest end of the text where it occurred before, [] if it did not.

        Matches have SHORTEST to LONGEST tokens. Among the MOST_PLACES newest places, the longest match counts, the
        newest one if there are several. Where the earlier text leads into the end itself, its repetition continues.
        """
        known, count_known = self.tokens, len(self.tokens)
        best, start = 0, 0
        place = self._earlier[-1] if known else 0
        for _ in range(MOST_PLACES):
            if not place:
                break
            length = SHORTEST
            while length < LONGEST and length < place and known[place - 1 - length] == known[-1 - length]:
                length += 1
            if length > best:
                best, start = length, place
            if length == LONGEST:
                break
            place = self._earlier[place - 1]
        if not best:
            return []
        period = count_known - start
        return [known[start + i % period] for i in range(count)]
