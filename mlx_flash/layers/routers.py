"""Rates a layer's experts by the model's own router, which is found by what it does. No family is named here."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn

LIKELY_NAMES = ("gate", "router")  # tried first


class Router:
    """x (..., D) -> float32 (..., E), large where an expert is likely; None for an input that nothing rates.

    Routers differ: some return a score for each expert, some the chosen experts and their weights, and some are only a
    matrix that their layer multiplies with. The modules beside the experts are tried on the first input of a layer, and
    the first that gives one of these is used from then on. Nothing of this is evaluated.
    """

    def __init__(self, candidates: Sequence[nn.Module], experts: int) -> None:
        """candidates: modules that may be the router, the likeliest first."""
        self._candidates, self._experts = candidates, experts
        self._found: dict[tuple[int, int], Callable[[mx.array], mx.array] | None] = {}  # by the input's axes and width

    def __call__(self, x: mx.array) -> mx.array | None:
        form = (x.ndim, x.shape[-1])
        if form not in self._found:
            self._found[form] = next((rate for rate in self._ways() if _works(rate, x, self._experts)), None)
        rate = self._found[form]
        return None if rate is None else rate(x)

    def _ways(self) -> list[Callable[[mx.array], mx.array]]:
        called = [_Called(module, self._experts) for module in self._candidates]
        return [*called, *(_Multiplied(module) for module in self._candidates)]


class _Called:
    """Calls a module, whose result is scores (..., E), or a tuple with chosen experts (..., K) and their weights."""

    def __init__(self, module: nn.Module, experts: int) -> None:
        self._module, self._experts = module, experts

    def __call__(self, x: mx.array) -> mx.array:
        """Raises ValueError if the result is neither."""
        result = self._module(x)
        arrays = [
            array for array in (result if isinstance(result, tuple) else (result,)) if isinstance(array, mx.array)
        ]
        for ids in arrays:
            if mx.issubdtype(ids.dtype, mx.integer) and ids.shape[:-1] == x.shape[:-1]:
                return self._spread(ids, arrays)
        for scores in arrays:
            if mx.issubdtype(scores.dtype, mx.floating) and scores.shape == (*x.shape[:-1], self._experts):
                return scores.astype(mx.float32)
        raise ValueError("not a router")

    def _spread(self, ids: mx.array, arrays: Sequence[mx.array]) -> mx.array:
        """The weights at the chosen experts' places. Numbers past the experts, which stand for none, are left out."""
        weights = next((a for a in arrays if a.shape == ids.shape and mx.issubdtype(a.dtype, mx.floating)), None)
        values = mx.ones(ids.shape) if weights is None else weights.astype(mx.float32)
        lowest = mx.full((*ids.shape[:-1], self._experts + 1), -mx.inf)
        return mx.put_along_axis(lowest, mx.minimum(ids, self._experts), values, axis=-1)[..., :-1]


class _Multiplied:
    """Multiplies with a module's own matrix (E, D)."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __call__(self, x: mx.array) -> mx.array:
        """Raises KeyError or ValueError if the module has no matrix for `x`."""
        return x.astype(mx.float32) @ self._module["weight"].astype(mx.float32).T


def _works(rate: Callable[[mx.array], mx.array], x: mx.array, experts: int) -> bool:
    try:
        scores = rate(x)
    except Exception:  # Modules of all kinds are tried, and raise whatever they raise for such an input.
        return False
    return scores.shape == (*x.shape[:-1], experts)
