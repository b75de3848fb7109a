"""A dense model's layers over several ranks: what room a rank has, who computes which range, and rank 0's own.

One conversation at a time: the other ranks keep the KV caches of their layers, and only the last conversation's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..defaults import CONTEXT, THREADS
from ..errors import UsageError
from ..flash.layer_ring import BUFFERS
from ..flash.system import usable_memory_bytes
from ..layers.ranked_layers import LAYERS, FirstRank, connect, lead
from .config import number_of
from .draft_model import PlannedDrafts
from .in_place_loading import streamed_layers
from .in_place_model import InPlaceModel
from .in_place_plan import InPlacePlan, WeightBytes
from .layer_ranges import RankRoom, divide_layers, find_joints, keep_range
from .memory_needs import Needs, needs_of
from .options import LoadOptions
from .plan import FREE_SHARE, MLX_CACHE_BYTES
from .rank_questions import this_host
from .rank_shares import Capacity
from .ranked_loading import Ranks
from .streaming_needs import loading_excess_bytes, process_bytes, reading_bytes
from .unit_rates import RatesOfFiles

RATE_LAYERS = 4  # layers that are read to measure a disk
NO_CACHES = "one conversation at a time, and none of the earlier ones is kept"


class DividedLayers:
    """Rank 0's side: it asks the other ranks, and keeps its own range of the model that it is made with.

    options: to load rank 0's range with.
    """

    def __init__(
        self,
        ranks: Ranks,
        folder: Path,
        mixture: InPlaceModel,
        options: LoadOptions,
        drafts: PlannedDrafts | None = None,
    ) -> None:
        """Raises UsageError for options that need all layers in one process, UnsupportedModelError for a model whose
        layers cannot be told apart, FlashError."""
        _refuse(options)
        joints = find_joints(mixture)
        if drafts is not None and not joints.rewinds:
            raise UsageError(
                "this model's windows forget tokens, so other ranks cannot take drafts back. Leave drafts out."
            )
        context = _context(mixture, options)
        self.options = replace(options, context=context, prompt_cache=0)
        self._ranks, self._joints = ranks, joints
        self._modules = [layer.module for layer in mixture.layers]
        needs = needs_at(mixture, self.options)
        found = ranks.capacities(Capacity(this_host(), 0, 0, 0.0), LAYERS, folder, context=context)
        sharing = sum(rank.host == found[0].host for rank in found)
        own = capacity_of(mixture, self.options, needs, sharing, ends=True)
        if sharing > 1:
            self.options = replace(self.options, memory=own.budget)
        self._divide(mixture, [own, *found[1:]], needs.layer_kv_cache)

    def _divide(self, mixture: InPlaceModel, found: Sequence[Capacity], kept: int) -> None:
        """kept: bytes of a layer's KV cache."""
        weights = WeightBytes.of(mixture)
        buffers = BUFFERS * weights.buffer
        rooms = [RankRoom(rank.slots, rank.rate or 1.0) for rank in found]
        self._ranges = divide_layers(weights.layers, kept, rooms)
        self._lines = tuple(_described(self._ranks.group.names, self._ranges, weights.layers, kept, found, buffers))
        keep_range(mixture, self._ranges[0], ends=True)

    def planned(self, plan: InPlacePlan) -> InPlacePlan:
        """Rank 0's plan, with those of the others."""
        return replace(plan, ranks=self._lines)

    def build(self, build: Callable[[Callable[[str], None]], Any], say: Callable[[str], None]) -> Any:
        """The model. build: loads rank 0's range. The other ranks load theirs, until `Ranks.finish`."""
        self._ranks.begin({"ranges": [[own[0], own[-1] + 1] for own in self._ranges]})
        model = build(say)
        counting = self._joints.caches[self._ranges[0][-1] + 1]
        first = FirstRank(self._ranks.group, counting, model.flash.streamer.counters)
        connect(self._modules, first)
        lead(model, first)
        model.flash.ranks, model.flash.one_conversation = self._ranks, True
        return model


