"""The benchmark of streamed layers, on a tiny random Llama."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_flash.bench import __main__ as bench
from mlx_flash.bench.synthetic.dense_checkpoint import write_dense
from mlx_flash.bench.synthetic.mixture_checkpoint import SHAPES, write_mixture
from mlx_flash.errors import UsageError


def run(*arguments: str) -> None:
    parsed = bench.make_parser().parse_args(list(arguments))
    parsed.run(parsed)


def test_a_row_for_each_way(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    write_dense(tmp_path / "model", "tiny", 6, "4bit", 0)
    run("layers", "--model", str(tmp_path / "model"), "--shares", "0", "--tokens", "6", "--context", "64")
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    reference, flash = told["rows"]
    assert (reference["runtime"], flash["runtime"]) == ("mlx-lm", "mlx_flash")
    assert flash["tokens"] == reference["tokens"] and flash["same_text"] is True
    assert flash["plan"] <= flash["budget"]
    assert flash["bytes"] > 0 or flash["pinned"] == 6


def test_the_forecast_of_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = replace(SHAPES["tiny"], hidden=512, neurons=256)
    write_mixture(tmp_path / "mixture", shape, 4, mx.float32, 0)
    arguments = ["--shares", "0.2", "--tokens", "6", "--context", "64", "--no-reference"]
    run("layers", "--model", str(tmp_path / "mixture"), *arguments)
    *_, summary, last = capsys.readouterr().out.splitlines()
    (row,) = json.loads(last)["rows"]
    forecast = row["forecast"]
    assert forecast["even"] is True and 0 < forecast["compute_s"] < forecast["token_s"]
    assert row["first_token_s"] > 0 and forecast["first_token_s"] > forecast["token_s"]
    assert row["error"] == forecast["tokens_per_second"] / row["tokens_per_second"] - 1
    assert summary.startswith("forecast: 1 runs, errors up to ")


def test_a_store_is_refused(speaker: Path) -> None:
    with pytest.raises(UsageError, match="is not a checkpoint that is run as it is"):
        run("layers", "--model", str(speaker), "--tokens", "6")


def test_a_folder_with_files_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "here").write_text("")
    with pytest.raises(UsageError, match="exists already"):
        run("synthetic-dense", "--shape", "tiny", "--output", str(tmp_path))
