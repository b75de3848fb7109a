"""The recall of a stored predictor, set at run time, and a store's information about its predictors."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Tiny, change_manifest  # type: ignore[import-not-found]
from hypothesis import given
from hypothesis import strategies as st

import mlx_flash
from mlx_flash.bench.tools.score import score
from mlx_flash.cli.run import run_command
from mlx_flash.convert import calibrate, fitting
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.convert.numpy_matrix import NumpyMatrix
from mlx_flash.errors import CorruptStoreError, UsageError
from mlx_flash.flash.files import read_manifest
from mlx_flash.layers.recall import PredictorSetting
from mlx_flash.loading.load import load

pytestmark = pytest.mark.usefixtures("one_processor")

REPORT: dict[str, Any] = {
    "target": 0.9,
    "active": [0.1, 0.3],
    "perplexity": {"dense": 20.0, "predicted": 21.0, "tokens": 127},
    "table": {
        "recall": [0.8, 0.9, 1.0],
        "threshold": [[2.0, 0.0, -1.0], [0.5, 0.0, -3.0]],
        "caught": [[0.7, 0.8, 1.0], [0.8, 0.9, 1.0]],
        "predicted": [[0.1, 0.2, 0.9], [0.3, 0.4, 0.5]],
    },
}


def test_between_two_targets_by_the_straight_line() -> None:
    setting = PredictorSetting.of("shadow", REPORT, 0.95)
    assert setting.shifts == pytest.approx((-0.5, -1.5))
    assert setting.predicted == pytest.approx((0.55, 0.45))
    assert setting.caught == pytest.approx((0.9, 0.95))
    assert PredictorSetting.of("shadow", REPORT).shifts == (0.0, 0.0)
    assert PredictorSetting.of("shadow", REPORT) == PredictorSetting.of("shadow", REPORT, 0.9)


def test_thresholds_may_be_integers_of_any_size() -> None:
    """JSON has integers of any size, and NumPy makes objects of those beyond int64 (found by the fuzzer of stores)."""
    table = {**REPORT["table"], "threshold": [[10**30] * 3, *REPORT["table"]["threshold"][1:]]}
    assert PredictorSetting.of("shadow", {**REPORT, "table": table}).shifts[0] == 1e30


def test_what_is_measured_is_of_all_layers_together() -> None:
    measured = PredictorSetting.of("shadow", REPORT).measured
    assert measured["recall"] == pytest.approx((0.8 * 0.1 + 0.9 * 0.3) / 0.4)
    assert measured["predicted_per_active"] == pytest.approx(1.5)
    assert measured["perplexity_change"] == pytest.approx(0.05) and measured["perplexity_tokens"] == 127
    assert "perplexity +5.00% (on 127 held-out tokens)" in PredictorSetting.of("shadow", REPORT).describe()
    assert "perplexity +5.00% at 0.9 (on" in PredictorSetting.of("shadow", REPORT, 0.8).describe()
    unmeasured = PredictorSetting.of("shadow", {**REPORT, "perplexity": None})
    assert unmeasured.measured["perplexity_change"] is None and "perplexity" not in unmeasured.describe()


@pytest.mark.parametrize("recall", [0.79, 1.01, float("nan"), -1.0, float("inf")])
def test_outside_the_table(recall: float) -> None:
    with pytest.raises(UsageError, match=r"expects 0\.8 to 1\.0 \(it was made for 0\.9\)"):
        PredictorSetting.of("shadow", REPORT, recall)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.5, 0.93, 0.99]), st.floats(0.8, 0.999), st.floats(0.8, 0.999))
def test_a_higher_recall_never_chooses_fewer(seed: int, target: float, one: float, other: float) -> None:
    """Uses the table of a random layer, at its entries and between them."""
    rng = np.random.default_rng(seed)
    x, up = (rng.standard_normal(shape, dtype=np.float32) for shape in ((64, 8), (32, 8)))
    bias = rng.normal(-2, 2, 32).astype(np.float32)
    sample = fitting.Sample(x, x @ up.T + bias, NumpyMatrix(mx.array(up)), bias, np.arange(64) >= 24)
    arrays = {"a": mx.array(up.T[:, :4]), "b": mx.eye(32)[:4], "c": mx.array(bias)}
    made = fitting.with_thresholds(arrays, sample, target)
    for name, sign in (("threshold", -1), ("caught", 1), ("predicted", 1)):
        assert (np.diff(made.table[name]) * sign >= 0).all()
    table = {"recall": fitting.recalls(target), **{name: [row] for name, row in made.table.items()}}
    report = {"target": target, "active": [made.active], "perplexity": None, "table": table}
    low, high = (PredictorSetting.of("lowrank", report, recall) for recall in sorted((one, other)))
    assert low.shifts >= high.shifts and low.predicted <= high.predicted and low.caught <= high.caught
    assert PredictorSetting.of("lowrank", report).shifts == (0.0,)
    scores = fitting.score(made.arrays, x)
    assert not ((scores > low.shifts[0]) & ~(scores > high.shifts[0])).any()


def test_a_shadow_in_pieces_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    x, up = (rng.standard_normal(shape, dtype=np.float32) for shape in ((48, 32), (320, 32)))
    bias = rng.normal(-2, 1, 320).astype(np.float32)
    sample = fitting.Sample(x, x @ up.T + bias, NumpyMatrix(mx.array(up)), bias, np.arange(48) >= 24)
    made = {}
    for groups in (2, 5):  # a last piece of one group, and all groups in one piece
        monkeypatch.setattr(fitting, "SHADOW_PIECE", groups * fitting.SHADOW_GROUP)
        for bits in (2, 3, 4):
            shadow = fitting.make_shadow(sample, 0.95, bits, mx.float16)
            made[groups, bits] = [*map(np.array, shadow.arrays.values()), fitting.score(shadow.arrays, x)]
    for bits in (2, 3, 4):
        *pieces, scores = made[2, bits]
        *whole, expected = made[5, bits]
        assert all(np.array_equal(one, other) for one, other in zip(pieces[:3], whole[:3], strict=True))
        assert np.allclose(scores, expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["lowrank", "shadow"])
def test_the_loaded_predictor_moves_with_it(store: Path, open_model: Callable[..., Any], kind: str) -> None:
    x = mx.random.normal((64, 64), key=mx.random.key(3))
    table = read_manifest(store).predictors[kind]["table"]
    masks = {}
    for recall in (None, 0.99, 0.8, 0.9, 0.97, 0.999):
        model = open_model(store, predictor=kind, recall=recall)
        masks[recall] = np.stack([np.array(layer.mlp.predictor(x)[0]) for layer in model.layers])
    assert (masks[None] == masks[0.99]).all()
    order = [masks[recall] for recall in (0.8, 0.9, 0.97, 0.99, 0.999)]
    for fewer, more in pairwise(order):
        assert not (fewer & ~more).any()
    assert order[0].sum() < order[-1].sum()
    at = table["recall"].index(0.9)
    stored: Any = mx.load(str(store / f"predictor-{kind}.safetensors"))
    moved = open_model(store, predictor=kind, recall=0.9).layers[1].mlp.predictor.c
    assert mx.allclose(moved, stored["1.c"] - table["threshold"][1][at]).item()


def test_it_catches_what_it_says(tiny: Tiny, open_model: Callable[..., Any]) -> None:
    """Uses text that the thresholds were not set on, drawn like the calibration text."""
    rng = np.random.default_rng(5)
    tokens = mx.array(rng.integers(1, 90, (8, 60)))
    for recall in (0.9, 0.999):
        model = open_model(tiny.store, predictor="shadow", recall=recall)
        both = active = 0
        for layer in model.layers:
            inner, truth = layer.mlp.predictor, layer.mlp.exact_predictor(mx.float32)

            def watch(x: mx.array, inner: Any = inner, truth: Any = truth) -> Any:
                nonlocal both, active
                mask, real = inner(x)[0], truth(x)[0]
                both, active = both + int(np.array(mask & real).sum()), active + int(np.array(real).sum())
                return mask, None

            layer.mlp.predictor = watch
        for begin in range(0, 60, 4):
            mx.eval(model(tokens[:, begin : begin + 4]))
        assert both / active == pytest.approx(recall, abs=0.02)


def test_the_plan_follows(own_store: Path) -> None:
    """A layer gets slots by the number of neurons that it chooses at the requested recall."""
    kinds = read_manifest(own_store).predictors
    table = kinds["shadow"]["table"]
    table["predicted"] = [[0.01] + [0.4] * (len(table["recall"]) - 1), [0.2] + [0.4] * (len(table["recall"]) - 1)]
    change_manifest(own_store, predictors=kinds)
    slots = {}
    for recall in (None, 0.8):
        whole = load(own_store, predictor="shadow", recall=recall)[0].flash
        whole.close()
        budget = whole.plan.demand.total + whole.plan.slots_bytes // 2
        flash = load(own_store, predictor="shadow", recall=recall, memory=budget)[0].flash
        flash.close()
        slots[recall] = flash.plan.slots
    assert abs(slots[None][0] - slots[None][1]) <= 1
    assert slots[0.8][0] < slots[0.8][1]


@pytest.mark.parametrize("kind", ["none", "exact"])
def test_who_has_no_threshold_refuses(store: Path, kind: str) -> None:
    with pytest.raises(UsageError, match=f"{kind} has no threshold"):
        load(store, predictor=kind, recall=0.9)


def test_a_store_without_the_kind_refuses(store: Path) -> None:
    with pytest.raises(UsageError, match="has no imported predictor; it has: none, exact, lowrank, shadow"):
        load(store, predictor="imported", recall=0.9)


def test_the_command_line(store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(mlx_flash, "generate", mlx_flash.generate)  # the import below replaces it by the module
    command = import_module("mlx_flash.generate")

    def run(*arguments: str) -> tuple[Any, str, str]:
        monkeypatch.setattr(sys, "argv", ["generate", "--model", str(store), "--max-tokens", "2", *arguments])
        with pytest.raises(SystemExit) as end:
            run_command(command.make_parser(), command.main)
        return (end.value.code, *capsys.readouterr())

    code, out, err = run("--recall", "0.9", "--json")
    measured = json.loads(out.splitlines()[-1])["predictor_measured"]
    assert code == 0 and measured["target"] == 0.9 and measured["perplexity_target"] == 0.99
    assert "predictor shadow, set to catch 0.9 of the active neurons" in err and "at 0.99 (on" in err
    code, _, err = run("--recall", "0.2")
    assert code == 2 and "recall is 0.2" in err and "Traceback" not in err
    code, out, _ = run("--predictor", "exact", "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["predictor_measured"] is None


LIES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "no table": lambda r: r.pop("table"),
    "the recall": lambda r: r["table"].update(recall=r["table"]["recall"][::-1]),
    "target": lambda r: r.update(target=0.5),
    "threshold": lambda r: r["table"]["threshold"].pop(),
    "caught": lambda r: r["table"]["caught"][0].pop(),
    "predicted": lambda r: r["table"].update(predicted=[["x"] * 8] * 2),
    "perplexity": lambda r: r.update(perplexity={"dense": 0, "predicted": 1, "tokens": 1}),
}  # fmt: skip


@pytest.mark.parametrize("case", LIES)
def test_a_lying_table_is_refused(own_store: Path, case: str) -> None:
    kinds = read_manifest(own_store).predictors
    LIES[case](kinds["shadow"])
    change_manifest(own_store, predictors=kinds)
    with pytest.raises(CorruptStoreError, match=f"contradicts itself: .*{case.split()[-1]}.* of predictor shadow"):
        read_manifest(own_store)


# -- perplexity ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "settings"),
    [("float32", {}), ("opt-350m-like", {}), ("4 bits", {"bits": 4, "resident_bits": 4})],
)  # the second projects its words in and out; the last two use the embedding as output matrix
def test_the_perplexity_is_that_of_the_loaded_model(
    tiny_of: Callable[[str], Tiny], name: str, settings: dict[str, Any], tmp_path: Path, monkeypatch: Any
) -> None:
    """Uses the held-out sequences through the streamed model, each position with its own selection."""
    from mlx_lm.models.cache import make_prompt_cache

    seen: list[np.ndarray] = []
    real = calibrate.perplexity

    def spy(model: Any, hidden: mx.array, sequences: np.ndarray) -> float:
        seen[:] = list(sequences)
        return real(model, hidden, sequences)

    monkeypatch.setattr(calibrate, "perplexity", spy)
    chosen = Settings(calibration_tokens=512, **settings)
    manifest = convert(tiny_of(name).checkpoint, tmp_path / "store", chosen)
    for kind in ("none", *manifest.predictors):
        model, _ = load(tmp_path / "store", predictor=kind)
        make_cache = partial(make_prompt_cache, model)
        scores = [score(model, make_cache, s[1:].tolist(), [int(s[0])], len(s), 4) for s in seen]
        model.flash.close()
        found = sum(s.nats for s in scores) / sum(s.tokens for s in scores)
        entry = manifest.predictors["lowrank" if kind == "none" else kind]["perplexity"]
        assert entry["tokens"] == sum(s.tokens for s in scores) == len(seen) * (len(seen[0]) - 1)
        expected = np.log(entry["dense" if kind == "none" else "predicted"])
        assert found == pytest.approx(expected, rel=2e-5, abs=2e-4)  # nats; a random tied model is off by a hundred


@pytest.mark.parametrize("everything", [True, False])
def test_who_catches_everything_changes_nothing(tiny: Tiny, tmp_path: Path, monkeypatch: Any, everything: bool) -> None:
    def chosen(_: dict[str, mx.array], x: np.ndarray) -> np.ndarray:
        return np.full((len(x), 512), everything)

    monkeypatch.setattr(fitting, "chosen", chosen)
    manifest = convert(tiny.checkpoint, tmp_path / "store", Settings(calibration_tokens=256))
    for report in manifest.predictors.values():
        change = report["perplexity"]["predicted"] / report["perplexity"]["dense"] - 1
        assert change == 0 if everything else abs(change) > 0.01


def test_a_conversion_that_was_stopped_measures_the_same(tiny: Tiny, tmp_path: Path, monkeypatch: Any) -> None:
    settings = Settings(calibration_tokens=256)
    whole = convert(tiny.checkpoint, tmp_path / "whole", settings)
    real = fitting.make_shadow

    def stop(sample: Any, *rest: Any) -> Any:
        if stop.calls:  # type: ignore[attr-defined]
            raise KeyboardInterrupt
        stop.calls += 1  # type: ignore[attr-defined]
        return real(sample, *rest)

    stop.calls = 0  # type: ignore[attr-defined]
    monkeypatch.setattr(fitting, "make_shadow", stop)
    with pytest.raises(KeyboardInterrupt):
        convert(tiny.checkpoint, tmp_path / "store", settings)
    monkeypatch.setattr(fitting, "make_shadow", real)
    assert convert(tiny.checkpoint, tmp_path / "store", settings) == whole