def needs_at(mixture: InPlaceModel, options: LoadOptions) -> Needs:
    """The needs of the whole model for the context in `options`. Raises whatever the model raises."""
    assert isinstance(options.context, int)
    modules = [layer.module for layer in mixture.layers]
    chunk = options.prefill_chunk
    return needs_of(mixture.model, streamed_layers(mixture), options.context, evaluated=modules, chunk=chunk)


def capacity_of(mixture: InPlaceModel, options: LoadOptions, needs: Needs, sharing: int, ends: bool) -> Capacity:
    """What this rank offers: its slots are bytes for layers and their KV caches.

    sharing: the ranks that share this machine's free memory, if no budget is given. ends: whether the rank has the
    embeddings and the output head as well. The disk is measured if not all layers fit. Raises ReadError.
    """
    weights, process = WeightBytes.of(mixture), process_bytes()
    budget = options.budget or int(process + FREE_SHARE * usable_memory_bytes() / sharing)
    own = [*weights.outside, *weights.lookups] if ends else []
    computing = needs.workspace + reading_bytes(options.threads or THREADS, aligned=False)
    taken = process + MLX_CACHE_BYTES + sum(own) + max(computing, loading_excess_bytes(own))
    room = max(0, budget - taken)
    fits = room >= sum(weights.layers) + len(weights.layers) * needs.layer_kv_cache
    return Capacity(this_host(), budget, room, 0.0 if fits else _disk_rate(mixture, options))


def _disk_rate(mixture: InPlaceModel, options: LoadOptions) -> float:
    """Bytes per second that layers are read with. Raises ReadError."""
    layers = mixture.layers[-RATE_LAYERS:]
    batches = [np.concatenate([tensor.segments for tensor in layer.tensors]) for layer in layers]
    with contextlib.closing(RatesOfFiles(mixture.files, options)) as disk:
        return disk.rate("layers alone", batches, 1).bytes_per_second


def _context(mixture: InPlaceModel, options: LoadOptions) -> int:
    """The context of all ranks, in tokens. Raises UsageError."""
    positions = number_of(mixture.config, "max_position_embeddings")
    asked = options.context
    if isinstance(asked, str):
        if positions is None:
            raise UsageError(
                f"this model's configuration names no positions for a context of {asked!r}. Give a number."
            )
        asked = positions
    asked = CONTEXT if asked is None else asked
    return min(asked, positions or asked)


def _refuse(options: LoadOptions) -> None:
    """Raises UsageError for what needs all layers in one process."""
    given = {
        "several answers at once (--parallel)": options.parallel > 1,
        "a quantised KV cache (--kv-bits)": options.kv_bits is not None,
        "images": options.images,
        "an adapter": options.adapter is not None,
        "drafts of the model's own head (--draft mtp)": options.draft == "mtp",
    }
    if named := [name for name, wanted in given.items() if wanted]:
        raise UsageError(
            "a dense model's layers are shared out over ranks, and that does not work with "
            f"{' or '.join(named)}. Leave it out, or run the model on one machine."
        )


def _described(
    names: Sequence[str],
    ranges: Sequence[range],
    sizes: Sequence[int],
    kept: int,
    found: Sequence[Capacity],
    buffers: int,
) -> Iterator[str]:
    """The lines of the plan about the ranks. sizes: of the layers' weights. kept: of a layer's KV cache."""
    for number, (name, own, rank) in enumerate(zip(names, ranges, found, strict=True)):
        weights = sum(sizes[each] for each in own)
        room = rank.slots - len(own) * kept
        read = 0 if weights <= room else min(weights, weights - room + buffers)
        what = f"layers {own[0] + 1} to {own[-1] + 1} of {len(sizes)}, {weights / 1e9:.3f} GB"
        reads = f"; a token reads {read / 1e9:.3f} GB at {rank.rate / 1e9:.2g} GB/s" if read else ", all in memory"
        yield f"  rank {number:<12}{rank.budget / 1e9:8.3f} GB  {name}: {what}{reads}"
    yield f"  {NO_CACHES}"
