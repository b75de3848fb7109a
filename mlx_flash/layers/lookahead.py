"""Look-ahead: guesses from a layer's input which units the next layer needs, and reads them while the layer works."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from ..flash.host_arrays import to_numpy
from ..flash.units import Units

GUESS_AGAIN = 32  # calls after which a layer whose guesses are mostly wrong tries again


class LookAhead:
    """Guesses for one layer, made in the layer before it.

    units: the units of the layer that the guesses are for. score: this layer's input (..., D) -> an array that rates
    the units, None if it cannot. choose: (that array, the units that this layer itself needs), both on the host -> the
    units to read. `InFlightReads.look_ahead` decides whether to guess.
    """

    def __init__(
        self,
        units: Units,
        score: Callable[[mx.array], mx.array | None],
        choose: Callable[[np.ndarray, np.ndarray], np.ndarray],
    ) -> None:
        self.units = units
        self._score, self._choose = score, choose
        self._skipped = 0  # calls since the last guess

    def guess(self, x: mx.array) -> mx.array | None:
        """The guess for `prefetch`, to be evaluated with the call's own read-back; None if a guess would not help.

        x: (..., D), this layer's input. A layer whose guesses are mostly wrong still makes one now and then, because
        its first guesses may mislead.
        """
        if self.units.all_resident or not self.units.shared.look_ahead:
            return None
        self._skipped += 1
        if self.units.prefetched.mostly_unused and self._skipped < GUESS_AGAIN:
            return None
        self._skipped = 0
        return self._score(x)

    def prefetch(self, guess: mx.array, needed: np.ndarray) -> None:
        """Starts to read the units of an evaluated `guess`. needed: the units that this layer needs, as `choose` takes
        them."""
        self.units.prefetch(self._choose(to_numpy(guess, copy=False), needed))
