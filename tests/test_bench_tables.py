"""Synthetic checkpoints with lookup tables, and the command that measures tables whose rows are read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

from mlx_flash.bench import row_reads
from mlx_flash.bench.synthetic import table_checkpoint
from mlx_flash.bench.synthetic.opt_checkpoint import copy_tokenizer
from mlx_flash.bench.synthetic.table_checkpoint import write_tables
from mlx_flash.errors import UsageError
from mlx_flash.loading import lookup_tables
from mlx_flash.loading.in_place_model import open_in_place


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables") / "checkpoint"
    write_tables(folder, "tiny", 16)
    return folder


@pytest.mark.parametrize("bits", [16, 4])
def test_the_tables_of_a_synthetic_checkpoint_are_found(
    tmp_path: Path, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookup_tables, "LEAST_BYTES", 1 << 19)
    size = write_tables(tmp_path / "model", "tiny", bits)
    tables = open_in_place(tmp_path / "model").lookup_tables
    assert len(tables) == 8 and {table.rows for table in tables} == {512 * 20 + 1 + 2 * i for i in range(8)}
    assert {sum(table.row_bytes.values()) for table in tables} == {320 if bits == 16 else 100}
    assert sum(table.nbytes for table in tables) < size < 70e6
    model, _ = load_model(tmp_path / "model")
    logits = np.array(model(mx.array([[3, 9, 400]]), cache=model.make_cache()).astype(mx.float32))
    assert np.isfinite(logits).all() and logits.std() > 0.01


def test_the_same_bytes_every_time_and_nothing_is_replaced(checkpoint: Path, tmp_path: Path) -> None:
    write_tables(tmp_path / "again", "tiny", 16)
    name = "model.safetensors"
    assert (checkpoint / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        table_checkpoint.main(argparse.Namespace(output=checkpoint, shape="tiny", bits=16))


def test_the_command_compares_rows_that_are_read_with_tables_in_memory(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parser = argparse.ArgumentParser()
    row_reads.add_arguments(parser)
    row_reads.main(parser.parse_args(["--model", str(checkpoint), "--more", "0MB", "--prompt", "20", "--tokens", "12"]))
    *printed, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    reads = result["reads"]
    assert reads["tables"] == 8 and reads["in_turn_s"] > 0 and reads["together_s"] > 0
    read, resident = result["rows"]
    assert read["reads"] > 0 and read["bytes"] > 0 and read["prompt_reads"] > 8
    assert read["digest"] == resident["digest"] and resident["budget"] is None
    assert 0 < read["peak_bytes"] < read["budget"] and read["plan"]["table_rows"] > 0
    assert any(line.startswith("in memory") for line in printed)


def test_a_checkpoint_without_tables_is_refused(tmp_path: Path) -> None:
    from mixtures import make_mixture  # type: ignore[import-not-found]  # found beside this file

    folder = make_mixture(tmp_path / "mixture", "qwen3_moe")
    copy_tokenizer(folder)
    parser = argparse.ArgumentParser()
    row_reads.add_arguments(parser)
    with pytest.raises(UsageError, match="no lookup table"):
        row_reads.main(parser.parse_args(["--model", str(folder)]))
