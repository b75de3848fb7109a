"""Traces of a tiny model, and the simulations on them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Tiny  # type: ignore[import-not-found]
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mlx_flash.bench import eviction, guesses, neurons_ahead, ordering, traces, window_sizes
from mlx_flash.bench.tools import policies
from mlx_flash.bench.tools.texts import read_text
from mlx_flash.errors import UsageError
from mlx_flash.flash.slot_cache import SlotCache

pytestmark = pytest.mark.usefixtures("one_processor")

IDS = [int(i) for i in np.random.default_rng(0).integers(1, 90, 40)]
MASKS = arrays(bool, array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=14))


@pytest.fixture
def model(tiny: Tiny, open_model: Callable[..., Any]) -> Any:
    return open_model(tiny.store, slots=20, context=32)  # 40 tokens: two windows


def sets_of(mask: np.ndarray) -> list[np.ndarray]:
    return [np.flatnonzero(row) for row in mask]


# -- traces --------------------------------------------------------------------------------------------------


def test_a_trace_is_what_the_dense_model_and_the_predictor_do(tiny: Tiny, model: Any) -> None:
    history = traces.record(model, IDS, [0], "test")
    assert [trace.layer for trace in history] == [0, 1]
    plain = tiny.dense
    inputs: list[mx.array] = []
    first = plain.layers[0]
    for window in (IDS[:31], IDS[31:]):
        h = plain.embed(mx.array([[0, *window]]))
        h = h + first.self_attn(first.self_attn_layer_norm(h), "causal", None)
        inputs.append(first.final_layer_norm(h)[0])
    x = mx.concatenate(inputs)
    before = np.array(x @ first.mlp.fc1.weight.T + first.mlp.fc1.bias)
    trace = history[0]
    assert trace.active.shape == trace.chosen.shape == (40 + 2, 512)  # both windows begin with the prefix
    sure = np.abs(before) > 1e-3
    assert np.array_equal(trace.active[sure], (before > 0)[sure])
    chosen = np.array(model.layers[0].mlp.predictor(x)[0])  # the original predictor is back in its place
    assert (trace.chosen != chosen).mean() < 1e-3
    assert 0.5 < (trace.chosen & trace.active).sum() / trace.active.sum() <= 1


def test_nothing_to_trace_without_predictors(tiny: Tiny, open_model: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="nothing to trace"):
        traces.record(open_model(tiny.store, predictor="none"), IDS, [], "test")


def test_blocks_of_a_choice() -> None:
    mask = np.array([[0, 0, 0, 0, 1, 0, 1]], bool)
    assert traces.by_block(mask, 3).tolist() == [[False, True, True]]
    assert traces.by_block(mask, 1) is mask


@pytest.mark.parametrize("content", [None, "", "word", b"\xff\xfe"])
def test_a_text_must_be_one(tmp_path: Path, content: str | bytes | None) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(UsageError, match="--text"):
        read_text(path)


def test_a_text_must_have_tokens_enough(tiny: Tiny, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("so it")
    parser = argparse.ArgumentParser()
    traces.add_arguments(parser)
    arguments = parser.parse_args(["--model", str(tiny.store), "--text", str(text)])
    with pytest.raises(UsageError, match="tokens, expected 16 or more"), traces.opened(arguments):
        pass


# -- eviction ------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(MASKS, st.integers(1, 16), st.sampled_from([None, 1, 3, policies.ENDLESS]))
def test_simulated_misses_are_the_engines(mask: np.ndarray, slots: int, window: int | None) -> None:
    cache = SlotCache(mask.shape[1], slots, window)
    misses = []
    for units in sets_of(mask):
        cache.mark_used(units)
        read: list[tuple[np.ndarray, np.ndarray]] = []
        for begin in range(0, len(units), cache.slots):
            read.append(cache.reserve(units[begin : begin + cache.slots]))
            cache.commit(*read[-1])
        misses.append(sum(len(missing) for missing, _ in read))
    assert policies.run(SlotCache(mask.shape[1], slots, window), sets_of(mask)).tolist() == misses


@settings(max_examples=30, deadline=None)
@given(MASKS, st.integers(1, 16))
def test_least_recent_use_is_what_it_says(mask: np.ndarray, slots: int) -> None:
    mask = mask.copy()
    for row in mask:  # with one unit per token there is no choice
        row[np.flatnonzero(row)[1:]] = False
    held: list[int] = []
    misses = []
    for units in sets_of(mask):
        for unit in units.tolist():
            misses.append(int(unit not in held))
            held = [*(other for other in held if other != unit), unit][-slots:]
    cache = policies.least_recent(mask.shape[1], slots)
    assert [n for n, units in zip(policies.run(cache, sets_of(mask)), sets_of(mask), strict=True) if len(units)] == (
        misses
    )


@settings(max_examples=50, deadline=None)
@given(MASKS, st.integers(1, 16), st.data())
def test_no_rule_beats_the_clairvoyant(mask: np.ndarray, slots: int, data: st.DataObject) -> None:
    units = mask.shape[1]
    hot = np.array(data.draw(st.lists(st.integers(0, units - 1), unique=True)), int)
    best = policies.clairvoyant(mask, min(slots, units)).sum()
    for cache in (
        SlotCache(units, slots),
        SlotCache(units, slots, 2),
        policies.least_recent(units, slots),
        policies.fading(units, slots, 2.0),
        policies.Pinned(units, slots, hot),
    ):
        assert policies.run(cache, sets_of(mask)).sum() >= best


def test_the_clairvoyant_keeps_what_comes_back_first() -> None:
    mask = np.eye(3, dtype=bool)[[0, 1, 2, 0, 1, 2]]
    assert policies.clairvoyant(mask, 2).tolist() == [1, 1, 1, 0, 1, 0]
    assert policies.run(policies.least_recent(3, 2), sets_of(mask)).tolist() == [1] * 6


# -- windows, look-ahead, order on flash ---------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(arrays(bool, st.tuples(st.integers(6, 14), st.integers(1, 6))))
def test_windows_count_what_they_say(mask: np.ndarray) -> None:
    resident, new = window_sizes.by_window(mask, [1, 2, 5])
    for at, k in enumerate((1, 2, 5)):
        held = [mask[t - k : t].any(axis=0) for t in range(5, len(mask))]
        assert resident[at] == pytest.approx(np.mean(held))
        assert new[at] == pytest.approx(np.mean(mask[5:] & ~np.array(held)))


def test_a_guess_from_the_layers_own_ffn_input_would_be_the_choice(model: Any) -> None:
    guessers = neurons_ahead.observe(model)
    history = traces.record(model, IDS, [0], "test")
    assert {*guessers[0].rows} == {"own input"} and {*guessers[1].rows} == {*neurons_ahead.STATES}
    at = neurons_ahead.SHIFTS.index(0.0)
    guess = traces.unpacked(guessers[1].rows["previous middle"][at], 512)
    # Repeat by hand: layer 1's norm and predictor on the input of layer 0's FFN.
    seen = guessers[1].states["previous middle"].seen
    assert seen is not None
    expected = np.array(guessers[1].inner(model.layers[1].final_layer_norm.norm(seen)[0])[0])
    assert np.array_equal(guess[-len(expected) :], expected)
    wider = traces.unpacked(guessers[1].rows["previous middle"][0], 512)
    assert neurons_ahead.SHIFTS[0] < 0 and (wider | guess == wider).all()
    counts = neurons_ahead.compare(history[1].chosen, guess, np.zeros_like(guess))
    assert counts["caught"] == counts["both"] and counts["missed"] == counts["chosen"]
    assert counts["both"] + counts["in_vain"] == pytest.approx(counts["guessed"])


@settings(max_examples=30, deadline=None)
@given(MASKS)
def test_every_order_is_a_permutation(mask: np.ndarray) -> None:
    for make in ordering.ORDERS.values():
        order = make(mask)
        assert sorted(order.tolist()) == list(range(mask.shape[1]))
        assert order[ordering.positions(order)].tolist() == list(range(mask.shape[1]))


def test_pairs_stand_together() -> None:
    mask = np.zeros((20, 8), bool)
    mask[::2, [0, 5]] = mask[1::2, [2, 7]] = True
    place = ordering.positions(ordering.by_pairs(mask))
    assert abs(place[0] - place[5]) == abs(place[2] - place[7]) == 1


def test_what_is_read_through_is_counted() -> None:
    places = np.array([9, 0, 1, 4])
    assert ordering.merged(places, -1) == (4, 4)
    assert ordering.merged(places, 0) == (3, 4)
    assert ordering.merged(places, 2) == (2, 6)
    assert ordering.merged(places, 4) == (1, 10)
    assert ordering.merged(places[:0], 2) == (0, 0)
    assert ordering.Disk("", 1000, 1e6).gap(400) == 2


@pytest.mark.parametrize("module", [window_sizes, eviction, guesses, ordering])
def test_a_command_writes_its_table_its_json_and_its_plot(
    module: Any, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(eviction, "SHARES", (0.25,))
    text = tmp_path / "text.txt"
    text.write_text("so it goes on and on, and on. " * 3)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    arguments = ["--model", str(tiny.store), "--text", str(text), "--tokens", "40", "--output", str(tmp_path)]
    module.main(parser.parse_args(arguments))
    name = {window_sizes: "windows", eviction: "eviction", guesses: "lookahead", ordering: "ordering"}[module]
    assert capsys.readouterr().out.splitlines()[-1].startswith(f'{{"command": "{name}"')
    assert (tmp_path / f"{name}.json").exists() and (tmp_path / f"{name}.png").exists()


@pytest.mark.parametrize("wrong", [["--slots", "0"], ["--slots", "nan"], ["--bundle", "0"], ["--bytes-per-s", "inf"]])
def test_an_order_needs_a_disk_that_can_be(wrong: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    parser = argparse.ArgumentParser()
    ordering.add_arguments(parser)
    with pytest.raises(UsageError, match="--slots must be in"):
        ordering.main(parser.parse_args(["--text", str(tmp_path / "text.txt"), *wrong]))
