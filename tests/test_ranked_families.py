"""Dense families on two, three and four ranks, against mlx-lm's resident model, bit for bit.

One family of every form runs on all numbers of ranks, and each of the others on one, or with `-m slow` on all.

The ranks are threads. Nothing is planned here, since planning takes longer than computing: test_ranked_layers.py loads
models with a plan.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
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

# mlx-lm's other types whose layers can be shared out, beside one of every form in DENSE.
OTHERS: dict[str, dict[str, Any]] = {
    "apertus": {"mlp_bias": False, "post_norm": False, "qk_norm": True},
    "cohere": {},
    "ernie4_5": {"use_bias": False},
    "exaone": {"num_layers": 5, "layer_norm_epsilon": 1e-5},
    "exaone4": {"rope_scaling": None, "sliding_window": 8, "sliding_window_pattern": "LG"},
    "gemma": {},
    "glm": {},
    "gpt2": {"n_ctx": 512, "n_embd": 64, "n_head": 4, "n_layer": 5, "n_positions": 512, "layer_norm_epsilon": 1e-5},
    "gpt_bigcode": {
        "n_embd": 64, "n_layer": 5, "n_inner": 128, "n_head": 4, "n_positions": 512, "layer_norm_epsilon": 1e-5,
    },
    "gpt_neox": {"layer_norm_eps": 1e-5, "rotary_emb_base": 10000, "rotary_pct": 0.5},
    "granite": {
        "logits_scaling": 2.0, "attention_multiplier": 0.2, "embedding_multiplier": 3.0, "residual_multiplier": 0.5,
        "mlp_bias": False,
    },
    "helium": {"mlp_bias": False},
    "hunyuan_v1_dense": {},
    "internlm2": {},
    "internlm3": {},
    "llama4_text": {"intermediate_size_mlp": 128, "no_rope_layers": [1, 1, 1, 0, 1], "use_qk_norm": True},
    "mimo": {},
    "minicpm": {"dim_model_base": 64, "scale_depth": 1.4, "scale_emb": 1},
    "muse_glimmer": {},
    "nanbeige": {},
    "nanochat": {},
    "olmo3": {"sliding_window": 8},
    "phi": {},
    "plamo3": {},
    "qwen2_vl": {},
    "qwen3_vl": {},
    "seed_oss": {},
    "smollm3": {},
    "stablelm": {"use_qkv_bias": False, "partial_rotary_factor": 0.5, "layer_norm_eps": 1e-5},
    "telechat3": {},
    "youtu_llm": {},
}  # fmt: skip


@pytest.fixture(autouse=True)
def shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models' tensors are short."""
    monkeypatch.setattr(layer_weights, "SHORTEST_TENSOR", 2048)


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
def test_every_form_has_the_bits_of_one_rank(tmp_path: Path, family: str) -> None:
    """On two, three and four ranks. Layers are in memory, and read for every token on three ranks."""
    compare(tmp_path / family, family, SETTINGS[family], (2, 3, 4))


@pytest.mark.parametrize("family", OTHERS)
def test_other_families(tmp_path: Path, family: str) -> None:
    """Each on one number of ranks: two, three and four in turn. `-m slow` has all."""
    compare(tmp_path / family, family, OTHERS[family], (2 + sorted(OTHERS).index(family) % 3,))


@pytest.mark.slow
@pytest.mark.parametrize("family", OTHERS)
def test_other_families_on_all_numbers_of_ranks(tmp_path: Path, family: str) -> None:
    compare(tmp_path / family, family, OTHERS[family], (2, 3, 4))


def compare(folder: Path, family: str, settings: dict[str, Any], sizes: Sequence[int]) -> None:
    make_mixture(folder, family, "4 bits", **{**WIDE, **settings})
    expected = everything(load_model(folder)[0])
    for size in sizes:
        with shared_out(folder, size, streamed=size == 3) as (model, files):
            assert_same(everything(model), expected, size)
            assert len(files) == size and all((each.counters.bytes > 0) == (size == 3) for each in files)
