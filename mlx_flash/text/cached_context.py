"""One conversation's tokens with their KV cache, and the places that it may be cut back to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map

from ..defaults import KV_STEP_TOKENS
from ..flash.files import round_up
from ..layers.cache_parts import parts_of
from .encoding import common_prefix


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Copies of the parts of a cache that cannot be trimmed, in the order of `parts_of`. Nothing changes them."""

    parts: tuple[Any, ...]
    nbytes: int


@dataclass(eq=False)
class CachedContext:
    """Tokens, and the cache of mlx-lm that holds them.

    A place is a number of leading tokens. prompt_cache.py explains which of them may be kept, and why.

    cache: the caches of the layers, from `make_prompt_cache`.
    step: tokens per chunk of the prompts that were read.
    stops: places that any prompt may continue from, in order: ends of whole chunks, and of earlier turns.
    ends: places where all of a prompt but its last token had been read.
    as_read: the tokens up to here were read from the beginning, with nothing decoded among them.
    decoded: whether the last token was fed alone.
    snapshots: by place.
    whole: whether every layer's cache holds exactly the tokens. Otherwise the context cannot be used.
    written: the name of the file that holds exactly this context, or "".
    replaces: the name of a file that is not needed once this context is written, or "".
    """

    cache: list[Any]
    step: int
    tokens: list[int] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    as_read: int = 0
    decoded: bool = False
    snapshots: dict[int, Snapshot] = field(default_factory=dict)
    whole: bool = True
    written: str = ""
    replaces: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of the cache as it is allocated, without snapshots."""
        return sum(array.nbytes for part in parts_of(self.cache) for array in _arrays_of(part))

    # -- bookkeeping -------------------------------------------------------------------------------------------

    def place_for(self, prompt: list[int], step: int, fresh: bool = False) -> int:
        """How many of the cached tokens a prompt can use. fresh: only those that were read as this prompt would be."""
        last = len(prompt) - 1  # The last token must go through the model, which gives the next one.
        common = self.common(prompt[:last])
        whole = len(self.tokens)
        most = min(common, self.as_read) if fresh else common
        if step != self.step:
            return whole if self.decoded and most == whole else 0
        if most == whole and (self.decoded or whole % step == 0):
            return whole
        if most == last and last in self.ends and self.can_cut(last):
            return last
        return next((place for place in reversed(self.stops) if place <= most and self.can_cut(place)), 0)

    def common(self, prompt: list[int]) -> int:
        """How many tokens the context and a prompt have in common."""
        return common_prefix(self.tokens, prompt)

    def answered(self, prompt: list[int]) -> bool:
        """Whether tokens were decoded after this very prompt."""
        return len(prompt) - 1 in self.ends and self.tokens[: len(prompt)] == prompt

    def can_cut(self, place: int) -> bool:
        trims = all(part.is_trimmable() for part in parts_of(self.cache))
        return trims or place in self.snapshots or place == len(self.tokens)

    def read(self, prompt: list[int], place: int) -> None:
        """Notes that the cache holds the first `place` tokens of a prompt, after a chunk or before the first one."""
        before, self.written = len(self.tokens), ""
        if place == before and self.decoded:
            self._add_stop(place)  # an earlier turn ends here
        if before == self.as_read:
            self.as_read = place
        self.tokens = prompt[:place]
        self.decoded = False
        if place % self.step == 0:
            self._add_stop(place)
        if place == len(prompt) - 1 and place not in self.ends:
            self.ends.append(place)

    def decode(self, tokens: list[int]) -> None:
        """Notes that the cache holds these tokens, the last of which was fed alone."""
        self.tokens, self.decoded, self.written = tokens, True, ""

    def _add_stop(self, place: int) -> None:
        if place and place not in self.stops:
            self.stops.append(place)
            self.stops.sort()

    # -- the cache itself --------------------------------------------------------------------------------------

    def cut(self, place: int) -> None:
        """Forgets the tokens after `place`. If this fails, the context cannot be used any more."""
        if surplus := len(self.tokens) - place:
            snapshot = self.snapshots.get(place)
            self.cache = [_cut_layer(layer, surplus, restored) for layer, restored in _by_layer(self.cache, snapshot)]
            mx.eval([_arrays_of(part) for part in parts_of(self.cache)])
        self.forget_after(place)

    def copy(self, place: int) -> CachedContext:
        """A context of the first `place` tokens with memory of its own, apart from snapshots."""
        snapshot = self.snapshots.get(place) if place < len(self.tokens) else None
        surplus = len(self.tokens) - place
        cache = [_copied_layer(layer, place, surplus, restored) for layer, restored in _by_layer(self.cache, snapshot)]
        mx.eval([_arrays_of(part) for part in parts_of(cache)])
        made = CachedContext(
            cache,
            self.step,
            self.tokens,
            list(self.stops),
            list(self.ends),
            self.as_read,
            self.decoded,
            dict(self.snapshots),
        )
        made.forget_after(place)
        return made

    def forget_after(self, place: int) -> None:
        """Forgets the places after `place`, which the cache was cut back to."""
        if place < len(self.tokens):
            # Whatever ends at a place to cut back to may be continued.
            self.decoded = place in self.stops and place % self.step != 0
            self.written = self.replaces = ""
        self.tokens = self.tokens[:place]
        self.stops = [stop for stop in self.stops if stop <= place]
        self.ends = [end for end in self.ends if end <= place]
        self.as_read = min(self.as_read, place)
        self.snapshots = {at: snapshot for at, snapshot in self.snapshots.items() if at <= place}

    def snapshot(self) -> None:
        """Keeps a copy of what cannot be trimmed, for a later cut to the present end."""
        parts = tuple(copied_part(part) if forgets(part) else None for part in parts_of(self.cache))
        mx.eval([_arrays_of(part) for part in parts])
        self.snapshots[len(self.tokens)] = Snapshot(parts, sum(a.nbytes for part in parts for a in _arrays_of(part)))

    def snapshot_bytes(self) -> int:
        """The bytes that `snapshot` would take now."""
        return sum(a.nbytes for part in parts_of(self.cache) if forgets(part) for a in _arrays_of(part))

    def begin(self, step: int, tokens: int) -> None:
        """Prepares for a prompt that is read in chunks of `step`, up to `tokens` in all."""
        if step != self.step:
            self.step, self.as_read = step, 0
            self.stops, self.ends, self.snapshots = [], [], {}
        make_room(self.cache, tokens)

    def drop_room(self) -> None:
        """Evaluates the cache, and frees the steps of it that hold no token."""
        size = round_up(len(self.tokens), KV_STEP_TOKENS)
        for part in parts_of(self.cache):
            if grows(part) and _allocated(part) > size:
                _replace_arrays(part, partial(_first_tokens, size=size))
            mx.eval(_arrays_of(part))


def forgets(part: Any) -> bool:
    """Whether a part of a cache cannot be trimmed, or not once it holds more tokens than its window or its buffer."""
    window = getattr(part, "max_size", None) or getattr(part, "chunk_size", None)
    pools = hasattr(part, "pooled")  # mlx-vlm's: what is in the buffer becomes one entry as soon as it is full
    return not part.is_trimmable() or window is not None or pools


def copied_part(part: Any) -> Any:
    """A copy with arrays of its own, not yet evaluated. mlx-lm changes a cache's arrays in place."""
    made = copy.copy(part)
    for name, value in vars(part).items():
        # The product makes a new array, with the same bits; MLX's own copies may share memory.
        setattr(made, name, tree_map(lambda item: item * 1 if isinstance(item, mx.array) else item, value))
    return made


