"""Every dense family at two, three and four ranks, against mlx-lm's resident model, bit for bit.

The ranks are threads. Nothing is planned here, since planning takes longer than computing: test_ranked_layers.py loads
some of the families with a plan, and with `-m slow` all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mixtures import assert_same, make_mixture  # type: ignore[import-not-found]
from mlx_lm.utils import load_model
from ranks_double import ThreadRank, ranks_as_threads  # type: ignore[import-not-found]
from test_ranked_layers import DENSE, WIDE, everything  # type: ignore[import-not-found]
from test_streamed_layers import DENSE as SETTINGS  # type: ignore[import-not-found]

from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.flash.layer_ring import LayerRing
from mlx_flash.flash.reader import Reader
from mlx_flash.layers.pipeline_text import DIGEST_BYTES
from mlx_flash.layers.ranked_layers import FOLLOW, LAYERS, FirstRank, OtherRank, connect, lead
from mlx_flash.loading import layer_weights
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.layer_ranges import RankRoom, divide_layers, find_joints, keep_range
from mlx_flash.loading.layer_weights import stream_layers
from mlx_flash.loading.quantised_cache import plain_cache
from mlx_flash.loading.resident_weights import open_files, read_resident
from mlx_flash.ranks.group import Call, Handlers
from mlx_flash.text.cached_context import make_room

pytestmark = pytest.mark.usefixtures("one_processor")


@contextmanager
def shared_out(folder: Path, size: int, streamed: bool) -> Iterator[tuple[Any, list[InPlaceFiles]]]:
    """(rank 0's model, every rank's files). streamed: whether each rank reads its layers for every token."""
    opening, files = threading.Lock(), []
    shares = divide_layers([1] * WIDE["num_hidden_layers"], 0, [RankRoom(9, 1.0)] * size)

    def opened(rank: int) -> tuple[Any, list[Any], InPlaceFiles]:
        """The model with the rank's own layers, all layers, and the rank's files."""
        with opening:  # It replaces functions of MLX for the whole process.
            mixture = open_in_place(folder)
            modules = [layer.module for layer in mixture.layers]
            keep_range(mixture, shares[rank], ends=rank == 0)
            own = InPlaceFiles(open_files(mixture.files, direct=True), Reader(2))
            files.append(own)
            numbers, layers = mixture.layers_to_stream(0) if streamed else ([], [])
            read_resident(mixture)
            if layers:
                stream_layers(layers, LayerRing(own, [each.tensors for each in layers], numbers, len(mixture.layers)))
        return mixture.model, modules, own

    def register(group: ThreadRank, handlers: Handlers) -> None:
        model, modules, own = opened(group.rank)
        rank = OtherRank(model, lambda: plain_cache(model), lambda: None, make_room)
        connect(modules, rank)

        def compute(call: Call) -> mx.array:
            before, ids = call.ids[: DIGEST_BYTES // 4], call.ids[DIGEST_BYTES // 4 :]
            return rank.compute(call.arrays[0], ids, call.numbers["tokens"], before.tobytes())

        handlers.calls[LAYERS], handlers.questions[FOLLOW] = compute, rank.can_follow
        handlers.bytes_read = lambda: own.counters.bytes

    caches = find_joints(open_in_place(folder)).caches
    try:
        with ranks_as_threads(size, register) as group:
            model, modules, own = opened(0)
            first = FirstRank(group, caches[shares[0][-1] + 1], own.counters)
            connect(modules, first)
            lead(model, first)
            yield model, files
    finally:
        for each in files:
            each.close()


@pytest.mark.parametrize("family", DENSE)
def test_every_family_has_the_bits_of_one_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """On two, three and four ranks. Layers are in memory, and read for every token on three ranks."""
    monkeypatch.setattr(layer_weights, "SHORTEST_TENSOR", 2048)  # These models' tensors are short.
    folder = make_mixture(tmp_path / family, family, "4 bits", **{**WIDE, **SETTINGS[family]})
    expected = everything(load_model(folder)[0])
    for size in (2, 3, 4):
        with shared_out(folder, size, streamed=size == 3) as (model, files):
            assert_same(everything(model), expected, size)
            assert len(files) == size and all((each.counters.bytes > 0) == (size == 3) for each in files)
