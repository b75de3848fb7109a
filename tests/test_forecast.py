"""The forecast of a model's speed: its arithmetic, its sentence, and the measured rate that is kept."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mixtures import make_mixture  # type: ignore[import-not-found]

from mlx_flash.flash import disk_rate as probe
from mlx_flash.flash.disk_rate import disk_rate
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.loading import forecast as module
from mlx_flash.loading.forecast import RATE_LIFE_S, Forecast, forecast
from mlx_flash.loading.in_place_loading import plan_in_place
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.options import LoadOptions
from mlx_flash.loading.plan import ENDLESS
from mlx_flash.source.cached import DISK_RATES, entries


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (
            Forecast(16_200_000_000, 5.3e9, 0.1, 0.0, False),
            "forecast: every token reads 16.2 GB; this disk reads 5.3 GB/s: about 0.33 tokens per second",
        ),
        (
            Forecast(400_000_000, 2e9, 0.4, 0.1, True),
            "forecast: a token reads 0.4 GB if all experts are chosen equally often; this disk reads 2 GB/s: about 2 "
            "tokens per second, bound by computing",
        ),
        (
            Forecast(140_000_000_000, 7e9, 0.5, 0.1, False),
            "forecast: every token reads 140 GB; this disk reads 7 GB/s: about 20 seconds per token",
        ),
    ],
)
def test_the_sentence(made: Forecast, said: str) -> None:
    assert made.describe() == said


def test_the_rate_counts_what_was_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.write_bytes(np.random.default_rng(1).bytes(140 << 20))
    seconds = iter([100.0, 100.1, 100.2, 102.0])
    reader = Reader(4)
    try:
        with UnitFile(path) as file:
            assert (disk_rate(file, reader) or 0) > 1e6
            monkeypatch.setattr(probe.time, "perf_counter", lambda: next(seconds))
            # Three batches are submitted until 0.2 s have passed; the fourth is not waited for.
            monkeypatch.setattr(probe, "SECONDS", 0.15)
            assert disk_rate(file, reader) == pytest.approx(2 * 32 * 2**20 / 2.0)
        assert reader.outstanding == 0
        path.write_bytes(bytes(100 << 20))
        with UnitFile(path) as file:
            assert disk_rate(file, reader) is None, "it is too short"
    finally:
        reader.close()


def test_a_measured_rate_is_kept_for_a_day(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = iter([1e9, 2e9, 3e9])
    monkeypatch.setattr(module, "disk_rate", lambda *_: next(measured))
    path = tmp_path / "file"
    path.write_bytes(b"x")
    assert [module._rate_of(path, True, 4) for _ in range(2)] == [1e9, 1e9]
    assert module._rate_of(path, True, 8) == 2e9, "measured with other threads"
    assert [entry.kind for entry in entries(cache)] == ["speed of disks"]
    kept = json.loads((cache / DISK_RATES).read_text())
    old = {key: [rate, time.time() - RATE_LIFE_S - 1] for key, (rate, _) in kept.items()}
    (cache / DISK_RATES).write_text(json.dumps(old))
    assert module._rate_of(path, True, 4) == 3e9


@pytest.mark.parametrize("contents", ["", "[]", "{", '{"a": 1}', "null", "[" * 5000])
def test_a_broken_file_of_rates(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, contents: str) -> None:
    monkeypatch.setattr(module, "disk_rate", lambda *_: 1e9)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    cache.mkdir()
    (cache / DISK_RATES).write_text(contents)
    assert [module._rate_of(path, True, 4) for _ in range(2)] == [1e9, 1e9]


@pytest.mark.parametrize("rate", ["1" + 400 * "0", "Infinity", "NaN", "1e-300", "-1", '"x"', "null"])
def test_a_rate_that_is_none(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, rate: str) -> None:
    monkeypatch.setattr(module, "disk_rate", lambda *_: 1e9)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    module._rate_of(path, True, 4)
    (key,) = json.loads((cache / DISK_RATES).read_text())
    (cache / DISK_RATES).write_text(f'{{"{key}": [{rate}, {int(time.time())}]}}')
    assert module._rate_of(path, True, 4) == 1e9


def test_a_pipe_in_place_of_the_rates(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "disk_rate", lambda *_: 1e9)
    path = tmp_path / "file"
    path.write_bytes(b"x")
    cache.mkdir()
    os.mkfifo(cache / DISK_RATES)
    assert module._rate_of(path, True, 4) == 1e9


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "disk_rate", lambda *_: 1e9)
    cache.write_text("a file where the folder would be")
    path = tmp_path / "file"
    path.write_bytes(b"x")
    assert module._rate_of(path, True, 4) == 1e9


@pytest.mark.parametrize(("family", "quantisation"), [("qwen3", "plain"), ("llama", "4 bits"), ("qwen3_moe", "plain")])
def test_the_forecast_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, quantisation: str
) -> None:
    monkeypatch.setattr(module, "disk_rate", lambda *_: 1e9)
    folder = make_mixture(tmp_path / "model", family, quantisation, hidden_size=256, intermediate_size=512)
    mixture = open_in_place(folder)
    plan, _, foresee = plan_in_place(folder, mixture, LoadOptions(memory=ENDLESS, context=64))
    assert foresee() is None, "all of it is in memory"
    change: dict[str, Any] = {"layer_bytes_per_token": 5000}
    if family == "qwen3_moe":
        change["expert_slots"] = (3, 6)  # of 12, of which a token names 4
    for name, value in change.items():
        object.__setattr__(plan, name, value)
    made = forecast(mixture, plan, 4, direct=True, threads=4)
    assert made is not None
    missing = 4 * (9 / 12 + 6 / 12) * mixture.expert_bytes if family == "qwen3_moe" else 0
    assert made.bytes_per_token == 5000 + round(missing)
    assert made.even is (family == "qwen3_moe") and made.disk_rate == 1e9 and made.compute_s > 0 and made.head_s > 0
