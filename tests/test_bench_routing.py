"""Traces of the routing of tiny mixtures, and the simulations on them."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import VOCABULARY, choices_seen, make_mixture  # type: ignore[import-not-found]
from mlx_lm.utils import load_model

from mlx_flash.bench import eviction, experts_ahead, guesses, neurons_ahead, routing, traces, window_sizes
from mlx_flash.errors import UsageError
from mlx_flash.layers.experts import StreamedExperts
from mlx_flash.loading import load

pytestmark = pytest.mark.usefixtures("one_processor")

IDS = [int(i) for i in np.random.default_rng(0).integers(1, VOCABULARY, 40)]


@pytest.fixture
def open_mixture(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    opened = []

    def make(family: str, **options: Any) -> Any:
        folder = make_mixture(tmp_path / family, family)
        write_tokenizer(folder, VOCABULARY)
        opened.append(load.load(folder, **options)[0])
        return opened[-1]

    yield make
    for model in opened:
        model.flash.close()


def tap_of(chosen: np.ndarray, ranks: np.ndarray) -> routing.RouterTap:
    """A layer's tap after such choices, bool (T, E), with the same ranks for all states, int (T, E)."""
    trace = traces.LayerTrace(0, chosen.shape[1], 1, [np.packbits(chosen, axis=1)])
    tap = routing.RouterTap(None, trace, None, {state: lambda: mx.array(0) for state in experts_ahead.WINDOWS})
    tap.choices = int(chosen[0].sum())
    tap.rank_rows = {state: [ranks.astype(np.int16)] for state in tap.states}
    return tap


# -- traces --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_a_trace_is_what_mlx_lm_chooses(
    family: str, open_mixture: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = open_mixture(family, context=32)  # 40 tokens: two windows
    taps = routing.record(model, IDS, [0], "test")
    seen = choices_seen(monkeypatch)
    plain, _ = load_model(tmp_path / family)
    for window in (IDS[:31], IDS[31:]):
        mx.eval(plain(mx.array([[0, *window]])))
    for at, tap in enumerate(taps):
        expected = np.concatenate(seen[at :: len(taps)])
        chosen = tap.trace.chosen
        assert chosen.shape[0] == len(IDS) + 2 and tap.choices == expected.shape[1]
        assert [np.flatnonzero(row).tolist() for row in chosen] == [sorted(row) for row in expected.tolist()]
    here = [place.block[place.name] for place in routing.places(model)]
    assert len(here) == len(taps) and all(isinstance(inner, StreamedExperts) for inner in here)  # as before


def test_habits() -> None:
    chosen = np.array([[1, 1, 0, 0, 0, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0], [0, 1, 0, 1, 0, 0, 0, 0]], bool)
    found = routing.habits(chosen)
    assert found["again"] == 2 / 4
    assert found["busiest"] == 4 / 6  # the busiest two of eight experts have three uses and one
    assert found["again_by_chance"] == 2 / 4  # in any order only the second expert is used again


# -- guesses -------------------------------------------------------------------------------------------------


def test_a_guess_is_the_next_layers_router_on_this_layers_state(open_mixture: Callable[..., Any]) -> None:
    model = open_mixture("qwen3_moe")
    first, second = model.layers
    gate, norms = second.mlp.gate, (first.post_attention_layernorm, second.post_attention_layernorm)
    taps = routing.record(model, IDS, [], "test", experts_ahead.router_states(model))
    experts_ahead.check_routers(taps)
    assert {*taps[0].states} == {experts_ahead.OWN, "own input"}
    assert {*taps[1].states} == {experts_ahead.OWN, *neurons_ahead.STATES, experts_ahead.ROUTED}
    h = model.model.embed_tokens(mx.array([IDS]))
    middle = h + first.self_attn(first.input_layernorm(h), "causal", None)
    for state, norm in {"previous middle": norms[1], experts_ahead.ROUTED: norms[0]}.items():
        scores = np.array(gate(norm(middle)))[0]
        best = np.argsort(-scores, axis=1)[:, :4]
        ranks = taps[1].ranks(state)
        assert np.mean(np.take_along_axis(ranks, best, axis=1) == np.arange(4)) > 0.98  # except for near ties
    packed = experts_ahead.guesses_of(taps[1], "previous middle")
    sizes = [traces.unpacked(rows, 12).sum(axis=1) for rows in packed]
    assert [int(each[0]) for each in sizes] == [1, 2, 3, 4, 6, 8] and all(np.ptp(each) == 0 for each in sizes)


