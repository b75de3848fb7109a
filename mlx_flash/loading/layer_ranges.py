"""Ranges of a dense model's layers, one for each rank: whether a model can be taken apart so, and where.

No family is named here. A trace of the model shows what each layer's result depends on. Nothing is evaluated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx

from ..errors import UnsupportedModelError
from ..layers.pipeline_text import counts_tokens
from ..layers.ranked_layers import join, leave_out
from ..layers.streamed_layers import instead, without_hooks
from ..source.model_kind import error_line
from .graph_memory import Graph, trace
from .in_place_model import InPlaceModel, parent_of
from .memory_needs import stand_ins
from .quantised_cache import plain_cache

TRIAL_TOKENS = (2, 1)  # attention may treat a prompt and a single token differently


@dataclass(frozen=True)
class Joints:
    """Where a model's layers can be taken apart.

    caches: for each layer, in the order of calls, its place in a prompt cache. rewinds: whether every cache can always
    be trimmed.
    """

    caches: list[int]
    rewinds: bool


@dataclass(frozen=True)
class RankRoom:
    """What a rank has for layers. memory: bytes for weights and KV caches. rate: bytes per second that it reads."""

    memory: int
    rate: float


def find_joints(mixture: InPlaceModel) -> Joints:
    """Raises UnsupportedModelError for a model whose layers need more of each other than the result before them."""
    count = len(mixture.layers)
    try:
        if mixture.switches or count < 2 or count != len(mixture.model.layers):
            raise UnsupportedModelError("not every layer's weights can be told apart")
        return _Trial(mixture).joints()
    except UnsupportedModelError as error:
        reason = str(error)
    except Exception as error:  # a model may raise anything when it is called in another way than it expects
        reason = error_line(error)
    raise UnsupportedModelError(
        f"the layers of {mixture.files[0].parent} cannot be shared out over ranks: {reason}. Run it on one machine."
    )


class _Trial:
    """Calls of a model in which every layer takes an array of its own in place of the result before it."""

    def __init__(self, mixture: InPlaceModel) -> None:
        self.model = mixture.model
        self.modules = [layer.module for layer in mixture.layers]
        self.paths = layer_paths(mixture)
        self.tables = [stand_in for table in mixture.lookup_tables for stand_in in table.stand_ins]
        self.seen: list[mx.array] = []  # what the first layer got, and each layer's result
        self.given: list[mx.array] = []  # what takes the place of a result
        self.places: list[int] = []

    def joints(self) -> Joints:
        cache = plain_cache(self.model)
        if len(cache) != len(self.modules) or not all(counts_tokens(part) for part in cache):
            kinds = ", ".join(sorted({type(part).__name__ for part in cache}))
            raise UnsupportedModelError(f"its {len(self.modules)} layers have {len(cache)} caches ({kinds})")
        for tokens in TRIAL_TOKENS:
            self._call(cache, tokens)
            forms = {(tuple(each.shape), each.dtype) for each in self.seen}
            if len(forms) != 1 or self.seen[0].ndim != 3:
                raise UnsupportedModelError("its layers do not all hand over an array of one shape and type")
        width, dtype = self.seen[0].shape[-1], self.seen[0].dtype
        places = list(self.places)
        for tokens in TRIAL_TOKENS:
            self._check(tokens, width, dtype)
        return Joints(places, all(getattr(part, "max_size", None) is None for part in cache))

    def _call(self, cache: list[Any], tokens: int, given: Sequence[mx.array] = ()) -> mx.array:
        """Logits. given: taken by the layers, then by what follows, in place of the results before them."""
        self.seen, self.places, rest = [], [], iter(given)

        def call(layer: Any, x: mx.array, *arguments: Any, **named: Any) -> mx.array:
            if not self.seen:
                self.seen.append(x)
                x = next(rest, x)
            found = [place for place, part in enumerate(cache) if any(a is part for a in (*arguments, *named.values()))]
            if len(found) != 1 or found[0] in self.places:
                raise UnsupportedModelError("a layer does not have a cache of its own")
            self.places += found
            result = without_hooks(layer, (x, *arguments), named)
            if not isinstance(result, mx.array):
                raise UnsupportedModelError("a layer returns more than one array")
            self.seen.append(result)
            return next(rest, result)

        with stand_ins(self.tables), instead(self.modules, call):
            logits: mx.array = self.model(mx.zeros((1, tokens), mx.int32), cache=cache)
        return logits

    def _check(self, tokens: int, width: int, dtype: mx.Dtype) -> None:
        """Raises UnsupportedModelError if a result depends on more than what its rank will have."""
        from mlx.utils import tree_flatten

        weights: Any = tree_flatten(self.model.parameters())
        names = [name for name, _ in weights]
        blanks = [mx.zeros(array.shape, array.dtype) for _, array in weights]
        cache = plain_cache(self.model)
        if tokens == 1:
            self._call(cache, 2)
        order = list(self.places)
        held = [
            (place, name) for place in order for name in ("keys", "values") if getattr(cache[place], name) is not None
        ]
        before = [getattr(cache[place], name) for place, name in held]
        between = [mx.zeros((1, tokens, width), dtype) for _ in range(len(self.modules) + 1)]

        def step(*arrays: mx.array) -> list[mx.array]:
            rest = iter(arrays)
            self.model.load_weights([(name, next(rest)) for name in names], strict=False)
            for place, name in held:
                setattr(cache[place], name, next(rest))
            logits = self._call(cache, tokens, list(rest))
            kept = [array for place in order for array in (cache[place].keys, cache[place].values)]
            return [*self.seen, *kept, logits]

        try:
            graph = trace(step, *blanks, *before, *between)
        finally:
            self.model.load_weights(weights, strict=False)
        self._compare(graph, names, [place for place, _ in held], order)

    def _compare(self, graph: Graph, names: list[str], held: list[int], order: list[int]) -> None:
        """Compares what the traced results depend on with what their ranks will have."""
        count = len(self.modules)
        kinds: list[tuple[str, Any]] = [("weight", name) for name in names]
        kinds += [("cache", order.index(place)) for place in held]
        kinds += [("between", number) for number in range(count + 1)]
        of = {array.name: kind for array, kind in zip(graph.inputs, kinds, strict=True)}
        owner = {name: self._layer_of(name) for name in names}

        def may(number: int | None, kind: tuple[str, Any]) -> bool:
            """Whether layer `number` (None: what is before and after the layers) may use an input."""
            what, which = kind
            if what == "weight":
                return owner[which] == number
            if what == "cache":
                return bool(which == number)
            return bool(which == (count if number is None else number))

        outputs: Iterator[Any] = iter(graph.outputs)
        asked: list[tuple[int | None, str]] = [(None, next(outputs).name)]
        asked += [(number, next(outputs).name) for number in range(count)]
        asked += [(number, next(outputs).name) for number in range(count) for _ in range(2)]
        asked.append((None, next(outputs).name))
        for number, name in asked:
            if not all(may(number, of[found]) for found in _inputs_behind(graph, name) if found in of):
                what = "what surrounds its layers" if number is None else f"layer {number + 1}"
                raise UnsupportedModelError(f"{what} needs more than the result before it and its own weights")

    def _layer_of(self, name: str) -> int | None:
        return next((at for at, path in enumerate(self.paths) if name.startswith(f"{path}.")), None)


def _inputs_behind(graph: Graph, name: str) -> set[str]:
    """The names of the arrays that an array is made of and that no operation makes."""
    found, seen, waiting = set(), {name}, [name]
    while waiting:
        each = waiting.pop()
        if (operation := graph.makes.get(each)) is None:
            found.add(each)
            continue
        fresh = {array.name for array in operation.inputs} - seen
        seen |= fresh
        waiting += fresh
    return found


def layer_paths(mixture: InPlaceModel) -> list[str]:
    """The layers' paths in the model, in the order of their calls."""
    path_of = {id(module): path for path, module in mixture.model.named_modules()}
    return [path_of[id(layer.module)] for layer in mixture.layers]


