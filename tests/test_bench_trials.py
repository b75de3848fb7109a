"""The benchmark of trials, on a few tokens of its small model."""

from __future__ import annotations

import platform
from typing import Any

import pytest

from mlx_flash.bench import trial_choices


@pytest.mark.skipif(platform.system() != "Linux", reason="reads are paced by a library that Linux preloads")
def test_every_choice_has_a_row(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", "unused")
    monkeypatch.setattr(trial_choices, "MOST_TOKENS", 40)
    found: dict[str, Any] = trial_choices.work("fast", tokens=1, rounds=1)
    assert [len(rows) for rows in found["options"].values()] == [2, 2, 1, 3, 3]
    assert found["trial_tokens"] == 40 and found["bytes_per_token"] > 0
    for name, rows in found["options"].items():
        assert sum(row["chosen"] for row in rows) == 1 and rows[0]["ratio"] == 1
        assert sum("chosen: " in row["verdict"] for row in rows) == (name != "io")  # the user chose that
    trial_choices.show({"setting": "fast", "about": "a disk", **found})
    assert capsys.readouterr().out.count("chosen: ") == 4