def test_routers_that_choose_by_themselves(open_mixture: Callable[..., Any]) -> None:
    """A router that returns the chosen experts, not a score for each, rates those first."""
    model = open_mixture("deepseek_v3")
    taps = routing.record(model, IDS, [], "test", experts_ahead.router_states(model))
    experts_ahead.check_routers(taps)


def test_routers_that_choose_others_are_refused(open_mixture: Callable[..., Any]) -> None:
    model = open_mixture("qwen3_moe")
    states = experts_ahead.router_states(model)
    gate = model.layers[1].mlp.gate
    model.layers[1].mlp.gate = nn.Linear(gate.weight.shape[1], gate.weight.shape[0])
    taps = routing.record(model, IDS, [], "test", states)
    taps[1].rank_rows[experts_ahead.OWN] = [11 - rows for rows in taps[1].rank_rows[experts_ahead.OWN]]
    with pytest.raises(UsageError, match="layer 1 chooses other experts"):
        experts_ahead.check_routers(taps)


def test_neurons_are_not_sought_in_a_mixture(open_mixture: Callable[..., Any]) -> None:
    with pytest.raises(UsageError, match="measures neurons"):
        traces.record(open_mixture("qwen3_moe"), IDS, [], "test")


def test_the_first_that_are_absent() -> None:
    ranks = np.array([[3, 0, 2, 1], [0, 1, 2, 3]])
    absent = np.array([[1, 0, 1, 1], [1, 1, 1, 1]], bool)
    assert experts_ahead.first(ranks, absent, 1, 4).tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert experts_ahead.first(ranks, absent, 2, 4).tolist() == [[0, 0, 1, 1], [1, 1, 0, 0]]
    assert experts_ahead.first(ranks, absent, 4, 2).tolist() == [[0, 0, 0, 1], [1, 1, 0, 0]]


def test_modelled_times() -> None:
    """A token uses two of eight experts, with two slots, and misses both. The guess is right about the first."""
    chosen = np.zeros((40, 8), bool)
    chosen[::2, [0, 1]] = chosen[1::2, [2, 3]] = True
    ranks = np.tile([0, 7, 2, 3, 1, 4, 5, 6], (40, 1))
    ranks[1::2] = [2, 3, 0, 7, 1, 4, 5, 6]
    tap = tap_of(chosen, ranks)
    rows = {(row["ratio"], row["state"]): row for row in experts_ahead.times([tap, tap], 0.25)}
    row = rows[2, "previous middle"]  # reading an expert takes 1, and 1 of compute is left when the guess is known
    assert row["without"] == pytest.approx(3)  # 1 + both reads, because no resident expert can be multiplied meanwhile
    assert row["perfect"] == pytest.approx(1.5)  # one expert fits; both products take half of the other's time
    assert row["fitting"] == pytest.approx(1.75)  # the right expert fits, and its product takes a quarter
    assert row["-3"] == pytest.approx(1.75)
    assert row["0"] == pytest.approx(2.75)  # an unused expert is read before the missing one
    late = rows[2, "own input"]  # half of the window is left
    assert late["perfect"] == pytest.approx(2) and late["fitting"] == pytest.approx(2.25)


@pytest.mark.parametrize("module", [eviction, guesses])
def test_a_command_takes_a_mixture(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    folder = make_mixture(tmp_path / "model", "qwen3_moe")
    write_tokenizer(folder, VOCABULARY)
    text = tmp_path / "text.txt"
    text.write_text("so it goes on and on, and on. " * 3)
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    arguments = ["--model", str(folder), "--text", str(text), "--tokens", "40", "--output", str(tmp_path)]
    module.main(parser.parse_args(arguments))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    name = "eviction" if module is eviction else "lookahead"
    assert result["command"] == name and (tmp_path / f"{name}.png").stat().st_size > 10_000
    if module is eviction:
        part = result["units"]["expert"]
        assert part["needed"] == 8 and part["units"] == 12 and len(result["habits_by_layer"]) == 2
        best, least = (np.sum(part["misses_by_layer"][rule], axis=1) for rule in ("clairvoyant", "least recent"))
        assert (best <= least).all() and best[0] > 0
    else:
        assert {row["unit"] for row in result["by_layer"]} == {"expert"}
        assert all(row["perfect"] <= row["without"] for row in result["times"])
    with pytest.raises(UsageError, match="measures neurons"):
        window_sizes.main(_arguments(window_sizes, arguments))


def _arguments(module: Any, arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return parser.parse_args(arguments)
