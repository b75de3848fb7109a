"""Which experts a mixture's routers choose, token by token as it decodes a text, and what earlier states would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.errors import UsageError
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.layers.experts import StreamedExperts
from mlx_flash.loading.expert_files import router_of

from .traces import LayerTrace, decode, packed

State = Callable[[], mx.array]  # what a layer's router is given instead of its input: (B, T, D)


@dataclass(frozen=True)
class Place:
    """Where a layer's experts are: `block[name]`, in the `index`-th of the model's layers."""

    index: int
    layer: Any
    block: Any
    name: str

    def router(self) -> Any:
        """The linear map whose largest outputs name the experts. Raises UsageError if the block has none by itself."""
        if (router := router_of(self.block, self.name)) is not None:
            return router
        raise UsageError(
            "look-ahead is measured on mixtures whose experts stand beside a linear `gate` or `router`, as Qwen3-MoE's "
            f"and Mixtral's do; {type(self.block).__name__} has none."
        )


def places(model: Any) -> Iterator[Place]:
    """Of all layers that have streamed experts."""
    for index, layer in enumerate(model.layers):
        for _, block in layer.named_modules():
            for name, child in block.children().items():
                if isinstance(child, StreamedExperts):
                    yield Place(index, layer, block, name)


class RouterTap(nn.Module):
    """Stands in front of a layer's experts and writes down which are used, and how its router ranks them from `states`.

    rank_rows: by state, int16 (N, E) of every call: 0 for the expert that would be chosen first.
    """

    def __init__(self, inner: Any, trace: LayerTrace, router: Any, states: dict[str, State]) -> None:
        super().__init__()
        self.inner, self._router = inner, router
        self.trace, self.states = trace, states
        self.choices = 0  # experts per token
        self.rank_rows: dict[str, list[np.ndarray]] = {state: [] for state in states}

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        chosen = indices.reshape(-1, indices.shape[-1])  # (N, K)
        self.choices = chosen.shape[-1]
        mask = (chosen[:, :, None] == mx.arange(self.trace.neurons)).any(axis=1)  # (N, E)
        self.trace.chosen_rows.append(packed(mask))
        for state, given in self.states.items():
            scores = self._router(given()).reshape(mask.shape)
            ranks = mx.argsort(mx.argsort(-scores, axis=-1), axis=-1)
            self.rank_rows[state].append(to_numpy(ranks.astype(mx.int16)))
        result: mx.array = self.inner(x, indices)
        return result

    def ranks(self, state: str) -> np.ndarray:
        """int16 (tokens, E)"""
        return np.concatenate(self.rank_rows[state])


def record(
    model: Any, ids: list[int], prefix: list[int], name: str, states: dict[int, dict[str, State]] | None = None
) -> list[RouterTap]:
    """Decodes `ids`; a RouterTap of every layer that has experts. states: by layer and name, none by default."""
    taps = []
    for place in (found := list(places(model))):
        inner, of_layer = place.block[place.name], (states or {}).get(place.index, {})
        trace = LayerTrace(place.index, inner.units.experts, 1)
        taps.append(RouterTap(inner, trace, place.router() if of_layer else None, of_layer))
        place.block[place.name] = taps[-1]
    try:
        decode(model, ids, prefix, name)
    finally:
        for place, tap in zip(found, taps, strict=True):
            place.block[place.name] = tap.inner
    return taps


def habits(chosen: np.ndarray) -> dict[str, float]:
    """How much a token's experts tell of the next one's, and how uneven their use is. bool (T, E)

    again: share of the experts used that the token before used, too; again_by_chance: the same, the tokens in
    another order, so what popularity alone brings; busiest: share of all uses that the busiest quarter has.
    """
    uses = np.sort(chosen.mean(axis=0))[::-1]
    shuffled = np.random.default_rng(0).permutation(chosen)
    return {
        "again": float((chosen[1:] & chosen[:-1]).sum() / chosen[1:].sum()),
        "again_by_chance": float((shuffled[1:] & shuffled[:-1]).sum() / chosen[1:].sum()),
        "busiest": float(uses[: max(1, len(uses) // 4)].sum() / uses.sum()),
    }
