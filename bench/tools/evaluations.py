"""Counts how often the host waits for the device, gives it work, and calls the compiled reader."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np

from mlx_flash.flash import host_arrays
from mlx_flash.flash.reader import Reader


@dataclass
class EvaluationCounts:
    """waits: evaluations that the host waits for (`mx.eval`, and read-backs). begun: evaluations that it does not wait
    for (`mx.async_eval`). c_calls: calls into the compiled reader. What is evaluated already is not counted."""

    waits: int = 0
    begun: int = 0
    c_calls: int = 0


def has_work(*arrays: Any) -> bool:
    """Whether any of the arrays, or of those in lists, is not evaluated yet, not even in part."""
    for array in arrays:
        if isinstance(array, (list, tuple)):
            if has_work(*array):
                return True
        elif isinstance(array, mx.array):
            graph = io.StringIO()
            mx.export_to_dot(graph, array)
            if "->" in graph.getvalue():
                return True
    return False


@contextmanager
def counted(reader: Reader) -> Iterator[EvaluationCounts]:
    """Counts while the context lasts. reader: the model's."""
    counts = EvaluationCounts()
    evaluate, begin, read_back = mx.eval, mx.async_eval, host_arrays.to_numpy

    def counted_eval(*arrays: Any) -> None:
        counts.waits += has_work(*arrays)
        evaluate(*arrays)

    def counted_async_eval(*arrays: Any) -> None:
        counts.begun += has_work(*arrays)
        begin(*arrays)

    def counted_read_back(array: mx.array, *arguments: Any, **keywords: Any) -> np.ndarray:
        counts.waits += has_work(array)
        return read_back(array, *arguments, **keywords)

    with ExitStack() as patches:
        patches.enter_context(patch.object(mx, "eval", counted_eval))
        patches.enter_context(patch.object(mx, "async_eval", counted_async_eval))
        for module in list(sys.modules.values()):
            if getattr(module, "to_numpy", None) is read_back:
                patches.enter_context(patch.object(module, "to_numpy", counted_read_back))
        pool = reader._pool
        for name in ("library", "keeping_gil"):
            patches.enter_context(patch.object(pool, name, _Counting(getattr(pool, name), counts)))
        yield counts


class _Counting:
    """A library whose functions count their calls."""

    def __init__(self, library: Any, counts: EvaluationCounts) -> None:
        self._library, self._counts = library, counts

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = getattr(self._library, name)

        def call(*arguments: Any) -> Any:
            self._counts.c_calls += 1
            return function(*arguments)

        return call
