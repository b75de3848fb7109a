"""Makes a model keep the keys and values of its context quantised, in its zoo's QuantizedKVCache.

Only plain KV caches are quantised: not windows that rotate, and not the states of recurrences. Attention must read the
cache through the zoo's scaled_dot_product_attention, without sinks. A trial call finds out; nothing is evaluated.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx

from ..errors import UsageError
from ..layers.cache_parts import parts_of
from ..source.model_kind import error_line
from .memory_needs import OneRow, StreamedNeed, stand_ins

GROUP_SIZES = (64, 32)  # mlx-lm's default, and the one that MLX also has for widths which 64 does not divide
TRIAL_TOKENS = (2, 1)  # attention may treat a prompt and a single token differently


class QuantisedCaches:
    """Makes a model's prompt caches. mlx-lm's `make_prompt_cache` calls it, as the model's `make_cache`.

    groups: the group size of each part of a cache, in order; None for a part that stays as it is.
    """

    def __init__(self, model: Any, groups: Sequence[int | None], bits: int) -> None:
        self._model = weakref.ref(model)  # a reference would be a cycle, and keep a dropped model's memory
        self.groups, self.bits = groups, bits

    def plain(self) -> list[Any]:
        """A cache in the model's own precision."""
        return plain_cache(self._model())

    def __call__(self) -> list[Any]:
        groups = iter(self.groups)
        return [self._quantised(entry, groups) for entry in self.plain()]

    def _quantised(self, entry: Any, groups: Iterator[int | None]) -> Any:
        if hasattr(entry, "caches"):
            entry.caches = tuple(self._quantised(part, groups) for part in entry.caches)
            return entry
        group_size = next(groups)
        return entry if group_size is None else entry.to_quantized(group_size=group_size, bits=self.bits)


def plain_cache(model: Any) -> list[Any]:
    """An empty prompt cache in the model's own precision, even if its caches are quantised."""
    from mlx_lm.models.cache import KVCache

    own: Callable[[Any], list[Any]] | None = getattr(type(model), "make_cache", None)
    return own(model) if own is not None else [KVCache() for _ in model.layers]


def quantise_cache(model: Any, layers: Sequence[tuple[Any, Any, StreamedNeed | OneRow]], bits: int) -> str:
    """Makes the model's prompt caches quantised from now on. Returns the note for the plan.

    layers: the streamed layers, in the form of `needs_of`.

    Raises UsageError if the model's caches or its attention do not allow it, and whatever the model raises itself.
    """
    with stand_ins(layers):
        cache = plain_cache(model)
        _call(model, cache)
        groups = [_group_size(part) for part in parts_of(cache)]
        if not any(groups):
            kinds = ", ".join(sorted({type(part).__name__ for part in parts_of(cache)}))
            raise UsageError(f"this model keeps its context in caches ({kinds}) that cannot be quantised. {WITHOUT}")
        caches = QuantisedCaches(model, groups, bits)
        try:
            _call(model, caches())
        except Exception as error:
            raise UsageError(
                f"this model's attention cannot read a quantised KV cache: {error_line(error)}. {WITHOUT}"
            ) from None
    model.make_cache = caches
    places = [entry for entry in caches() if any(hasattr(part, "bits") for part in parts_of([entry]))]
    return f"{bits} bits" if len(places) == len(cache) else f"{bits} bits in {len(places)} of {len(cache)} layers"


WITHOUT = "Leave --kv-bits (kv_bits) out."


def _call(model: Any, cache: list[Any]) -> None:
    for tokens in TRIAL_TOKENS:
        model(mx.zeros((1, tokens), mx.int32), cache=cache)


def _group_size(part: Any) -> int | None:
    """The group size for a part of a cache that has been called; None if it stays as it is. Raises UsageError."""
    if type(part).__name__ != "KVCache" or part.keys is None:  # each zoo has a class of this name
        return None
    widths = {part.keys.shape[-1], part.values.shape[-1]}
    for size in GROUP_SIZES:
        if all(width and width % size == 0 for width in widths):
            return size
    found = " and ".join(map(str, sorted(widths)))
    raise UsageError(
        f"this model's keys and values have {found} numbers, and only multiples of {GROUP_SIZES[-1]} can be quantised. "
        f"{WITHOUT}"
    )