def make_room(cache: list[Any], tokens: int) -> None:
    """Grows a cache in use to hold `tokens`, rounded up to whole steps, as the plan counts it.

    mlx-lm would cut off the unused part of the last step and begin a new step there. The cache would then be up to a
    step larger than planned.
    """
    size = round_up(tokens, KV_STEP_TOKENS)

    def grown(array: mx.array) -> mx.array:
        more = mx.zeros((*array.shape[:-2], size - array.shape[-2], array.shape[-1]), array.dtype)
        return mx.concatenate([array, more], axis=-2)

    for part in parts_of(cache):
        if grows(part) and _allocated(part) < size:
            _replace_arrays(part, grown)


def grows(part: Any) -> bool:
    """Whether a part keeps all tokens, on the axis before the last of its arrays, in steps (KVCache and quantised)."""
    return not forgets(part) and hasattr(part, "step") and getattr(part, "keys", None) is not None


def _allocated(part: Any) -> int:
    """The number of tokens that a growing part has memory for."""
    first: mx.array = part.keys if isinstance(part.keys, mx.array) else part.keys[0]
    return first.shape[-2]


def _replace_arrays(part: Any, change: Callable[[mx.array], mx.array]) -> None:
    """Replaces keys, then values, so that only one of them exists twice. Quantised ones are several arrays each."""
    for name in ("keys", "values"):
        value = tree_map(change, getattr(part, name))
        mx.eval(value)
        setattr(part, name, value)


def _first_tokens(array: mx.array, size: int) -> mx.array:
    """(..., tokens, width) -> (..., at most size, width), in memory of its own."""
    return array[..., :size, :] * 1


def _arrays_of(part: Any) -> list[mx.array]:
    if part is None:
        return []
    leaves: list[tuple[str, Any]] = tree_flatten(list(vars(part).values()))  # type: ignore[assignment]
    return [leaf for _, leaf in leaves if isinstance(leaf, mx.array)]


def _by_layer(cache: list[Any], snapshot: Snapshot | None) -> Iterator[tuple[Any, list[Any]]]:
    """Each layer with the snapshot's copies of its parts; None for a part without one."""
    copies = iter(snapshot.parts if snapshot is not None else [None] * len(parts_of(cache)))
    for layer in cache:
        yield layer, [next(copies) for _ in getattr(layer, "caches", [layer])]


def _cut_layer(layer: Any, surplus: int, restored: list[Any]) -> Any:
    parts = []
    for part, saved in zip(getattr(layer, "caches", [layer]), restored, strict=True):
        if saved is None:
            part.trim(surplus)
        parts.append(part if saved is None else copied_part(saved))
    return _layer_of(layer, parts)


def _copied_layer(layer: Any, place: int, surplus: int, restored: list[Any]) -> Any:
    parts = []
    for part, saved in zip(getattr(layer, "caches", [layer]), restored, strict=True):
        if saved is not None:
            parts.append(copied_part(saved))
            continue
        if grows(part):
            made, size = copy.copy(part), round_up(place, KV_STEP_TOKENS)
            _replace_arrays(made, partial(_first_tokens, size=size))
        else:
            made = copied_part(part)
        if surplus:
            made.trim(surplus)
        parts.append(made)
    return _layer_of(layer, parts)


def _layer_of(layer: Any, parts: list[Any]) -> Any:
    """A layer's cache like `layer` with other parts."""
    if not hasattr(layer, "caches"):
        return parts[0]
    made = copy.copy(layer)
    made.caches = type(layer.caches)(parts)
    return made
