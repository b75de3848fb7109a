"""The evaluations of a layer that the host waits for, because on Metal each of them lets the device run dry."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import ceil
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixtures import assert_same, make_mixture, open_streamed  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_flash.bench.tools.evaluations import EvaluationCounts, counted, has_work
from mlx_flash.loading.in_place_plan import KEPT, with_whole_layers

TOKENS = (4, 9, 4, 9, 77, 6, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = make_mixture(tmp_path_factory.mktemp("evaluations") / "mixture", "qwen3_moe", "4 bits")
    return made


@pytest.fixture
def stream(folder: Path) -> Iterator[Callable[..., Any]]:
    streamers = []

    def open_one(slots: int, overlap: bool) -> Any:
        model, streamer = open_streamed(folder, slots)
        streamer.overlap, streamer.look_ahead = overlap, False
        streamers.append(streamer)
        return model

    yield open_one
    for streamer in streamers:
        streamer.close()


def streamed(model: Any) -> list[Any]:
    return [layer.mlp.switch_mlp for layer in model.layers if hasattr(layer.mlp, "switch_mlp")]


def logits(model: Any, tokens: tuple[int, ...] = TOKENS) -> list[np.ndarray]:
    cache = make_prompt_cache(model)
    return [np.array(model(mx.array([[token]]), cache=cache)) for token in tokens]


def of_a_token(model: Any, layers: list[Any], token: int, evict: int = 0) -> EvaluationCounts:
    """Counts of a token that was decoded before. evict: number of units of each layer that lost their slots."""
    mx.eval(model(mx.array([[token]]), cache=make_prompt_cache(model)))
    for layer in layers:
        book = layer.units.cache
        last = np.argsort(book.score)[::-1][:evict]
        book.unit_of[book.slot_of[last]] = -1
        book.slot_of[last] = -1
        book.resident -= evict
    with counted(layers[0].units.shared.reader) as counts:
        mx.eval(model(mx.array([[token]]), cache=make_prompt_cache(model)))
    return counts


@pytest.mark.parametrize("overlap", [True, False])
def test_a_layer_of_experts_waits_for_the_device_once(stream: Callable[..., Any], overlap: bool) -> None:
    """The whole model waits once more, for its logits. A miss costs two calls of the reader, and with overlap an
    evaluation that is begun and not waited for."""
    model = stream(11, overlap)
    layers = streamed(model)
    count = len(layers)
    assert of_a_token(model, layers, 4) == EvaluationCounts(waits=count + 1, begun=0, c_calls=0)
    expected = EvaluationCounts(waits=count + 1, begun=count * overlap, c_calls=2 * count)
    assert of_a_token(model, layers, 4, evict=1) == expected


def test_a_layer_with_every_expert_does_not_wait(stream: Callable[..., Any]) -> None:
    model = stream(12, True)
    layers = streamed(model)
    for layer in layers:
        list(layer.units.use(np.arange(12)))
    assert of_a_token(model, layers, 4) == EvaluationCounts(waits=1)


@pytest.mark.parametrize("slots", [1, 5, 11])
def test_both_forms_have_the_bits_of_the_zoo(folder: Path, stream: Callable[..., Any], slots: int) -> None:
    expected = logits(load_model(folder)[0])
    one_pass, overlapped = stream(slots, False), stream(slots, True)
    assert_same(logits(one_pass), expected, "one pass")
    assert_same(logits(overlapped), expected, "overlapped")
    shared = streamed(overlapped)[0].units.shared
    shared.overlap = False  # a trial may change it between two tokens
    assert_same(logits(overlapped), expected, "changed")


@pytest.mark.parametrize("overlap", [True, False])
def test_a_layer_of_neurons_waits_for_the_device_once(
    tiny_of: Callable[..., Any], open_model: Callable[..., Any], overlap: bool
) -> None:
    """Neurons are summed in an order that the slots do not change, so both forms are one."""
    model = open_model(tiny_of("float32").store, None, "exact")
    model.flash.fix_look_ahead(False)
    model.flash.streamer.overlap = overlap
    layers = list(model.flash.layers)
    assert of_a_token(model, layers, 4) == EvaluationCounts(waits=len(layers) + 1)
    expected = EvaluationCounts(waits=len(layers) + 1, c_calls=2 * len(layers))
    assert of_a_token(model, layers, 4, evict=1) == expected


def test_work_is_recognised() -> None:
    done = mx.ones((3,))
    mx.eval(done)
    assert not has_work(done) and not has_work([done])
    lazy = done + 1
    assert has_work([done, (lazy,)])
    mx.eval(lazy)
    assert not has_work(lazy)


@given(layers=st.integers(1, 12), experts=st.integers(1, 32), data=st.data())
def test_slots_beyond_two_thirds_go_to_whole_layers(layers: int, experts: int, data: st.DataObject) -> None:
    total = data.draw(st.integers(layers, layers * experts))
    even = tuple(total // layers + (layer < total % layers) for layer in range(layers))
    slots = with_whole_layers(even, experts)
    assert sum(slots) == total and len(slots) == layers and max(slots) <= experts
    least = ceil(KEPT * experts)
    whole = sum(count == experts for count in slots)
    assert sorted(slots[:whole]) == [experts] * whole, "whole layers come first"
    if total <= least * layers:
        assert slots == even
    else:
        assert all(least <= count for count in slots)
        one_more = (whole + 1) * experts + (layers - whole - 1) * least
        assert whole == layers or one_more > total, "one more would leave the others too few"
