"""The low-rank predictor: its rank is as large as the layer needs and the memory allows."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash.convert import fitting, lowrank
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.convert.numpy_matrix import NumpyMatrix
from mlx_flash.convert.sample import Sample
from mlx_flash.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_processor")


def layer(inner: int, seed: int = 0, tokens: int = 1024, bias: float = -1.0) -> Sample:
    """A layer whose up projection has rank `inner`. A lower `bias` makes it sparser."""
    width, neurons = 64, 256
    rng = np.random.default_rng(seed)
    up = rng.standard_normal((neurons, inner)) @ rng.standard_normal((inner, width)) / np.sqrt(inner * width)
    up, up_bias = up.astype(np.float32), rng.normal(bias, 0.1, neurons).astype(np.float32)
    x = rng.standard_normal((tokens, width)).astype(np.float32) + 0.5
    return Sample(x, x @ up.T + up_bias, NumpyMatrix(mx.array(up)), up_bias, np.arange(tokens) % 4 == 3)


@given(st.integers(1, 512).map(lambda n: 8 * n))
def test_candidates_end_at_the_largest(largest: int) -> None:
    ranks = lowrank.candidate_ranks(largest)
    assert ranks == sorted(set(ranks)) and ranks[-1] == largest and ranks[0] == 8
    assert all(rank % 8 == 0 for rank in ranks)
    assert all(b <= 2 * a for a, b in pairwise(ranks))


@given(st.integers(0, 10**7), st.integers(1, 10**5))
def test_the_largest_rank_fits(memory: int, rank_bytes: int) -> None:
    rank = lowrank.largest_rank(memory, rank_bytes)
    assert rank % 8 == 0 and rank >= 8
    assert rank * rank_bytes <= max(memory, 8 * rank_bytes) < (rank + 8) * rank_bytes


@pytest.mark.parametrize(("inner", "bias"), [(6, -1), (20, -1), (44, -1), (44, -2), (64, -2)])
def test_the_rank_is_the_smallest_that_is_enough(inner: int, bias: float) -> None:
    sample = layer(inner, bias=bias)
    a, b, _ = fitted = lowrank.fit(sample, 0.99, 64, seed=0)
    assert lowrank.chosen_per_active(sample, fitted, 0.99) <= lowrank.CHOSEN_PER_ACTIVE
    ranks = lowrank.candidate_ranks(64)
    below = ranks.index(a.shape[1]) - 1
    assert a.shape[1] == b.shape[0] <= lowrank.LEAST_RANK * -(-inner // lowrank.LEAST_RANK)
    if below >= 0:
        smaller = lowrank.fit(sample, 0.99, ranks[below], seed=0)
        assert smaller[0].shape[1] == ranks[below]
        assert lowrank.chosen_per_active(sample, smaller, 0.99) > lowrank.CHOSEN_PER_ACTIVE * 0.8


@pytest.mark.parametrize("better", [True, False])
def test_where_no_rank_is_enough_what_chooses_fewer_is_taken(better: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = layer(64)
    perfect = sample.up.rows(0, 256).T, np.eye(256, dtype=np.float32), sample.up_bias
    useless = np.zeros((64, 16), np.float32), np.zeros((16, 256), np.float32), sample.up_bias
    monkeypatch.setattr(lowrank, "train_logistic", lambda *_: perfect if better else useless)
    fitted = lowrank.fit(sample, 0.99, 16, seed=0)
    assert (fitted is perfect) == better
    assert fitted[0].shape[1] == (256 if better else 16)


def test_training_lowers_the_balanced_loss() -> None:
    sample = layer(64)
    rng = np.random.default_rng(0)
    a, b, mean, c = lowrank.reduced_rank(sample, 16, rng)
    scale = 3 / sample.before[~sample.held_out].std()
    closed = a * scale, b, (c - mean @ a @ b) * scale

    def loss(factors: lowrank.Factors) -> float:
        x, y = sample.x[~sample.held_out], sample.before[~sample.held_out] > 0
        each = np.logaddexp(0, np.where(y, -1, 1) * (x @ factors[0] @ factors[1] + factors[2]))
        return float(each[y].mean() + each[~y].mean())

    trained = lowrank.train_logistic(sample, (a, b, c - mean @ a @ b), rng)
    assert loss(trained) < 0.95 * loss(closed)


def test_the_closed_form_is_the_best_of_its_rank() -> None:
    """Compares it with NumPy's singular value decomposition of all the scores."""
    sample = layer(64)
    a, b, mean, c = lowrank.reduced_rank(sample, 24, np.random.default_rng(0))
    x, y = sample.x[~sample.held_out], sample.before[~sample.held_out]
    error = np.linalg.norm(y - c - (x - mean) @ a @ b)
    values = np.linalg.svd(y - y.mean(axis=0), compute_uv=False)
    assert error == pytest.approx(np.sqrt((values[24:] ** 2).sum()), rel=0.02)
    assert np.allclose(b @ b.T, np.eye(24), atol=1e-4)


