"""The command that compares warm starts with cold ones. No test checks how fast anything is."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_bench_bits import last_line, run  # type: ignore[import-not-found]  # found beside this file

from mlx_flash.errors import UsageError
from mlx_flash.loading import store as store_module

pytestmark = pytest.mark.usefixtures("one_processor")


@pytest.mark.parametrize("slots", [20, 256])
def test_ways_to_start(
    tiny: Any, dark_night: Path, capsys: pytest.CaptureFixture[str], slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store_module.make_plan
    monkeypatch.setattr(store_module, "make_plan", lambda *rest: replace(real(*rest), slots=(slots, slots)))
    before = os.environ["MLX_FLASH_CACHE"]
    flags = ["--model", tiny.store, "--text", dark_night, "--share", 1, "--context", 64, "--rounds", 1]
    run("warm-start", *flags, "--earlier", 16, "--prompt", 12, "--tokens", 8)
    assert os.environ["MLX_FLASH_CACHE"] == before
    ways = last_line(capsys)["ways"]
    if slots == 256:
        assert list(ways) == ["unfilled", "filled"]
        assert ways["unfilled"]["fill_MB"] == 0 < ways["filled"]["fill_MB"]
        assert ways["filled"]["prompt_misses"] == ways["filled"]["misses"] == ways["filled"]["MB"] == 0
    else:
        assert list(ways) == ["cold", "scores", "behind", "warm"]
        assert ways["cold"]["fill_MB"] == ways["scores"]["fill_MB"] == 0 < ways["warm"]["fill_MB"]
        assert all(row["misses"] > 0 for row in ways.values())


def test_a_text_that_is_too_short(tiny: Any, dark_night: Path) -> None:
    with pytest.raises(UsageError, match=r"expected 4000 \(four times --prompt\)"):
        run("warm-start", "--model", tiny.store, "--text", dark_night, "--context", 64, "--prompt", 1000)
