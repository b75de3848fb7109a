"""Layers of a model whose weights are read when a token reaches them. Each computes with the zoo's own code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..flash.layer_ring import LayerRing

DEPTH = 6  # of containers and objects in a call's arguments: named arguments, caches of several parts, their arrays


def stream_layer(layer: nn.Module, weights: Sequence[tuple[nn.Module, str]], ring: LayerRing, number: int) -> None:
    """Makes a layer take its weights from a ring, at every call.

    layer: called with anything that holds arrays and prompt caches. weights: the module and the name of each of the
    layer's tensors, in the order of `ring.layers[number]`. number: the layer's number in the ring.
    """

    def bind(views: Sequence[mx.array]) -> None:
        for (module, name), view in zip(weights, views, strict=True):
            module[name] = view

    bind(ring.views(number))  # The arrays until now would read the whole layer.
    hook(layer, lambda: bind(ring.use(number)), lambda results: ring.release(number, results))


def evaluate_prompts(layer: nn.Module) -> None:
    """Makes a layer evaluate its results in a prompt, so that only one layer's arrays are in memory at once."""

    def evaluate(results: Sequence[mx.array]) -> None:
        if results[0].shape[-2:-1] != (1,):  # (B, T, D), of several tokens
            mx.eval(results)

    hook(layer, lambda: None, evaluate)


def hook(layer: nn.Module, before: Callable[[], None], after: Callable[[Sequence[mx.array]], None]) -> None:
    """Calls `before` and `after` around each call of a layer, which stays an instance of its class.

    after: gets the arrays of the result first, then those of the arguments, with the prompt caches that the call wrote.
    """
    object.__setattr__(layer, "_hooks", (before, after))  # a module would take it for parameters
    object.__setattr__(layer, "__class__", _hooked(type(layer)))


def unhook(layer: nn.Module) -> None:
    """Undoes `hook`."""
    object.__delattr__(layer, "_hooks")
    object.__setattr__(layer, "__class__", type(layer).__base__)


@functools.cache
def _hooked(kind: type[nn.Module]) -> type[nn.Module]:
    class Hooked(kind):  # type: ignore[valid-type, misc]
        def __call__(self, *arguments: Any, **named: Any) -> Any:
            before, after = self._hooks
            before()
            result = super().__call__(*arguments, **named)
            after(list(arrays_in((result, arguments, named))))
            return result

    Hooked.__name__, Hooked.__qualname__ = kind.__name__, kind.__qualname__
    return Hooked


def arrays_in(value: Any, depth: int = DEPTH) -> Iterator[mx.array]:
    """The arrays in a value: in its items, or in the attributes of an object that is not a module."""
    if isinstance(value, mx.array):
        yield value
    elif depth and not isinstance(value, (nn.Module, type)):
        named = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        for item in value if isinstance(value, (list, tuple)) else named.values():
            yield from arrays_in(item, depth - 1)
