"""The campaign's table for a worker that injects nothing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent))

import campaign  # type: ignore[import-not-found]  # found beside this file


def results(*found: str) -> list[dict[str, Any]]:
    """A worker's results of its runs. "" is a run whose fault hit nothing."""
    return [{"kind": "eio", "injected": bool(each), "result": each, "detail": "told"} for each in found]


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the campaign for a job with these results. Returns (exit code, its row by column, the JSON)."""

    def run(said: list[dict[str, Any]]) -> tuple[int, dict[str, str], dict[str, Any]]:
        lines = "".join(json.dumps(each) + "\n" for each in said)
        (tmp_path / "worker.py").write_text(f"print({lines!r}, end='')")
        monkeypatch.setattr(campaign, "__file__", str(tmp_path / "campaign.py"))
        monkeypatch.setattr(campaign, "environment", lambda **_: {})
        monkeypatch.setattr(sys, "argv", ["campaign.py", "decode"])
        code = campaign.main()
        head, row, last = capsys.readouterr().out.splitlines()
        return code, dict(zip(head.split(), row.split(), strict=True)), json.loads(last)

    return run


def test_the_faults_that_were_injected_are_counted(rows: Any) -> None:
    code, row, last = rows(results("right", "right", "clear", ""))
    assert (code, row) == (
        0,
        {"job": "decode", "faults": "3", "right": "2", "clear": "1"} | dict.fromkeys(campaign.BAD, "0"),
    )
    assert last["jobs"] == {"decode": {"injected": 3, "right": 2, "clear": 1}}


@pytest.mark.parametrize("result", campaign.BAD)
def test_what_went_badly_is_counted_and_is_the_exit_code(rows: Any, result: str) -> None:
    code, row, last = rows(results("right", result, result))
    assert (code, row["faults"], row["right"], row[result]) == (1, "3", "1", "2")
    assert last["jobs"]["decode"][result] == 2
