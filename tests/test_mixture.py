"""Mixtures of experts against mlx-lm with everything resident: the same bits, at every number of slots."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mixtures import FAMILIES, QUANTISATIONS, VOCABULARY, make_mixture  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_flash.flash.experts import ExpertStreamer
from mlx_flash.flash.reader import Reader
from mlx_flash.mixture import Mixture, open_files, open_mixture

PROMPT = [5, 17, 80, 3, 44, 61, 9, 9, 30, 72, 1, 55, 8, 90, 31, 2, 77, 64, 12, 40, 33, 21, 7, 68, 50]


@pytest.fixture(scope="module")
def mixture_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @functools.cache
    def make(family: str, quantisation: str = "plain", shards: int = 1) -> Path:
        return make_mixture(tmp_path_factory.mktemp(family), family, quantisation, shards)

    return make


@pytest.fixture
def stream() -> Iterator[Callable[..., tuple[Any, ExpertStreamer]]]:
    """(model, streamer) of a checkpoint with so many slots for each layer."""
    streamers: list[ExpertStreamer] = []

    def open_streamed(folder: Path, slots: int, **options: Any) -> tuple[Any, ExpertStreamer]:
        mixture: Mixture = open_mixture(folder)
        streamer = ExpertStreamer(open_files(mixture.files, direct=True), Reader(4))
        streamers.append(streamer)
        mixture.stream(streamer, [slots] * len(mixture.switches), options.get("window"))
        return mixture.model, streamer

    yield open_streamed
    for streamer in streamers:
        streamer.close()


def everything(model: Any) -> list[np.ndarray]:
    """Logits of calls of every form: a prompt, tokens, a few at once, and a batch without a cache."""
    cache = make_prompt_cache(model)
    calls = [PROMPT, [4], [9], [77, 31], [6], [12, 4, 50], [9]]
    results = [np.array(model(mx.array([call]), cache=cache).astype(mx.float32)) for call in calls]
    batch = mx.array([PROMPT[:9], PROMPT[9:18]])
    return [*results, np.array(model(batch).astype(mx.float32))]


@functools.cache
def reference(folder: Path) -> list[np.ndarray]:
    return everything(load_model(folder)[0])


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], what: object) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert np.isfinite(b).all() and b.std() > 1e-3
        assert np.array_equal(a, b), (what, i, np.abs(a - b).max())


@pytest.mark.parametrize("quantisation", ["plain", "4 bits"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_bits_of_mlx_lm(
    mixture_of: Callable[..., Path], stream: Callable[..., Any], family: str, quantisation: str
) -> None:
    folder = mixture_of(family, quantisation)
    expected = reference(folder)
    for slots in (1, 2, 5, 12):
        model, streamer = stream(folder, slots)
        assert_same(everything(model), expected, slots)
        read = streamer.counters.bytes
        assert read > 0 and streamer.counters.misses > 0
        assert_same(everything(model), expected, (slots, "again"))
        if slots == 12:
            assert streamer.counters.bytes == read, "everything is resident by now"


@pytest.mark.parametrize("quantisation", [q for q in QUANTISATIONS if q not in ("plain", "4 bits")])
def test_every_quantisation(
    mixture_of: Callable[..., Path], stream: Callable[..., Any], quantisation: str
) -> None:
    folder = mixture_of("qwen3_moe", quantisation)
    for slots in (3, 7, 12):
        model, _ = stream(folder, slots)
        assert_same(everything(model), reference(folder), slots)


def test_shards(mixture_of: Callable[..., Path], stream: Callable[..., Any]) -> None:
    folder = mixture_of("qwen3_moe", "4 bits", 3)
    assert_same(reference(folder), reference(mixture_of("qwen3_moe", "4 bits")), "the same weights")
    model, _ = stream(folder, 5)
    assert_same(everything(model), reference(folder), "sharded")


@pytest.mark.parametrize("vocabulary", [VOCABULARY])
def test_nothing_of_an_expert_is_a_parameter(
    mixture_of: Callable[..., Path], stream: Callable[..., Any], vocabulary: int
) -> None:
    from mlx.utils import tree_flatten

    folder = mixture_of("deepseek_v3")
    model, _ = stream(folder, 2)
    plain: Any = dict(tree_flatten(load_model(folder, lazy=True)[0].parameters()))
    rest = dict(tree_flatten(model.parameters()))
    assert {name for name in plain if "switch_mlp" not in name} == set(rest)
    assert any("shared_experts" in name for name in rest)
    assert plain["lm_head.weight"].shape[0] == vocabulary
