"""Tests repeatedly, while tokens are generated, whether reading ahead pays on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

WARM_UP = 24  # tokens before the first trial, because a cold cache is not representative
TURN = 6  # measured tokens per turn of a trial; the token before them is not measured
TURNS = 4  # with, without, with, without, so that drift affects both
TERM = 400  # tokens until the next trial


class LookAheadTrial:
    """Decides whether to guess, by comparing the times of tokens with and without guesses.

    Guessing costs a second call of every predictor and some unused reads, and hides the wait for reads. Which weighs
    more depends on the disk, the cores and the budget. The text does not depend on it.
    """

    def __init__(
        self, clock: Callable[[], float] = time.perf_counter, warm_up: int = WARM_UP, guessing: bool = True
    ) -> None:
        """guessing: whether to guess until the first trial."""
        self.guessing = guessing
        self._fixed = False
        self._clock = clock
        self._last: float | None = None
        self._left = warm_up  # tokens of the current turn or term
        self._turn = -1  # the turn of a trial; -1 outside a trial
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    def fix(self, guessing: bool) -> None:
        """Ends the trials: from now on, guesses are made always or never."""
        self.guessing, self._fixed = guessing, True

    def token_started(self) -> None:
        """Called when a token begins."""
        if self._fixed:
            return
        now = self._clock()
        if self._turn >= 0 and self._last is not None and self._left < TURN:
            self._seconds[self.guessing].append(now - self._last)
        self._last = now
        self._left -= 1
        if self._left < 0:
            self._next_turn()

    def _next_turn(self) -> None:
        self._turn += 1
        if self._turn < TURNS:
            self.guessing, self._left = self._turn % 2 == 0, TURN
            return
        with_guess, without = median(self._seconds[True]), median(self._seconds[False])
        self.guessing, self._turn, self._left = with_guess <= without, -1, TERM
        self._seconds = {True: [], False: []}
