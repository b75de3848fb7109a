"""Every mixture type of mlx-lm: its resident model's bits from streamed experts, with and without guesses.

The experts are in this process, or shared out over two, three and four ranks, which are threads. The layouts that
their makers publish are tested in test_published_layouts.py.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mixture_types import PAGE, RUN_HERE, listed, table_of, verdicts  # type: ignore[import-not-found]
from mixtures import FAMILIES, make_mixture, open_streamed  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model
from ranked_mixture import ranked  # type: ignore[import-not-found]
from test_mixture import PROMPT, assert_same  # type: ignore[import-not-found]
from zoo_types import METAL_ONLY, TYPES  # type: ignore[import-not-found]

from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.layers.experts import StreamedExperts
from mlx_flash.layers.routers import Router
from mlx_flash.loading.in_place_model import open_in_place

pytestmark = pytest.mark.usefixtures("one_processor")

EVERY = sorted((TYPES.keys() | FAMILIES.keys()) - METAL_ONLY)
# Their routers take another state than their experts, of another width.
UNGUESSED = {"kimi_k3"}
# Families of mixtures.py with a single layer of experts there, and with two.
TWO_LAYERS: dict[str, dict[str, Any]] = {
    "glm4_moe": {"num_hidden_layers": 3},
    "nemotron_h": {"hybrid_override_pattern": "ME*E", "num_experts_per_tok": 2},
}


@pytest.fixture
def stream() -> Iterator[Callable[..., tuple[Any, InPlaceFiles]]]:
    streamers: list[InPlaceFiles] = []

    def open_one(folder: Path, slots: int) -> tuple[Any, InPlaceFiles]:
        model, streamer = open_streamed(folder, slots)
        streamers.append(streamer)
        return model, streamer

    yield open_one
    for streamer in streamers:
        streamer.close()


def prompt_and_tokens(model: Any) -> list[np.ndarray]:
    """Logits of a prompt, of single tokens, and of a few at once."""
    cache = make_prompt_cache(model)
    calls = [PROMPT, [4], [9], [77, 31], [6]]
    return [np.array(model(mx.array([call]), cache=cache).astype(mx.float32)) for call in calls]


@pytest.fixture(scope="module")
def mixture_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, list[np.ndarray]]]:
    """(folder, what mlx-lm computes) of a type in MLX's layout and 4 bits."""

    @functools.cache
    def make(family: str) -> tuple[Path, list[np.ndarray]]:
        folder = make_mixture(tmp_path_factory.mktemp(family), family, "4 bits")
        return folder, prompt_and_tokens(load_model(folder)[0])

    return make


@pytest.mark.parametrize("family", sorted(TYPES.keys() - METAL_ONLY))
def test_every_type_has_the_bits_of_mlx_lm(
    mixture_of: Callable[..., Any], stream: Callable[..., Any], family: str
) -> None:
    """With one slot and with all experts in memory."""
    folder, expected = mixture_of(family)
    for slots in (1, 8):
        model, streamer = stream(folder, slots)
        assert_same(prompt_and_tokens(model), expected, slots)
        assert streamer.counters.bytes > 0


@pytest.mark.parametrize("family", EVERY)
def test_every_type_has_the_same_bits_over_ranks(mixture_of: Callable[..., Any], family: str) -> None:
    """On two, three and four ranks, with one slot, with a few, and with all experts in memory."""
    folder, expected = mixture_of(family)
    mixture = open_in_place(folder)
    for weights, slots in (([1, 1], 1), ([1, 2, 1], 2), ([2, 1, 1, 1], 8)):
        with ranked(mixture, weights, slots) as found:
            assert_same(prompt_and_tokens(found.model), expected, (weights, slots))
            assert found.group.calls_made and found.everything_read
            others_read = sum(found.files[rank].counters.bytes for rank in range(1, len(weights)))
            assert found.files[0].counters.ranks_bytes == others_read


