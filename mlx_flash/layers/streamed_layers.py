"""Layers of a model whose weights are read when a token reaches them. Each computes with the zoo's own code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..flash.layer_ring import LayerRing

DEPTH = 6  # of containers and objects in a call's arguments: named arguments, caches of several parts, their arrays

FEW_TOKENS = 16
WRAPS = "_wraps_a_call"  # an attribute of the classes that are made here


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
    """Makes a layer evaluate its results in a prompt, so that only one layer's arrays are in memory at once.

    A few tokens, such as a pass that verifies drafts, take little memory and would only wait for the device.
    """

    def evaluate(results: Sequence[mx.array]) -> None:
        if results[0].shape[-2:-1] > (FEW_TOKENS,):  # (B, T, D)
            mx.eval(results)

    hook(layer, lambda: None, evaluate)


def hook(layer: nn.Module, before: Callable[[], None], after: Callable[[Sequence[mx.array]], None]) -> None:
    """Calls `before` and `after` around each call of a layer, which stays an instance of its class.

    after: gets the arrays of the result first, then those of the arguments, with the prompt caches that the call wrote.
    """
    object.__setattr__(layer, "_hooks", Hooks(before, after))  # a module would take a tuple for parameters
    object.__setattr__(layer, "__class__", _hooked(type(layer)))


def unhook(layer: nn.Module) -> None:
    """Undoes `hook`."""
    object.__delattr__(layer, "_hooks")
    object.__setattr__(layer, "__class__", type(layer).__base__)


def hooks_of(layer: nn.Module) -> Hooks | None:
    """The hooks of a layer; None if it has none."""
    return getattr(layer, "_hooks", None)


@contextmanager
def instead(layers: Sequence[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Inside this context, a call of one of the layers is `call(layer, *arguments, **named)`."""
    kinds = [type(layer) for layer in layers]
    try:
        for layer, kind in zip(layers, kinds, strict=True):
            object.__setattr__(layer, "__class__", type(kind.__name__, (kind,), {"__call__": call, WRAPS: True}))
        yield
    finally:
        for layer, kind in zip(layers, kinds, strict=True):
            object.__setattr__(layer, "__class__", kind)


@dataclass(frozen=True)
class Hooks:
    """What runs around a layer's call, see `hook`."""

    before: Callable[[], None]
    after: Callable[[Sequence[mx.array]], None]


@functools.cache
def _hooked(kind: type[nn.Module]) -> type[nn.Module]:
    class Hooked(kind):  # type: ignore[valid-type, misc]
        def __call__(self, *arguments: Any, **named: Any) -> Any:
            self._hooks.before()
            result = super().__call__(*arguments, **named)
            self._hooks.after(list(arrays_in((result, arguments, named))))
            return result

    Hooked.__name__, Hooked.__qualname__ = kind.__name__, kind.__qualname__
    setattr(Hooked, WRAPS, True)
    return Hooked


def without_hooks(layer: nn.Module, arguments: Sequence[Any], named: dict[str, Any]) -> Any:
    """The result of a layer's call without what runs around it."""
    kind: Any = next(kind for kind in type(layer).__mro__ if WRAPS not in vars(kind))
    return kind.__call__(layer, *arguments, **named)


def arrays_in(value: Any, depth: int = DEPTH) -> Iterator[mx.array]:
    """The arrays in a value: in its items, or in the attributes of an object that is not a module."""
    if isinstance(value, mx.array):
        yield value
    elif depth and not isinstance(value, (nn.Module, type)):
        named = value if isinstance(value, dict) else getattr(value, "__dict__", {})
        for item in value if isinstance(value, (list, tuple)) else named.values():
            yield from arrays_in(item, depth - 1)
