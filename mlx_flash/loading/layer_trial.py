"""Times a model's layers, and what it computes outside of them, before its weights are loaded.

The zoo's own code computes a token, with arbitrary numbers in place of weights. One layer of each kind is timed: layers
are of one kind if their class and the shapes of their weights are the same. A layer of a mixture has few experts. At
any time the weights of one layer, or those outside of the layers, are in memory.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..layers.experts import StreamedExperts
from ..layers.streamed_layers import arrays_in, instead, without_hooks
from .in_place_model import InPlaceModel, module_at, parent_of
from .memory_needs import stand_ins
from .quantised_cache import plain_cache

TURNS = 20  # of each measurement; the median counts
SECONDS = 0.15  # After so long, LEAST_TURNS are enough.
LEAST_TURNS = 3
NUMBER = 0.01  # in place of every weight; some products skip zeros

Place = tuple[Any, str, tuple[int, ...], mx.Dtype]
"""An array of a module: the module or list, its name there, its shape and dtype."""


@dataclass(frozen=True)
class TokenSeconds:
    """The seconds of a token that reads nothing: of each layer, in the order of their calls, and of all the rest."""

    layers: list[tuple[nn.Module, float]]
    outside: float

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self.layers) + self.outside


def token_seconds(mixture: InPlaceModel, slots: int, beside: Callable[[Callable[[], object]], None]) -> TokenSeconds:
    """Times a token that reads nothing.

    slots: number of experts that a layer computes at once. Where a token names more, it computes in rounds. beside:
    gets a function that computes the first layer, while its weights are in memory.

    The model is as before when this returns. Raises whatever a model raises that is called in another way than it
    expects.
    """
    with _layers_timed(mixture, slots, beside) as (cache, called):

        def token() -> None:
            called.clear()
            logits = mixture.model(mx.zeros((1, 1), mx.int32), cache=cache)[:, -1, :]
            logprobs = logits - mx.logsumexp(logits, keepdims=True)
            mx.eval(mx.argmax(logprobs, axis=-1), logprobs)

        token()  # which times each kind of layer; from now on a layer returns what is known
        return TokenSeconds(list(called), _seconds(token))


def prompt_seconds(mixture: InPlaceModel, slots: int, tokens: int) -> float:
    """The seconds in which all layers compute `tokens` tokens of a prompt, whose tokens choose experts at random.

    slots: number of experts that a layer computes at once. Raises as `token_seconds` does.
    """
    with _layers_timed(mixture, slots, lambda _: None, StreamedAtRandom) as (cache, called):
        mixture.model(mx.zeros((1, tokens), mx.int32), cache=cache)  # a prompt's logits are not computed
        return sum(seconds for _, seconds in called)


@contextmanager
def _layers_timed(
    mixture: InPlaceModel,
    slots: int,
    beside: Callable[[Callable[[], object]], None],
    streamed: type[StreamedExperts] = StreamedExperts,
) -> Iterator[tuple[Any, list[tuple[nn.Module, float]]]]:
    """Inside this context, each layer that the model calls is timed, once for each kind.

    Yields a cache for the model, and the list to which every call of a layer adds the layer and its seconds. streamed:
    the class in the places of switch layers.
    """
    found: list[nn.Module] = [layer for layer in getattr(mixture.model, "layers", ()) if isinstance(layer, nn.Module)]
    known: dict[Any, tuple[Any, float]] = {}  # kind, and number of a layer -> its result, and its seconds
    called: list[tuple[nn.Module, float]] = []

    def timed(layer: nn.Module, *arguments: Any, **named: Any) -> Any:
        if id(layer) not in known:
            known[id(layer)] = of_kind(layer, arguments, named)
        result, seconds = known[id(layer)]
        called.append((layer, seconds))
        return result

    def of_kind(layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, float]:
        places = _places(layer, of_experts)
        kind = (type(layer).__name__, tuple((name, shape, dtype) for _, name, shape, dtype in places))
        if kind not in known:
            mx.eval(list(arrays_in((arguments, named))))

            def compute() -> Any:
                # Each turn begins with the same context. Otherwise a mask would not fit from the second one on.
                given = tuple(map(own, arguments)), {name: own(value) for name, value in named.items()}
                result = without_hooks(layer, *given)
                mx.eval(list(arrays_in((result, given))))
                return result

            known[kind] = compute(), _seconds(compute)
            if len(known) == 1:
                beside(compute)
            _forget(places)
        return known[kind]

    tables = [stand_in for table in mixture.lookup_tables for stand_in in table.stand_ins]
    with (
        stand_ins(tables),
        _few_experts(mixture, slots, streamed) as of_experts,
        _without_weights(mixture.model),
        instead(found, timed),
    ):
        cache = plain_cache(mixture.model)

        def own(value: Any) -> Any:
            return copy.deepcopy(value) if any(value is each for each in cache) else value

        yield cache, called


def _seconds(call: Callable[[], object]) -> float:
    """The seconds of a call that was made before."""
    times: list[float] = []
    while len(times) < LEAST_TURNS or (len(times) < TURNS and sum(times) < SECONDS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def _places(layer: nn.Module, of_experts: dict[int, list[Any]]) -> list[Place]:
    """The weights of a layer, those of its experts included. of_experts: see `_few_experts`.

    Constants, such as the frequencies of positions, have names with an underscore and stay as they are.
    """
    modules = [*layer.modules()]
    modules += [each for module in layer.modules() for each in of_experts.get(id(module), [])]
    return [
        (module, name, array.shape, array.dtype)
        for module in modules
        for name, array in module.items()
        if isinstance(array, mx.array) and not name.startswith("_")
    ]


def _forget(places: Sequence[Place]) -> None:
    """Puts arrays that are not evaluated in the places of others, whose memory is free then."""
    for module, name, shape, dtype in places:
        module[name] = _filled(shape, dtype)


def _filled(shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
    """An array that takes no memory until it is used."""
    return mx.full(shape, NUMBER if mx.issubdtype(dtype, mx.floating) else 0, dtype)


@contextmanager
def _without_weights(model: Any) -> Iterator[None]:
    """Inside this context, a model's weights are numbers that are not in memory until they are used."""
    from mlx.utils import tree_flatten

    weights: Any = tree_flatten(model.parameters())
    try:
        model.load_weights([(name, _filled(array.shape, array.dtype)) for name, array in weights], strict=False)
        yield
    finally:
        model.load_weights(weights, strict=False)


