"""Where one thread's time goes: each moment is charged to the innermost of the timed functions that are running."""

from __future__ import annotations

import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class SelfTimes:
    """Seconds by name. Time outside every timed function is charged to "rest"."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._running = ["rest"]
        self._mark = time.perf_counter()

    def _charge(self) -> None:
        mark, self._mark = self._mark, time.perf_counter()
        self.seconds[self._running[-1]] += self._mark - mark

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        self._charge()
        self._running.append(name)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()

    def function(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Any:
            self._charge()
            self._running.append(name)
            try:
                return function(*arguments, **keywords)
            finally:
                self._charge()
                self._running.pop()

        return timed

    def generator(self, function: Callable[..., Iterator[Any]], name: str) -> Callable[..., Iterator[Any]]:
        """The generator function, timed while it runs and not while its caller works on what it yields."""
        following = self.function(next, name)

        @functools.wraps(function)
        def timed(*arguments: Any, **keywords: Any) -> Iterator[Any]:
            made, end = function(*arguments, **keywords), object()
            while (item := following(made, end)) is not end:
                yield item

        return timed
