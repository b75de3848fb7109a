"""Feeds several chunks of a prompt layer by layer, so that they share one reading of every layer.

A model reads all its layers for each chunk. Here every layer is read once, and computes one chunk after the other. Each
call of a layer gets the same arguments as if the chunks were fed to the model one by one, so the bits are the same.

The arguments come from calls of the model in which the layers pass on their input. That is right if the model does
nothing else with a layer's result than to pass it to the next layer, and if no other argument depends on it. Both are
checked: the next layer must get the very array, and the other arrays must be equal if the layers pass on other numbers.
Masks depend on how much of the context is in the caches, so each call finds them with the offset that they will have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .cache_parts import parts_of
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
        if not all(_is_plain(part) for part in parts_of(cache)):
            return False
        states: list[mx.array] = []
        calls: list[list[Call]] = []
        tokens = 0
        for chunk in chunks:
            with _moved_on(cache, tokens):
                begun = self._begin(model, mx.array(list(chunk))[None], cache)
            if begun is None:
                return False
            states.append(begun[0])
            calls.append(begun[1])
            tokens += len(chunk)
        for number, layer in enumerate(self._layers):
            hooks = hooks_of(layer)
            if hooks is not None:
                hooks.before()
            results: list[mx.array] = []
            for chunk_number, state in enumerate(states):
                arguments, named = calls[chunk_number][number]
                states[chunk_number] = without_hooks(layer, (state, *arguments), named)
                results = list(arrays_in((states[chunk_number], arguments, named)))
                mx.eval(results)
            if hooks is not None:
                hooks.after(results)
        return True  # All results are evaluated, and so is everything in the caches.

    def _begin(self, model: Any, tokens: mx.array, cache: list[Any]) -> tuple[mx.array, list[Call]] | None:
        """The first layer's input for tokens (1, T), and the other arguments of all layers; None if they depend on the
        layers' results."""
        known = self._arguments(model, tokens, cache, lambda x: x + 0)
        others = self._arguments(model, tokens, cache, lambda x: 1 - x)
        if known is None or others is None:
            return None
        pairs = zip(_arrays_beside(known[1], cache), _arrays_beside(others[1], cache), strict=True)
        same = all(a is b or (a.shape == b.shape and bool(mx.array_equal(a, b).item())) for a, b in pairs)
        return known if same else None

    def _arguments(
        self, model: Any, tokens: mx.array, cache: list[Any], result: Callable[[mx.array], mx.array]
    ) -> tuple[mx.array, list[Call]] | None:
        """The same if every layer's result is `result` of its input; None if a layer gets another input than that."""
        inputs: list[mx.array] = []
        results: list[mx.array] = []
        called: list[nn.Module] = []
        calls: list[Call] = []

        def pass_on(layer: nn.Module, x: mx.array, *arguments: Any, **named: Any) -> mx.array:
            called.append(layer)
            inputs.append(x)
            calls.append((arguments, named))
            results.append(result(x))
            return results[-1]

        with instead(self._layers, pass_on):
            model(tokens, cache=cache)
        all_called = [id(layer) for layer in called] == [id(layer) for layer in self._layers]
        chained = all(x is before for x, before in zip(inputs[1:], results, strict=False))
        return (inputs[0], calls) if calls and all_called and chained else None


def bytes_to_share(model: Any, layers: Sequence[nn.Module], cache: list[Any]) -> int:
    """Bytes that each token of a chunk takes between two layers if chunks share a reading; 0 if this model cannot.

    Every layer's result must be one array like its first argument. Nothing is evaluated. cache: an empty one.
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
        model(tokens, cache=cache)
    if len(sizes) != len(layers) or not all(sizes):
        return 0
    return max(sizes)


def _is_plain(part: Any) -> bool:
    """Whether a mask depends on a part of a prompt cache through its offset and its window alone."""
    from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache

    return type(part) in (KVCache, QuantizedKVCache, RotatingKVCache)


@contextmanager
def _moved_on(cache: list[Any], tokens: int) -> Iterator[None]:
    """Inside this context, a prompt cache of plain parts says that it holds `tokens` more tokens than it does."""
    parts = parts_of(cache)
    offsets = [part.offset for part in parts]
    try:
        for part, offset in zip(parts, offsets, strict=True):
            part.offset = offset + tokens
        yield
    finally:
        for part, offset in zip(parts, offsets, strict=True):
            part.offset = offset


def _arrays_beside(calls: Sequence[Call], cache: list[Any]) -> list[mx.array]:
    """The arrays in arguments, apart from those of prompt caches."""
    caches = {id(entry) for entry in [*cache, *parts_of(cache)]}
    values = [value for arguments, named in calls for value in (*arguments, *named.values())]
    return [array for value in values if id(value) not in caches for array in arrays_in(value)]