@pytest.mark.parametrize("inner", [6, 64])
def test_scores_that_are_no_projection(inner: int) -> None:
    """If a gate and an up projection must both be positive, the weights do not give the scores."""
    one, other = layer(inner), layer(inner, seed=1)
    before = np.minimum(one.before, other.up.rows_dot(one.x) + other.up_bias + 1)
    sample = Sample(one.x, before, one.up, one.up_bias, one.held_out)
    assert lowrank.is_projection(one) and not lowrank.is_projection(sample)
    made = fitting.make_lowrank(sample, 0.95, 32 * (64 + 256) * 4, 0, mx.float32)
    assert made.recall == pytest.approx(0.95, abs=0.02)
    assert made.active < made.predicted < 0.8


def test_few_tokens_bound_the_rank() -> None:
    made = fitting.make_lowrank(layer(64, tokens=16), 0.9, 10**9, 0, mx.float32)
    assert made.rank == 12  # three quarters of the tokens are for training


@pytest.fixture(scope="module")
def uneven(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose first layer needs a rank of 4 and the others the full rank."""
    folder = make_checkpoint(tmp_path_factory.mktemp("uneven") / "checkpoint", layers=3, neurons=256)
    weights: Any = mx.load(str(folder / "model.safetensors"))
    name = "model.decoder.layers.0.fc1.weight"
    rng = np.random.default_rng(0)
    thin = rng.standard_normal((256, 4)) @ rng.standard_normal((4, 64)) / 16
    weights = {**weights, name: mx.array(thin.astype(np.float32))}
    mx.eval(weights)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


def test_what_a_layer_leaves_is_for_the_later_ones(uneven: Path, tmp_path: Path) -> None:
    share = 24 * (256 + 64) * 4
    settings = Settings(calibration_tokens=1024, predictor_memory=3 * share)
    report = convert(uneven, tmp_path / "store", settings).predictors["lowrank"]
    assert report["rank"][0] == 8 and report["rank"][1] == 24 + 16
    assert report["bytes"] <= 3 * share + 3 * 256 * 4  # plus the thresholds


def test_more_memory_chooses_fewer(uneven: Path, tmp_path: Path) -> None:
    chosen = []
    for rank in (8, 16, 48):
        memory = 3 * rank * (256 + 64) * 4
        settings = Settings(calibration_tokens=1024, predictor_memory=memory)
        report = convert(uneven, tmp_path / str(rank), settings).predictors["lowrank"]
        chosen.append(sum(report["predicted"]))
        assert report["bytes"] <= memory + 3 * 256 * 4
    assert chosen[0] > chosen[1] > chosen[2]


def test_memory_that_means_nothing(uneven: Path, tmp_path: Path) -> None:
    from mlx_flash.convert import __main__ as command

    arguments = ["--model", str(uneven), "--output", str(tmp_path / "s"), "--predictor-memory", "much"]
    with pytest.raises(UsageError, match="expected a number with a unit"):
        command.main(command.make_parser().parse_args(arguments))
    least = 3 * 8 * (256 + 64) * 4
    with pytest.raises(UsageError, match=r"this model needs at least 31KB, a rank of 8 in each layer"):
        convert(uneven, tmp_path / "s", Settings(calibration_tokens=64, predictor_memory=least - 1))
    assert not (tmp_path / "s.partial").exists()
    report = convert(uneven, tmp_path / "s", Settings(calibration_tokens=64, predictor_memory=least))
    assert report.predictors["lowrank"]["rank"] == [8, 8, 8]
