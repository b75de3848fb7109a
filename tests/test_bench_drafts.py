"""The command that compares answers with and without drafts. No test checks how fast anything is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_bench_bits import last_line, run  # type: ignore[import-not-found]  # found beside this file

from mlx_flash.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_processor")


@pytest.mark.parametrize("kind", ["ngram", "model"])
def test_drafts_are_compared(tiny: Any, dark_night: Path, capsys: pytest.CaptureFixture[str], kind: str) -> None:
    flags = ["--model", tiny.store, "--text", dark_night, "--memory", "2GB", "--prompts", 2, "--prompt-tokens", 20]
    flags += ["--tokens", 16, "--depths", "1,3", "--rounds", 2]
    flags += ["--draft-model", tiny.checkpoint] if kind == "model" else []
    run("drafts", *flags)
    result = last_line(capsys)
    assert result["kind"] == kind and result["plan"]["drafts"] > 0
    none, *drafted = result["depths"]
    assert [row["depth"] for row in result["depths"]] == [0, 1, 3]
    assert (none["drafted"], none["tokens_per_pass"], none["same_text"]) == (0, 1.0, 2)
    for row in result["depths"]:
        assert 0 <= row["accepted"] <= row["drafted"] and row["same_text"] == 2
        assert row["seconds_per_token"] > 0 and len(row["seconds_per_token_of_rounds"]) == 2
        assert row["tokens_per_pass"] == pytest.approx(32 / (32 - row["accepted"]))
    assert kind == "ngram" or drafted[1]["accepted"] > 0
    one, two, four = result["passes"]
    assert [row["positions"] for row in result["passes"]] == [1, 2, 4]
    assert [(row["different"], row["tokens"]) for row in result["passes"]] == [(0, 32)] * 3
    assert one["units_per_pass"] < two["units_per_pass"] < four["units_per_pass"] < 4 * one["units_per_pass"]


def test_what_cannot_be_compared(tiny: Any, dark_night: Path) -> None:
    flags = ("--model", tiny.store, "--text", dark_night, "--prompts", "2", "--prompt-tokens", "20", "--tokens", "16")
    for more, message in (
        (("--depths", "1,x"), "--depths is '1,x', expected numbers separated by commas."),
        (("--depths", "8"), "--depths is 8, expected 1 to 7 for this model."),
        (("--tokens", "60"), "a prompt and its answer have 80 tokens, but the plan has 64."),
        (("--prompts", "90"), "tokens, expected 90 x 20"),
    ):
        with pytest.raises(UsageError, match=message):
            run("drafts", *flags, *more)
