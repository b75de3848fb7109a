"""The rates of a disk: measured once a day, and used for pieces of any size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_flash.loading.options import LoadOptions
from mlx_flash.loading.unit_rates import RatesOfDisk
from mlx_flash.machine import disk_table as module
from mlx_flash.machine.disk_table import disk_table, rate_in

TABLE = {(1 << 10, 1): 10.0, (1 << 12, 1): 40.0, (1 << 10, 16): 100.0, (1 << 12, 16): 400.0}


@pytest.mark.parametrize(
    ("piece_bytes", "at_once", "rate"),
    [
        (1 << 10, 1, 10.0),
        (1 << 12, 16, 400.0),
        (1 << 11, 1, 20.0),
        (1 << 10, 4, 10**1.5),
        (1 << 8, 1, 10.0),
        (1 << 20, 64, 400.0),
    ],
)
def test_a_rate_between_others(piece_bytes: int, at_once: int, rate: float) -> None:
    assert rate_in(TABLE, piece_bytes, at_once) == pytest.approx(rate)


def test_the_rates_are_kept_for_a_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    asked: list[Path] = []

    def probe(file: None, folder: Path) -> dict[str, Any]:
        asked.append(folder)
        sizes = [(size, at_once) for size in module.SIZES for at_once in module.AT_ONCE]
        return {"rates": [{"piece_bytes": s, "at_once": n, "bytes_per_second": s * n} for s, n in sizes]}

    monkeypatch.setattr(module, "probe", probe)
    said: list[str] = []
    first = disk_table(tmp_path / "hub" / "not there yet", said.append)
    assert asked == [tmp_path] and len(said) == 1, "the file is written to the disk that is meant"
    assert first[1 << 20, 4] == 4 << 20
    assert disk_table(tmp_path, said.append) == first and len(asked) == len(said) == 1


def test_the_rate_of_units() -> None:
    rates = RatesOfDisk(TABLE, LoadOptions(threads=16))
    one = np.array([[0, 0, 1 << 12]])
    many = np.tile(one, (16, 1))
    assert rates.rate("units", [one], 1) == pytest.approx((40.0, 1.0))
    assert rates.rate("units", [many], 1) == pytest.approx((400.0, 1.0))
    mixed = np.array([[0, 0, 1 << 10], [0, 0, 1 << 12], [0, 0, 0]])
    rate = rates.rate("units", [mixed], 1).bytes_per_second
    assert min(rate_in(TABLE, 1 << 10, 2), rate_in(TABLE, 1 << 12, 2)) < rate < rate_in(TABLE, 1 << 12, 2)
    assert RatesOfDisk(TABLE, LoadOptions(threads=1)).rate("units", [many], 1) == pytest.approx((40.0, 1.0))
    pieces = np.array([[0, 0, 16 << 20]])
    assert rates.rate("units", [pieces], 1).bytes_per_second == pytest.approx(400.0), "it is read in 16 requests"
    rates.close()
