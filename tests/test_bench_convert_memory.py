"""The measurement of a conversion's memory: the checkpoint that it makes, and the bytes that it counts."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mixtures import make_mixture  # type: ignore[import-not-found]
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash.bench import convert_memory
from mlx_flash.bench.synthetic import opt_checkpoint
from mlx_flash.convert.checkpoint import Checkpoint
from mlx_flash.errors import FlashError, UsageError


def weights_of(folder: Path) -> dict[str, mx.array]:
    checkpoint = Checkpoint(folder)
    return {name: checkpoint.load(name) for name in checkpoint.tensors}


def test_shards_hold_what_a_single_file_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opt_checkpoint, "VOCABULARY", 512)
    monkeypatch.setattr(opt_checkpoint, "POSITIONS", 64)
    monkeypatch.setitem(opt_checkpoint.SHAPES, "125m", (32, 12, 4))
    for shards in (1, 3):
        (tmp_path / str(shards)).mkdir()
        opt_checkpoint.write_checkpoint(tmp_path / str(shards), "125m", "float16", 0, 2, shards)
    one, three = (Checkpoint(tmp_path / name) for name in ("1", "3"))
    assert [path.name for path in three.shards] == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert json.loads((tmp_path / "3" / "config.json").read_text())["num_hidden_layers"] == 2
    a, b = weights_of(tmp_path / "1"), weights_of(tmp_path / "3")
    assert a.keys() == b.keys() and all(mx.array_equal(a[name], b[name]).item() for name in a)
    sizes = [path.stat().st_size for path in three.shards]
    assert max(sizes) < 0.6 * one.shards[0].stat().st_size


def test_a_layer_s_bytes(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny", hidden=64, neurons=256, layers=3, dtype=mx.float16)
    parameters = 2 * 64 * 256 + 256 + 64 + 4 * (64 * 64 + 64) + 4 * 64
    assert convert_memory.largest_layer_bytes(Checkpoint(folder)) == 2 * parameters


@pytest.mark.parametrize("code", [0, -9])
def test_what_it_reports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: int
) -> None:
    """Uses a real conversion, but no real cgroup, because that needs root."""

    class Group:
        def run(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
            done = subprocess.run([*command, "--calibration-tokens", "64"], env=environment, capture_output=True)
            assert done.returncode == 0, done.stderr
            return subprocess.CompletedProcess(command, code)

        def peak_bytes(self) -> int:
            return 123

        def kills(self) -> int:
            return int(code != 0)

    limits = []

    @contextlib.contextmanager
    def group(limit: int) -> Iterator[Any]:
        limits.append(limit)
        yield Group()

    monkeypatch.setattr(convert_memory, "memory_group", group)
    monkeypatch.setattr(convert_memory, "ALLOWANCE_BYTES", 1000)
    folder = make_checkpoint(tmp_path / "tiny", neurons=128)
    parser = argparse.ArgumentParser()
    convert_memory.add_arguments(parser)
    arguments = parser.parse_args(["--model", str(folder), "--output", str(tmp_path / "work")])
    if code:
        with pytest.raises(FlashError, match="was killed, or failed"):
            convert_memory.main(arguments)
    else:
        convert_memory.main(arguments)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert limits == [result["limit_bytes"]] == [result["layer_bytes"] + 1000]
    assert result["checkpoint_bytes"] == (folder / "model.safetensors").stat().st_size
    assert (result["exit"], result["kills"], result["cgroup_peak_bytes"]) == (code, int(code != 0), 123)
    assert result["store_bytes"] > 0 and result["peak_rss_bytes"] > 50e6 and result["seconds"] > 0
    assert 0 < result["highest_disk_bytes"] < 2 * result["store_bytes"]
    assert not (tmp_path / "work").exists()


def test_a_checkpoint_within_the_limit_shows_nothing(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "tiny")
    arguments = argparse.Namespace(model=folder, output=tmp_path / "work", limit=None, shape="6.7b", bits=16)
    with pytest.raises(UsageError, match="fits within the limit"):
        convert_memory.main(arguments)
    assert not (tmp_path / "work").exists()
    arguments.model = make_mixture(tmp_path / "mixture", "mixtral")
    with pytest.raises(UsageError, match=r"fits within the limit of 0\.50 GB"):
        convert_memory.main(arguments)
    arguments.output = tmp_path
    with pytest.raises(UsageError, match="exists already"):
        convert_memory.main(arguments)
