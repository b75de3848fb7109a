"""The wired limit: which limit is set, when, and that it is set back. MLX and the Mac are scripted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mlx_flash.errors import UsageError
from mlx_flash.flash import wiring
from mlx_flash.flash.swap import SwapCounters
from mlx_flash.flash.wiring import HEAP_BYTES, PAGE_BYTES, Wiring
from mlx_flash.loading.load import load
from mlx_flash.loading.options import LoadOptions
from mlx_flash.source import kept_swaps
from mlx_flash.source.cached import cache_folder
from mlx_flash.source.kept_swaps import remember_swapping, swapped_lately

GB = 10**9


class Metal:
    """Stands for MLX on a Mac with 16 GB. calls: what was called, in order."""

    cpu = "cpu"

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.active, self.limit, self.device = 0, 7, "gpu"

    def default_device(self) -> str:
        return self.device

    def device_info(self) -> dict[str, int]:
        return {"max_recommended_working_set_size": 11 * GB, "memory_size": 16 * GB}

    def get_active_memory(self) -> int:
        return self.active

    def synchronize(self) -> None:
        self.calls.append("synchronize")

    def clear_cache(self) -> None:
        self.calls.append("clear_cache")

    def set_wired_limit(self, limit: int) -> int:
        self.calls.append(limit)
        before, self.limit = self.limit, limit
        return before


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> Metal:
    scripted = Metal()
    monkeypatch.setattr(wiring, "mx", scripted)
    monkeypatch.setattr(Wiring, "_open", [])
    monkeypatch.setattr(wiring.platform, "mac_ver", lambda: ("15.1", ("", "", ""), "arm64"))
    return scripted


def test_the_limit_is_the_sum_of_what_stays_and_is_set_back(metal: Metal) -> None:
    metal.active = 6 * GB
    model = Wiring(100)
    assert metal.calls == [] and model.nbytes == 6 * GB + HEAP_BYTES + 100 * PAGE_BYTES
    metal.active = 9 * GB  # a KV cache came later, and does not count
    assert model.wire(careful=True) is None
    assert metal.calls == ["synchronize", "clear_cache", model.nbytes]
    model.close()
    model.close()
    assert metal.calls[3:] == ["synchronize", 7]


@pytest.mark.parametrize("first", [0, 1])
def test_the_limits_of_two_models_add_up(metal: Metal, first: int) -> None:
    models = []
    for active in (2, 5):
        metal.active = active * GB
        models.append(Wiring(0))
        assert models[-1].wire(careful=False) is None
    small, large = (model.nbytes for model in models)
    assert metal.limit == small + large and abs(large - 3 * GB) < 2 * HEAP_BYTES
    models[first].close()
    assert metal.limit == (large, small)[first]
    models[1 - first].close()
    assert metal.limit == 7


@pytest.mark.parametrize(
    ("active", "careful", "reason"), [(11.5, False, "11.5 GB"), (11.8, True, "11.8 GB"), (10, False, None)]
)
def test_never_more_than_the_working_set(metal: Metal, active: float, careful: bool, reason: str | None) -> None:
    """Careful, a quarter of the memory is left, and at least 4 GiB."""
    metal.active = int(active * GB)
    model = Wiring(0)
    found = model.wire(careful)
    assert (found is None) == (reason is None) and (reason is None or (found and found.startswith(reason)))
    assert bool(metal.calls) == (reason is None)
    model.close()
    assert metal.limit == 7


@pytest.mark.parametrize(("version", "device"), [("14.7", "gpu"), ("", "gpu"), ("15.0", "cpu")])
def test_elsewhere_nothing_is_set(metal: Metal, version: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wiring.platform, "mac_ver", lambda: (version, ("", "", ""), ""))
    metal.device, metal.active = device, GB
    model = Wiring(0)
    assert model.wire(careful=False)
    model.close()
    assert metal.calls == []


def test_what_counts_as_suffering(metal: Metal) -> None:
    metal.active = 8 * GB
    model = Wiring(0)
    assert not model.suffers(SwapCounters(swapped_in=GB, swapped_out=1 << 20, compressed=GB // 2))
    assert model.suffers(SwapCounters(swapped_out=1 << 30)) and model.suffers(SwapCounters(compressed=GB))


def test_swapping_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path))
    assert not swapped_lately(tmp_path / "a")
    for number in range(kept_swaps.MOST_MODELS + 3):
        remember_swapping(tmp_path / str(number))
    remember_swapping(tmp_path / "a")
    assert swapped_lately(tmp_path / "a") and not swapped_lately(tmp_path / "0")
    now = kept_swaps.time.time()
    monkeypatch.setattr(kept_swaps.time, "time", lambda: now + kept_swaps.LIFE_S + 60)
    assert not swapped_lately(tmp_path / "a")


@pytest.mark.parametrize(
    "contents", ["", "[]", '{"a": "b"}', "[" * 100_000, '{"a": 1e999}', f'{{"a": 1{400 * "0"}}}', "x" * 100_000]
)
def test_a_damaged_file_is_ignored(contents: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path))
    (tmp_path / "swapped.json").write_text(contents)
    assert not swapped_lately(tmp_path / "a")
    remember_swapping(tmp_path / "a")
    assert swapped_lately(tmp_path / "a")


@pytest.mark.parametrize("wire", ["auto", "on", "off"])
def test_a_model_that_was_swapped_is_wired_at_its_next_load(
    wire: str, store: Path, metal: Metal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path))
    said: list[str] = []

    def loaded() -> Any:
        metal.active = GB
        return load(store, context=32, wire=wire, say=said.append)[0]

    model = loaded()
    assert metal.limit == (model.flash.wiring.nbytes if wire == "on" else 7)
    model.flash.answered(SwapCounters(swapped_out=GB))
    model.flash.close()
    assert metal.limit == 7 and (cache_folder() / "swapped.json").is_file()
    model = loaded()
    assert metal.limit == (7 if wire == "off" else model.flash.wiring.nbytes)
    model.flash.close()
    assert metal.limit == 7
    assert any("GB of memory are wired" in line for line in said) == (wire != "off")


def test_on_says_why_nothing_is_wired(store: Path) -> None:
    if wiring.why_not_wired() is None:
        pytest.skip("this machine wires memory")
    said: list[str] = []
    load(store, context=32, wire="on", say=said.append)[0].flash.close()
    assert "note: nothing is wired: only Metal wires memory" in said


def test_another_word_is_refused() -> None:
    with pytest.raises(UsageError, match="wire is 'never', expected one of auto, on, off"):
        LoadOptions(wire="never").check()
