"""What `bench pressure` makes of its logs. The runs themselves need a memory cgroup and root."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest

from mlx_flash.bench import under_pressure
from mlx_flash.errors import FlashError


def logged(at: float, token: int, slots: int, given: int = 0) -> dict[str, Any]:
    sizes = {"slots_bytes": slots * 10**6, "rss_bytes": (slots + 100) * 10**6, "given_back": given * 10**6}
    return {"at": at, "seconds": 0.1, "token": token, "taken_again": 0, "hits": 3, "misses": 1, **sizes}


LOG = [logged(1, 5, 800), logged(2, 6, 800), logged(5, 7, 300, 500), logged(8, 8, 300, 500), logged(20, 9, 400, 500)]


def test_tokens_are_divided_by_what_the_other_program_does() -> None:
    row = {"exits": [0, 0], "look_s": 0.001, **under_pressure.figures_of(LOG, [3.0, 6.0, 10.0])}
    assert {kind: phase["tokens"] for kind, phase in row["phases"].items()} == {
        **{"before": 2, "while it allocates": 1, "while it holds": 1, "after": 1}
    }
    assert row["least_slots_bytes"] == 300 * 10**6 and row["peak_rss_bytes"] == 900 * 10**6
    text = under_pressure.line("with giving", row)
    assert "the model lives, the other program lives" in text and "given 500 MB" in text and "75.0% hits" in text


def test_a_run_that_was_killed_has_what_it_had_until_then() -> None:
    row = {"exits": [-9, 0], "look_s": None, **under_pressure.figures_of(LOG[:2], [1.5])}
    assert list(row["phases"]) == ["before", "while it allocates"]
    assert "the model dies (-9), the other program lives" in under_pressure.line("without giving", row)
    nothing = {"exits": [-9], "look_s": None, **under_pressure.figures_of([], [])}
    assert under_pressure.line("alone", nothing) == "alone: the model dies (-9)"


@pytest.mark.parametrize("same", [True, False])
def test_other_tokens_are_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], same: bool
) -> None:
    def run(arguments: Any, other: bool, gives: bool) -> dict[str, Any]:
        log = LOG[:2] if other and not gives else [*LOG[:4], logged(20, 9 if same else gives, 400)]
        return {"exits": [0], "kills": 0, "look_s": 0.001, **under_pressure.figures_of(log, [])}

    monkeypatch.setattr(under_pressure, "run", run)
    parser = argparse.ArgumentParser()
    under_pressure.add_arguments(parser)
    arguments = parser.parse_args(["--model", str(Path("m")), "--memory", "1GB"])
    if same:
        under_pressure.main(arguments)
    else:
        with pytest.raises(FlashError, match="changed the text"):
            under_pressure.main(arguments)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["same"] == same and list(result["rows"]) == list(under_pressure.RUNS)
