"""Look-ahead: which units the next layer will need, guessed from this layer's input and read while this layer works."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..flash.host_arrays import to_numpy
from ..flash.units import Units
from .lookahead_trial import LookAheadTrial

GUESS_AGAIN = 32  # calls after which a layer whose guesses are mostly wrong tries again


class LookAhead:
    """Guesses for one layer, made in the layer before it.

    units: of the layer that is guessed for. score: this layer's input (..., D) -> an array that tells the units apart.
    choose: (that array, what this layer itself needs), both on the host -> the units to read. trial: the model's, which
    decides whether guesses are made. leads: whether this layer tells the trial when a token begins.
    """

    def __init__(
        self,
        units: Units,
        score: Callable[[mx.array], mx.array],
        choose: Callable[[np.ndarray, np.ndarray], np.ndarray],
        trial: LookAheadTrial,
        leads: bool,
    ) -> None:
        self.units, self.trial, self.leads = units, trial, leads
        self._score, self._choose = score, choose
        self._skipped = 0  # calls without a guess, since the last one

    def token_begins(self) -> None:
        """A call of this layer begins."""
        if self.leads:
            self.trial.token_started()

    def guess(self, x: mx.array) -> mx.array | None:
        """What `prefetch` takes, to be evaluated with the call's own read-back; None where a guess is of no use.

        x: (..., D), this layer's input. A layer whose guesses are mostly wrong makes one only now and then: its first
        ones may mislead.
        """
        if self.units.all_resident or not self.trial.guessing:
            return None
        self._skipped += 1
        if self.units.prefetched.mostly_unused and self._skipped < GUESS_AGAIN:
            return None
        self._skipped = 0
        return self._score(x)

    def prefetch(self, guess: mx.array, needed: np.ndarray) -> None:
        """Starts to read what `guess`, which is evaluated, says. needed: what this layer needs, in its kind's form."""
        self.units.prefetch(self._choose(to_numpy(guess, copy=False), needed))
