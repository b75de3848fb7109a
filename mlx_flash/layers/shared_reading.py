"""Feeds several chunks of a prompt layer by layer, so that they share one reading of every layer.

A model reads all its layers for each chunk. Here every layer is read once, and computes one chunk after the other. Each
call of a layer gets the same arguments as if the chunks were fed to the model one by one, so the bits are the same.

That is possible if the model passes each layer's result to the next layer as it is, and if no other argument of a layer
is an array. A mask, for example, may depend on how much of the context is in the caches, which are then too short.
`bytes_to_share` and every `feed` make sure of it with calls in which the layers do nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .streamed_layers import arrays_in, hooks_of, instead, without_hooks

TRIAL_TOKENS = 4

Call = tuple[tuple[Any, ...], dict[str, Any]]
"""A layer's arguments without the first, which is the result of the layer before, and its named arguments."""


class SharedReading:
    """Feeds chunks to a model whose layers are streamed.

    layers: all layers of the model, in the order of their calls. most: number of chunks that the memory plan has room
    for; 1 to share nothing.
    """

    def __init__(self, layers: Sequence[nn.Module], most: int) -> None:
        self._layers, self.most = layers, most

    def feed(self, model: Any, chunks: Sequence[Sequence[int]], cache: list[Any]) -> bool:
        """Feeds chunks of token ids to the model. False, with nothing done, if this model cannot share here."""
        begun = [self._begin(model, chunk, cache) for chunk in chunks]
        states: list[Any] = [found[0] for found in begun if found is not None]
        if len(states) < len(chunks):
            return False
        calls: list[list[Call]] = [found[1] for found in begun if found is not None]
        for number, layer in enumerate(self._layers):
            hooks = hooks_of(layer)
            if hooks is not None:
                hooks.before()
            results: list[mx.array] = []
            for chunk, state in enumerate(states):
                arguments, named = calls[chunk][number]
                states[chunk] = without_hooks(layer, (state, *arguments), named)
                results = list(arrays_in((states[chunk], arguments, named)))
                mx.eval(results)
            if hooks is not None:
                hooks.after(results)
        return True

    def _begin(self, model: Any, chunk: Sequence[int], cache: list[Any]) -> tuple[mx.array, list[Call]] | None:
        """The first layer's input for a chunk, and the other arguments of all layers; None if they cannot be known."""
        inputs: list[mx.array] = []
        passed_on: list[mx.array] = []
        called: list[nn.Module] = []
        calls: list[Call] = []

        def pass_on(layer: nn.Module, x: mx.array, *arguments: Any, **named: Any) -> mx.array:
            called.append(layer)
            inputs.append(x)
            calls.append((arguments, named))
            passed_on.append(x + 0)  # another object than the argument
            return passed_on[-1]

        with instead(self._layers, pass_on):
            model(mx.array(list(chunk))[None], cache=cache)
        all_called = [id(layer) for layer in called] == [id(layer) for layer in self._layers]
        chained = all(x is before for x, before in zip(inputs[1:], passed_on, strict=False))
        held = {id(part) for part in cache}
        known = all(_without_arrays(call, held) for call in calls)
        return (inputs[0], calls) if calls and all_called and chained and known else None


def bytes_to_share(model: Any, layers: Sequence[nn.Module], make_cache: Callable[[], list[Any]]) -> int:
    """Bytes that each token of a chunk takes between two layers if chunks share a reading; 0 if this model cannot.

    Every layer's result must be one array like its first argument, and the model must leave the caches to its layers.
    Nothing is evaluated.
    """
    sizes: list[int] = []

    def trying(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
        result = without_hooks(layer, arguments, named)
        first: Any = arguments[0] if arguments else None
        alike = isinstance(result, mx.array) and isinstance(first, mx.array)
        same = alike and (result.shape, result.dtype) == (first.shape, first.dtype)
        sizes.append(result.nbytes // TRIAL_TOKENS if same else 0)
        return result

    tokens = mx.zeros((1, TRIAL_TOKENS), mx.int32)
    with instead(layers, trying):
        model(tokens, cache=make_cache())
    if len(sizes) != len(layers) or not all(sizes):
        return 0
    untouched, cache = make_cache(), make_cache()
    with instead(layers, lambda layer, x, *_, **__: x):
        model(tokens, cache=cache)
    same = all(
        list(arrays_in(vars(a))) == [] and _counts(a) == _counts(b) for a, b in zip(cache, untouched, strict=True)
    )
    return max(sizes) if same else 0


def _counts(cache: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(cache).items() if isinstance(value, (int, float, str))}


def _without_arrays(call: Call, caches: set[int]) -> bool:
    """Whether no argument has an array, apart from the prompt caches."""
    arguments, named = call
    others = [value for value in (*arguments, *named.values()) if id(value) not in caches]
    return not any(True for _ in arrays_in(others))