@contextmanager
def _few_experts(mixture: InPlaceModel, slots: int, streamed: type[StreamedExperts]) -> Iterator[dict[int, list[Any]]]:
    """Inside this context, every switch layer is a streamed one that has `slots` slots and reads nothing.

    Yields the modules that have the experts' arrays, by the `id` of the streamed layer.
    """
    holders: dict[int, list[Any]] = {}
    held = {path: module_at(mixture.model, path) for path in mixture.switches}
    try:
        for path, tensors in mixture.switches.items():
            parent, name = parent_of(mixture.model, path)
            shapes = {key: ((slots, *tensor.shape), tensor.dtype) for key, tensor in tensors.items()}
            units: Any = _FewExperts(len(next(iter(tensors.values())).offsets), slots, shapes)
            copied = _copied(held[path])
            inner = [copied, *(child for child in copied.children().values() if isinstance(child, nn.Module))]
            parent[name] = streamed(copied, units)
            holders[id(parent[name])] = inner
        yield holders
    finally:
        for path, module in held.items():
            parent, name = parent_of(mixture.model, path)
            parent[name] = module


class StreamedAtRandom(StreamedExperts):
    """Streamed experts that a prompt's tokens choose at random: without weights a router names the same ones always."""

    def __call__(self, x: mx.array, indices: mx.array, *rest: mx.array) -> mx.array:
        choices = indices.shape[-1]
        chances = np.random.default_rng(0).random((indices.size // choices, self.experts), np.float32)
        chosen = np.argpartition(chances, choices - 1, axis=1)[:, :choices].astype(np.uint32)
        return super().__call__(x, mx.array(chosen).reshape(indices.shape), *rest)


class _FewExperts:
    """Takes the place of `ExpertSlots`. All experts are in its slots, as many at once as these can hold."""

    all_resident = False
    held = None
    shared = SimpleNamespace(before_layer=lambda _: None)

    def __init__(self, count: int, slots: int, shapes: dict[str, tuple[tuple[int, ...], mx.Dtype]]) -> None:
        self.count = count
        self.pools = {name: _filled(*kind) for name, kind in shapes.items()}
        self.slots, self.slot_of = slots, np.arange(count) % slots

    def look_up(self, needed: np.ndarray) -> None:
        """Leaves it to `use`."""

    def use(self, experts: np.ndarray, **_: Any) -> Iterator[np.ndarray]:
        self._rounds = len(experts) > self.slots
        for first in range(0, len(experts), self.slots):
            yield experts[first : first + self.slots]

    def guard(self, output: mx.array) -> None:
        """Evaluates the output where the real slots would be written before the next round."""
        if self._rounds:
            mx.eval(output)


def _copied(switch: Any) -> Any:
    """A copy of a switch layer and its projections, which share their arrays with it."""
    copied = copy.copy(switch)
    for name, child in switch.children().items():
        if isinstance(child, nn.Module):
            copied[name] = copy.copy(child)
    return copied