def keep_range(mixture: InPlaceModel, own: range, ends: bool) -> None:
    """Leaves a rank only its own layers, and whether it has both ends of the model (embeddings and output head).

    The weights of the others become zeros that take no memory, which only have their shapes.
    """
    from mlx.utils import tree_flatten

    paths, layers = layer_paths(mixture), mixture.layers
    parameters: Any = tree_flatten(mixture.model.parameters())
    for name, array in parameters:
        number = next((at for at, path in enumerate(paths) if name.startswith(f"{path}.")), None)
        if (ends if number is None else number in own) or name in mixture.streamed:
            continue
        parent, key = parent_of(mixture.model, name)
        parent[key] = mx.broadcast_to(mx.zeros((), array.dtype), array.shape)
        mixture.streamed.add(name)
    for number, layer in enumerate(layers):
        if number in own:
            join(layer.module, number == own[0], number == own[-1])
        else:
            leave_out(layer.module)
    mixture.layers = [layers[number] for number in own]
    if not ends:
        mixture.lookup_tables = []
    what = f"layers {own[0] + 1} to {own[-1] + 1} of {len(layers)}"
    mixture.part = what if len(own) > 1 else f"layer {own[0] + 1} of {len(layers)}"


def divide_layers(sizes: Sequence[int], kept: int, rooms: Sequence[RankRoom]) -> list[range]:
    """The ranges of layers with the least squares of the ranks' waits for their disks; among those, the evenest.

    sizes: of each layer, in bytes. kept: bytes of a layer's KV cache. rooms: of each rank.

    Bytes that fit take no time, and neither do the layers in the buffers of a rank that reads: it fills them while a
    token is at the others. A token passes the ranks one after the other, so a disk that is much faster should read most
    of the rest. The squares do that, and leave disks that are about as fast about as much.
    """
    count, ends = len(sizes), [0, *accumulate(size + kept for size in sizes)]
    best: list[tuple[int, float, tuple[int, ...]] | None] = [(0, 0.0, ())] + [None] * count
    for room in rooms:
        following: list[tuple[int, float, tuple[int, ...]] | None] = [None] * (count + 1)
        for end in range(1, count + 1):
            for begin in range(end):
                if (before := best[begin]) is None:
                    continue
                nbytes = ends[end] - ends[begin]
                waits = round(max(0, nbytes - room.memory) / room.rate * 1e6) ** 2  # integers add up exactly
                full = nbytes**2 / max(1, room.memory)
                made = (before[0] + waits, before[1] + full, (*before[2], end))
                if following[end] is None or made < following[end]:  # type: ignore[operator]
                    following[end] = made
        best = following
    if (found := best[count]) is None:
        raise UnsupportedModelError(f"{count} layers cannot be shared out over {len(rooms)} ranks. Use fewer ranks.")
    begins = (0, *found[2][:-1])
    return [range(begin, end) for begin, end in zip(begins, found[2], strict=True)]
