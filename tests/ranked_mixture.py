"""A mixture whose experts are held by ranks that are threads of this process."""

from __future__ import annotations

import copy
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.nn as nn
from ranks_double import ThreadRank, ranks_as_threads  # type: ignore[import-not-found]

from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.flash.reader import Reader
from mlx_flash.layers.expert_shares import ExpertShares
from mlx_flash.layers.experts import StreamedExperts
from mlx_flash.layers.ranked_experts import EXPERTS, ExpertCalls, HeldExperts, RankedExperts
from mlx_flash.loading.expert_ranks import experts_of_layers, held_of
from mlx_flash.loading.in_place_model import InPlaceModel, module_at, open_in_place, parent_of
from mlx_flash.loading.rank_shares import units_of_layers
from mlx_flash.loading.resident_weights import open_files
from mlx_flash.ranks.group import Handlers


class Ranked:
    """A model whose experts are held by several ranks. group: rank 0's. files: of every rank."""

    def __init__(self) -> None:
        self.model: Any = None
        self.group: Any = None
        self.files: dict[int, InPlaceFiles] = {}

    @property
    def everything_read(self) -> bool:
        return all(files.counters.bytes > 0 for files in self.files.values())


@contextmanager
def ranked(source: Path | InPlaceModel, weights: Sequence[float], slots: int) -> Iterator[Ranked]:
    """source: a folder, or the model in it, which is as before afterwards. All ranks take their layers from one model,
    since opening it takes longer than computing. weights: the ranks' shares. slots: most of each layer and rank."""
    mixture = open_in_place(source) if isinstance(source, Path) else source
    found, preparing, layers = Ranked(), threading.Lock(), experts_of_layers(mixture)
    modules = {path: module_at(mixture.model, path) for path in mixture.switches}
    counts = units_of_layers(layers, [sum(layers) * weight / sum(weights) for weight in weights])
    shares = [ExpertShares(each) for each in counts]

    def layers_of(rank: int) -> list[Any]:
        with preparing:
            files = found.files[rank] = InPlaceFiles(open_files(mixture.files, direct=True), Reader(2))
            held = [min(slots, each[rank]) for each in counts]
            own = held_of(mixture, files, shares, rank, held, None)
            return [(path, with_own_projections(modules[path]), units) for path, _, units in own]

    def register(group: ThreadRank, handlers: Handlers) -> None:
        streamed = [StreamedExperts(module, units) for _, module, units in layers_of(group.rank)]
        held = [HeldExperts(layer, share) for layer, share in zip(streamed, shares, strict=True)]
        handlers.calls[EXPERTS] = ExpertCalls(group.rank, held)
        handlers.bytes_read = lambda: found.files[group.rank].counters.bytes

    try:
        with ranks_as_threads(len(weights), register) as group:
            for number, (path, module, units) in enumerate(layers_of(0)):
                parent, name = parent_of(mixture.model, path)
                parent[name] = RankedExperts(module, units, number, number + 1 == len(layers), shares[number], group)
            found.model, found.group = mixture.model, group
            yield found
    finally:
        for path, module in modules.items():
            parent, name = parent_of(mixture.model, path)
            parent[name] = module
        for files in found.files.values():
            files.close()


def with_own_projections(module: nn.Module) -> nn.Module:
    """A copy of a layer of experts whose weights can be replaced. The weights themselves are not copied."""
    copied = copy.copy(module)
    for name, child in module.children().items():
        copied[name] = copy.copy(child)
    return copied
