"""Synthetic stores are sound, labelled and reproducible from their seed, and their neurons fire as published."""

from __future__ import annotations

import math
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest

from mlx_flash.bench.synthetic import neuron_store
from mlx_flash.bench.synthetic.neuron_store import LayerStatistics, active_shares, is_synthetic, measure, write_store
from mlx_flash.check import check_store
from mlx_flash.errors import UsageError
from mlx_flash.flash.files import read_manifest

SHAPE = (512, 6, 8)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "store"
    write_store(folder, SHAPE, vocabulary=500)
    return folder


def test_the_published_statistics_hold(store: Path) -> None:
    """Uses a real forward pass. Tolerance: a tenth; a fifth for single layers, which have 2,048 neurons here."""
    found = measure(store, 160)
    published = (
        neuron_store.FIRST_ACTIVE,
        neuron_store.LAST_ACTIVE,
        neuron_store.MEAN_ACTIVE,
        neuron_store.PREDICTED_PER_ACTIVE,
        neuron_store.RECALL,
        neuron_store.IN_WINDOW,
        neuron_store.NEW_PER_TOKEN,
    )
    tolerances = (0.2, 0.2, 0.1, 0.1, 0.02, 0.1, 0.1)
    for (name, value), goal, tolerance in zip(found.items(), published, tolerances, strict=True):
        assert math.isclose(value, goal, rel_tol=tolerance), (name, value, goal)


def test_a_synthetic_store_is_a_sound_store(store: Path) -> None:
    manifest = read_manifest(store)
    assert is_synthetic(manifest) and manifest.default_predictor == "lowrank"
    assert check_store(store) == []


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_store(tmp_path / name, (64, 2, 4), seed, vocabulary=100)
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert files["neurons.bin"] != (tmp_path / "c" / "neurons.bin").read_bytes()


def test_nothing_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        write_store(tmp_path / "store", (64, 2, 4))
    assert list(tmp_path.iterdir()) == [tmp_path / "store"]


@pytest.mark.parametrize("layers", [2, 24, 32])
def test_active_shares_have_the_published_mean(layers: int) -> None:
    shares = active_shares(layers)
    assert shares[0] == neuron_store.FIRST_ACTIVE and math.isclose(shares[-1], neuron_store.LAST_ACTIVE)
    assert shares == sorted(shares) and math.isclose(np.mean(shares), neuron_store.MEAN_ACTIVE, rel_tol=0.08)


@pytest.mark.parametrize("active", [0.016, 0.033, 0.054])
def test_what_is_planted_against_draws(active: float) -> None:
    """Compares the closed form with a million draws of bias, signal and noise."""
    s = LayerStatistics.of(active)
    rng = np.random.default_rng(0)
    bias, signal, noise = rng.standard_normal((3, 10**6))
    score = np.sqrt(s.predictable) * signal + s.bias_mean + s.bias_spread * bias
    before = score + np.sqrt(1 - s.predictable) * noise
    chosen = score > s.threshold
    assert math.isclose((before > 0).mean(), active, rel_tol=0.03)
    assert math.isclose(chosen.mean(), neuron_store.PREDICTED_PER_ACTIVE * active, rel_tol=0.03)
    assert math.isclose(chosen[before > 0].mean(), neuron_store.RECALL, rel_tol=0.01)
    assert math.isclose((np.maximum(before, 0) ** 2).mean(), s.mean_square, rel_tol=0.03)
    assert 0 < s.predictable < 1 and NormalDist().cdf(s.threshold) < 0.5