@pytest.mark.parametrize("family", EVERY)
def test_guesses(tmp_path: Path, stream: Callable[..., Any], family: str) -> None:
    """Every layer but the last guesses by the next one's router, and the bits are those without guesses."""
    folder = make_mixture(tmp_path / family, family, **TWO_LAYERS.get(family, {}))
    model, streamer = stream(folder, 2)
    layers = [module for _, module in model.named_modules() if isinstance(module, StreamedExperts)]
    ahead = [layer.ahead for layer in layers if layer.ahead is not None]
    assert len(ahead) == len(layers) - 1 > 0
    guessed = prompt_and_tokens(model)
    made = streamer.counters.prefetched_used + streamer.counters.prefetched_unused
    assert (made > 0) == (family not in UNGUESSED)
    plain, without = stream(folder, 2)
    for module in plain.modules():
        if isinstance(module, StreamedExperts):
            module.ahead = None
    assert_same(prompt_and_tokens(plain), guessed, family)
    assert without.counters.prefetched_used == without.counters.prefetched_unused == 0


# -- what counts as a router ----------------------------------------------------------------------------------------


class Gives(nn.Module):
    """A module whose call returns what it is told."""

    def __init__(self, *results: Any) -> None:
        super().__init__()
        self.results = results

    def __call__(self, x: mx.array) -> Any:
        return self.results if len(self.results) > 1 else self.results[0]


class Matrix(nn.Module):
    """A module that cannot be called."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.weight = mx.arange(rows * 8).reshape(rows, 8).astype(mx.float32)


X = mx.ones((1, 1, 8))
IDS, WEIGHTS = mx.array([[[4, 1]]]), mx.array([[[0.25, 0.75]]])


@pytest.mark.parametrize(
    ("modules", "likeliest"),
    [
        ([Gives(mx.arange(5.0).reshape(1, 1, 5))], [4, 3]),
        ([nn.RMSNorm(8), nn.Linear(8, 1), Gives(IDS, WEIGHTS)], [1, 4]),
        ([Gives(WEIGHTS, IDS)], [1, 4]),
        ([Gives(IDS, WEIGHTS, mx.zeros((1, 1, 5)))], [1, 4]),
        ([Gives(mx.array([[[7, 2]]]), mx.array([[[0.9, 0.1]]]))], [2]),  # 7 stands for no expert
        ([Gives(IDS)], [1, 4]),
        ([Matrix(3), Matrix(5)], [4, 3]),
        ([Gives(mx.zeros((1, 1, 6))), Gives(mx.zeros((5,)))], None),
        ([Gives((0, 1))], None),
        ([Matrix(3)], None),
        ([], None),
    ],
)
def test_a_router_is_found_by_what_it_does(modules: list[nn.Module], likeliest: list[int] | None) -> None:
    scores = Router(modules, 5)(X)
    if likeliest is None:
        assert scores is None
        return
    assert scores is not None and scores.shape == (1, 1, 5) and scores.dtype == mx.float32
    order = np.argsort(-np.array(scores)[0, 0], kind="stable").tolist()
    assert order[: len(likeliest)] == likeliest


def test_a_router_for_another_width_is_not_used() -> None:
    router = Router([nn.Linear(8, 5)], 5)
    assert router(mx.ones((2, 4))) is None
    assert router(mx.ones((2, 8))).shape == (2, 5)  # type: ignore[union-attr]


# -- the page -------------------------------------------------------------------------------------------------------


def test_every_type_has_a_verdict() -> None:
    """A new version of a zoo shows what is new: `python tests/mixture_types.py` says what is missing."""
    found = verdicts()
    assert len(listed()) > 50 and listed() <= found.keys(), listed() - found.keys()
    run = {name for (zoo, name), verdict in found.items() if zoo == "mlx-lm" and verdict.text == RUN_HERE}
    assert run == (TYPES.keys() | FAMILIES.keys()) - METAL_ONLY


def test_the_page_has_the_table() -> None:
    assert table_of(verdicts()) in PAGE.read_text(encoding="utf-8")
