"""Records the experts that a mixture's routers choose for every token, and those that earlier states would give."""

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
from mlx_flash.layers.routers import Router
from mlx_flash.loading.in_place_model import router_of

from .traces import LayerTrace, decode, packed

State = Callable[[], mx.array]  # an earlier state to give to a layer's router instead of its input: (B, T, D)


@dataclass(frozen=True)
class Place:
    """The place of a layer's experts: `block[name]`, in the model's layer number `index`."""

    index: int
    layer: Any
    block: Any
    name: str

    def router(self) -> Router:
        """Rates the experts; the largest ratings choose them."""
        return router_of(self.block[self.name], [self.block, self.layer])


def places(model: Any) -> Iterator[Place]:
    """The places of all layers with streamed experts."""
    for index, layer in enumerate(model.layers):
        for _, block in layer.named_modules():
            for name, child in block.children().items():
                if isinstance(child, StreamedExperts):
                    yield Place(index, layer, block, name)


class RouterTap(nn.Module):
    """Wraps a layer's experts and records which are used, and how the router ranks them from `states`.

    rank_rows: state -> int16 (N, E) for every call; 0 is the expert that the router would choose first.
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
            if (scores := self._router(given())) is None:
                raise UsageError("no router was found beside the experts that takes a layer's hidden state.")
            scores = scores.reshape(mask.shape)
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
    """Decodes `ids` and returns a RouterTap for every layer with experts. states: layer -> name -> state."""
    taps = []
    for place in (found := list(places(model))):
        inner, of_layer = place.block[place.name], (states or {}).get(place.index, {})
        trace = LayerTrace(place.index, inner.units.count, 1)
        taps.append(RouterTap(inner, trace, place.router() if of_layer else None, of_layer))
        place.block[place.name] = taps[-1]
    try:
        decode(model, ids, prefix, name)
    finally:
        for place, tap in zip(found, taps, strict=True):
            place.block[place.name] = tap.inner
    return taps


def habits(chosen: np.ndarray) -> dict[str, float]:
    """Measures how well a token's experts predict the next token's, and how uneven their use is. bool (T, E)

    again: share of the experts used that the token before also used. again_by_chance: the same with the tokens
    shuffled, which is the effect of popularity alone. busiest: share of all uses that go to the busiest quarter.
    """
    uses = np.sort(chosen.mean(axis=0))[::-1]
    shuffled = np.random.default_rng(0).permutation(chosen)
    return {
        "again": float((chosen[1:] & chosen[:-1]).sum() / chosen[1:].sum()),
        "again_by_chance": float((shuffled[1:] & shuffled[:-1]).sum() / chosen[1:].sum()),
        "busiest": float(uses[: max(1, len(uses) // 4)].sum() / uses.sum()),
    }
