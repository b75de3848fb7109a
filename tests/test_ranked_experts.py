"""Experts over several ranks: the bits of one rank, whoever holds which expert in how many slots."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mixtures import FAMILIES, make_mixture  # type: ignore[import-not-found]
from mlx_lm.utils import load_model
from rank_threads import ThreadGroup, ranks  # type: ignore[import-not-found]
from test_mixture import assert_same, everything  # type: ignore[import-not-found]
from test_mixture_types import prompt_and_tokens  # type: ignore[import-not-found]
from zoo_types import METAL_ONLY, TYPES  # type: ignore[import-not-found]

from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.flash.reader import Reader
from mlx_flash.layers.expert_shares import ExpertShares, dealt
from mlx_flash.layers.experts import StreamedExperts
from mlx_flash.layers.ranked_experts import EXPERTS, ExpertCalls, HeldExperts, RankedExperts
from mlx_flash.loading.expert_ranks import experts_of_layers, held_of
from mlx_flash.loading.in_place_model import open_in_place, parent_of
from mlx_flash.loading.rank_shares import Capacity, slots_of_layers, units_of_layers, units_of_ranks
from mlx_flash.loading.resident_weights import open_files
from mlx_flash.ranks.group import Handlers

pytestmark = pytest.mark.usefixtures("one_processor")


@contextmanager
def ranked(folder: Path, weights: list[float], slots: int) -> Iterator[tuple[Any, ThreadGroup, list[InPlaceFiles]]]:
    """A model, rank 0's group, and every rank's files. weights: the ranks' shares. slots: of each layer and rank."""
    opened: list[InPlaceFiles] = []
    counts: list[list[int]] = []

    def layers_of(rank: int) -> tuple[Any, list[Any], list[ExpertShares]]:
        mixture = open_in_place(folder)
        layers = experts_of_layers(mixture)
        counts[:] = units_of_layers(layers, [sum(layers) * weight / sum(weights) for weight in weights])
        shares = [ExpertShares(each) for each in counts]
        files = InPlaceFiles(open_files(mixture.files, direct=True), Reader(2))
        opened.append(files)
        held = [min(slots, each[rank]) for each in counts]
        return mixture.model, list(held_of(mixture, files, shares, rank, held, None)), shares

    def prepare(group: ThreadGroup, handlers: Handlers) -> None:
        _, found, shares = layers_of(group.rank)
        layers = [StreamedExperts(module, units) for _, module, units in found]
        held = [HeldExperts(layer, share, group.rank) for layer, share in zip(layers, shares, strict=True)]
        handlers.calls[EXPERTS] = ExpertCalls(group, held)

    try:
        with ranks(len(weights), prepare) as group:
            model, found, shares = layers_of(0)
            for number, (path, module, units) in enumerate(found):
                parent, name = parent_of(model, path)
                parent[name] = RankedExperts(module, units, number, shares[number], group)
            yield model, group, opened
    finally:
        for files in opened:
            files.close()


@pytest.mark.parametrize("family", sorted((TYPES.keys() | FAMILIES.keys()) - METAL_ONLY))
def test_every_type_has_the_bits_of_one_rank(tmp_path: Path, family: str) -> None:
    folder = make_mixture(tmp_path / family, family, "4 bits")
    expected = prompt_and_tokens(load_model(folder)[0])
    for weights, slots in (([1, 1], 1), ([1, 2, 1], 2), ([2, 1, 1, 1], 8)):
        with ranked(folder, weights, slots) as (model, group, _):
            assert_same(prompt_and_tokens(model), expected, (weights, slots))
            assert group.made > 0
