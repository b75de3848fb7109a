"""Tells whether a measurement was disturbed: the machine slept during it, or the process was stopped."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import TracebackType

from .system import asleep_s

BEAT_S = 0.1
GAP_S = 2.0  # No thread runs for so long where the process is stopped; a busy machine lets one run sooner.
SLEPT_S = 0.5


class Undisturbed:
    """A context around a measurement. `held` says afterwards whether the time was the process's own.

    The clocks of Python stop while the machine sleeps, but the disk is slow when it wakes. They go on while the process
    is stopped, by Ctrl-Z or a debugger.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        asleep: Callable[[], float] = asleep_s,
        beat_s: float = BEAT_S,
    ) -> None:
        self.held = True
        self._last = self._slept = 0.0
        self._clock, self._asleep = clock, asleep
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(beat_s,), name="undisturbed", daemon=True)

    def _watch(self, beat_s: float) -> None:
        while not self._ended.wait(beat_s):
            self._look()

    def _look(self) -> None:
        now = self._clock()
        self.held &= now - self._last < GAP_S
        self._last = now

    def __enter__(self) -> Undisturbed:
        self._last, self._slept = self._clock(), self._asleep()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        self._look()
        self.held &= self._asleep() - self._slept < SLEPT_S
