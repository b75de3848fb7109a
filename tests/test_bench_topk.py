"""The measurements of Gemma 3n's sparse FFN, on tiny shapes and models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mlx_lm.models.gemma3n import gelu_topk
from mlx_lm.utils import load_model
from table_models import VOCABULARY, make_model  # type: ignore[import-not-found]

from mlx_flash.bench import __main__ as bench
from mlx_flash.bench import topk_hits
from mlx_flash.bench.tools import topk
from mlx_flash.errors import UsageError
from mlx_flash.flash.host_arrays import to_numpy

IDS = [int(i) for i in np.random.default_rng(0).integers(1, VOCABULARY, 40)]
PATTERN = [0.95, 0.9, 0.0, 0.0]
MACHINE = topk_hits.MachineRates(small=1e9, large=10e9, products=100e9, read_back_s=0.0)


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    parsed = bench.make_parser().parse_args([str(each) for each in arguments])
    parsed.run(parsed)
    told: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return told


def gemma(folder: Path) -> Path:
    text = {"activation_sparsity_pattern": PATTERN, "intermediate_size": [256] * 4}
    return make_model(folder, "gemma3n", text_config=topk_config(text))


def topk_config(changes: dict[str, Any]) -> dict[str, Any]:
    from table_models import MODELS  # type: ignore[import-not-found]

    return {**MODELS["gemma3n"]["text_config"], **changes}


# -- the rule ------------------------------------------------------------------------------------------------


def test_the_rule_is_mlx_lms() -> None:
    gates, up = mx.random.normal((2, 3, 4096), key=mx.random.key(0))
    multiplier = math.sqrt(2.0) * mx.erfinv(mx.array(2 * topk.SPARSITY - 1))
    expected = gelu_topk(gates, multiplier) * up
    above = gates - topk.cutoff(gates)
    found = topk.TopKActivation()(above, up)
    assert mx.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert to_numpy((expected != 0) == (above > 0)).mean() > 0.9995  # a gate may lie within rounding of the cutoff
    assert 0.04 < to_numpy(above > 0).mean() < 0.06


# -- topk-neurons --------------------------------------------------------------------------------------------


def test_both_sides_are_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = run(capsys, "topk-neurons", "--shape", "tiny", "--bits", "16,4", "--rounds", 1, "--folder", tmp_path)
    assert [row["bits"] for row in told["rows"]] == [16, 4]
    for row in told["rows"]:
        found = row["check"]
        assert found["exact_zeros"] and 0.03 < found["active"] < 0.08
        assert max(found["error"], found["own"], found["theirs"]) < 1e-5
        whole, *neurons = row["sides"]
        assert whole["bytes"] >= row["layer_bytes"] and whole["missing"] is None
        assert [side["side"] for side in neurons] == ["100% missing", "40% missing", "20% missing"]
        missing = [side["missing"] for side in neurons]
        assert missing == sorted(missing, reverse=True) and 0 < missing[-1] < missing[0] <= 1
        assert row["gate_bytes"] < neurons[0]["held_bytes"] < neurons[-1]["held_bytes"] < row["layer_bytes"]
        assert all(0 < side["bytes"] < whole["bytes"] for side in neurons)
    assert not list(tmp_path.iterdir())


# -- topk-hits -----------------------------------------------------------------------------------------------


def test_a_trace_is_what_the_model_leaves_above_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = load_model(gemma(tmp_path / "model"))
    found, of_the_model = topk_hits.trace(model, IDS, [], window=len(IDS))
    assert of_the_model and [trace.layer for trace in found] == [0, 1]
    inputs = []
    gate = model.layers[0].mlp.gate_proj  # the tap

    def seen(x: mx.array) -> mx.array:
        inputs.append(gate.inner(x))
        return inputs[-1]

    model.layers[0].mlp.gate_proj = seen
    model(mx.array([IDS[:-1]]))
    expected = gelu_topk(inputs[0], model.layers[0].mlp._std_multiplier)[0] > 0
    assert to_numpy(expected == mx.array(found[0].chosen)).mean() > 0.999
    assert found[0].chosen.mean() < found[1].chosen.mean()


def test_a_text_is_traced_and_the_table_computed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = gemma(tmp_path / "model")
    write_tokenizer(folder, VOCABULARY)
    (tmp_path / "text.txt").write_text("the old man and the sea " * 60)
    told = run(
        capsys, "topk-hits", "--model", folder, "--text", tmp_path / "text.txt", "--tokens", 60, "--window", 32,
        "--shape", "tiny",
    )  # fmt: skip
    assert told["trained_for_it"] and told["tokens"] == 60 and len(told["layers"]) == told["counted"] == 2
    for row in told["layers"]:
        assert all(best <= own for best, own in zip(row["misses_clairvoyant"], row["misses"], strict=True))
        assert row["misses"] == sorted(row["misses"], reverse=True)
    assert len(told["computed"]) == 3 * len(topk_hits.MEMORY)


def test_a_model_without_the_rule_gets_it_in_every_layer(tmp_path: Path) -> None:
    model, _ = load_model(make_model(tmp_path / "model", "llama"))
    found, of_the_model = topk_hits.trace(model, IDS, [1], window=16)
    assert not of_the_model and [trace.layer for trace in found] == [0, 1]
    assert found[0].chosen.shape[1] == 64 and found[0].chosen.any()


def test_a_model_without_gates_is_refused() -> None:
    class Layers:
        layers: tuple[dict[str, Any], ...] = ({},)

    with pytest.raises(UsageError, match="no layer of this model has a gate"):
        topk_hits.trace(Layers(), IDS, [], window=16)


# -- the computed table --------------------------------------------------------------------------------------


def test_a_gain_never_exceeds_its_bound() -> None:
    shape = topk.SHAPES["e4b"]
    for misses in ([1.0] * len(topk_hits.SHARES), [0.0] * len(topk_hits.SHARES)):
        for bits in (16, 8, 4):
            for share in topk_hits.MEMORY:
                row = topk_hits.compute(shape, bits, share, misses, MACHINE)
                if row["neurons"] is not None and row["bound"] is not None:
                    assert row["read_gain"] <= row["bound"] * (1 + 1e-9)


def test_gates_that_do_not_fit_leave_no_choice() -> None:
    row = topk_hits.compute(topk.SHAPES["e4b"], 4, 0.02, [0.0] * len(topk_hits.SHARES), MACHINE)
    assert row["neurons"] is None and row["whole"]["bytes"] > 0


def test_neurons_that_all_have_slots_are_not_read() -> None:
    row = topk_hits.compute(topk.SHAPES["e4b"], 4, 0.9, [1.0] * len(topk_hits.SHARES), MACHINE)
    assert row["neurons"]["slots"] == 1.0 and row["neurons"]["reads"] == 0
    assert row["read_gain"] == pytest.approx(1)


def test_neurons_and_whole_layers_are_even_at_the_break_even() -> None:
    shape = topk.SHAPES["e4b"]
    limit = topk_hits.break_even(shape, 4, MACHINE)
    for factor, better in ((0.9, True), (1.1, False)):
        misses = [factor * limit * (1 - slots) for slots in topk_hits.SHARES]
        row = topk_hits.compute(shape, 4, 0.5, misses, MACHINE)
        assert (row["read_gain"] > 1.0001) == better
