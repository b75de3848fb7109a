"""The zeros inside ReLU experts: what is traced and replayed, and the forms of the training script that have them."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]
from mlx_lm.utils import load_model

from mlx_flash.bench import expert_neurons as replay
from mlx_flash.bench import relu_experts
from mlx_flash.demo import mixtures, train_mixture
from mlx_flash.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_processor")

IDS = [int(i) for i in np.random.default_rng(0).integers(1, 60, 40)]
FAMILIES = {"nemotron_h": 2, "qwen3_moe": 3}  # family -> matrices of an expert


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    folder: Path = make_mixture(tmp_path / "model", request.param, hidden_act="relu", max_position_embeddings=32)
    write_tokenizer(folder)
    return folder


@pytest.fixture
def trace() -> replay.ExpertTrace:
    rng = np.random.default_rng(0)
    experts = np.stack([rng.permutation(8)[:2] for _ in range(60)])
    return replay.ExpertTrace(0, experts, rng.random((60, 2, 16)) < 0.3, 8, 2)


# -- traces --------------------------------------------------------------------------------------------------


def test_a_trace_has_what_is_above_zero(checkpoint: Path) -> None:
    model, config = load_model(checkpoint)
    model.set_dtype(mx.float32)
    seen: list[np.ndarray] = []

    def note(before: mx.array) -> mx.array:
        seen.append(np.array(before))
        return nn.relu(before)

    traces = relu_experts.record(model, config, IDS, [0], 32, "test")
    parts = FAMILIES[config["model_type"]]
    for child in model.modules():
        if relu_experts.parts_of(child, config) == 2:
            child.activation = lambda before: note(before) ** 2
        elif relu_experts.parts_of(child, config) == 3:
            child.activation = lambda up, gate: note(gate) * up
    model(mx.array([[0, *IDS[:7]]]))  # so few are not sorted by expert
    assert traces and {trace.parts for trace in traces} == {parts} and len(seen) == len(traces)
    for trace, before in zip(traces, seen, strict=True):
        assert trace.active.shape[:2] == trace.experts.shape and len(trace.active) == len(IDS) + 2  # two windows
        sure = np.abs(before[0, :, :, 0]) > 1e-5
        assert np.array_equal(trace.active[:8][sure], (before[0, :, :, 0] > 0)[sure])


def test_experts_without_relu_are_refused(tmp_path: Path) -> None:
    model, config = load_model(make_mixture(tmp_path / "model", "qwen3_moe"))
    with pytest.raises(UsageError, match="no layer of this model has experts with ReLU"):
        relu_experts.record(model, config, IDS, [], 32, "test")


def test_the_command_prints_tables_and_json(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relu_experts, "SECONDS", 0.001)
    monkeypatch.setattr(relu_experts, "SHARES", (0.5,))
    for name in ("NEMOTRON", "SMALL_THINKER"):
        monkeypatch.setattr(relu_experts, name, replace(getattr(relu_experts, name), width=256, size=64))
    text = tmp_path / "text.txt"
    text.write_text("so it goes on and on, and on. " * 10)
    parser = argparse.ArgumentParser()
    relu_experts.add_arguments(parser)
    given = ["--model", str(checkpoint), "--text", str(text), "--tokens", "60", "--size", "1MB"]
    relu_experts.main(parser.parse_args([*given, "--folder", str(tmp_path)]))
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["command"] == "relu-experts" and [part["share"] for part in result["shares"]] == [0.5]
    for row in result["shares"][0]["ways"]:
        for each in row["times"]:
            assert each["Apple at best"] <= each["Apple"] * 1.000001


# -- replays -------------------------------------------------------------------------------------------------


def test_blocks_cover_the_neurons_that_fire(trace: replay.ExpertTrace) -> None:
    orders = replay.orders_of(trace, lambda mask: np.random.default_rng(1).permutation(mask.shape[1]))
    blocks = trace.blocks(orders, 4).reshape(60, 8, 4)
    for token in range(60):
        for choice, expert in enumerate(trace.experts[token]):
            stored = trace.active[token, choice][orders[expert]].reshape(4, 4)
            assert np.array_equal(blocks[token, expert], stored.any(axis=1))
    assert blocks.any(axis=2).sum() <= trace.chosen.sum() == 120


def test_with_memory_for_all_nothing_is_read_twice(trace: replay.ExpertTrace) -> None:
    """After the warm-up of 30 tokens, all experts were used, but not all of their neurons."""
    orders = replay.orders_of(trace, lambda mask: np.arange(mask.shape[1]))
    assert replay.whole(trace, 1.0).bytes == 0 and replay.whole(trace, 1.0).found == 1
    late = replay.known_beforehand(trace, orders, 1, 1.0, "")
    assert 0 <= late.bytes < 0.1 and late.found > 0.9
    assert replay.exact(trace, orders, 16, 1.0, 0.5, "").bytes == 0


def test_without_memory_all_that_is_needed_is_read(trace: replay.ExpertTrace) -> None:
    orders = replay.orders_of(trace, lambda mask: np.arange(mask.shape[1]))
    fires = trace.active[30:].mean()
    known = replay.known_beforehand(trace, orders, 1, 0.0, "")
    assert known.bytes == pytest.approx(fires, rel=0.05) and known.found < 0.05
    exact = replay.exact(trace, orders, 1, 0.0, 0.5, "")
    assert exact.bytes == pytest.approx(0.5 + fires / 2, rel=0.1)


def test_slots_stay_within_the_memory() -> None:
    for parts in (2, 3):
        for share in (0.1, 0.25, 0.5, 0.9):
            for split in replay.SPLITS:
                deciding, blocks = replay.slots_of(share, split, 64, 64 * 24, parts)
                used = deciding / 64 / parts + blocks / (64 * 24) * (parts - 1) / parts
                assert used <= share + 1 / 64


def test_an_experts_last_use_predicts_what_repeats() -> None:
    experts = np.zeros((20, 1), int)
    active = np.zeros((20, 1, 4), bool)
    active[::2, 0, :2] = active[1::2, 0, 2:] = True
    found = replay.zeros(replay.ExpertTrace(3, experts, active, 2, 2))
    assert found["layer"] == 3 and found["zeros"] == 0.5 and found["again"] == 0


def test_a_published_neuron_has_scales() -> None:
    assert relu_experts.NEMOTRON.neuron_bytes(16, 2) == 2 * 2688 * 2
    assert relu_experts.NEMOTRON.neuron_bytes(4, 1) == 2688 // 2 + 2688 // 64 * 4
    assert relu_experts.matrix_bytes(relu_experts.NEMOTRON, 16) == 1856 * 2688 * 2


# -- the training script ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["nemotron_h", "relu_gated"])
def test_a_trained_form_is_one_that_mlx_lm_builds(form: str, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    recipe = replace(mixtures.RECIPES[form], layers=1, hidden_size=48, context=16, batch=1, steps=2)
    books = ["It was a cold night, and the wind went about the house like a thing that wished to come in. " * 4]
    figures = train_mixture.train(recipe, books, books[0], tmp_path)
    assert figures["steps"] == 2 and np.isfinite(figures["held_out_loss"])
    model, config = load_model(tmp_path)
    model.set_dtype(mx.float32)  # MLX on a processor multiplies experts in float32 only
    traces: list[Any] = relu_experts.record(model, config, IDS, [2], 16, "test")
    assert [(t.count, t.parts) for t in traces] == [(64, 2 if form == "nemotron_h" else 3)]
