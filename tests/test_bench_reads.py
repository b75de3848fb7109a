"""The `reads` benchmark runs and prints what it promises. No test checks how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from mlx_flash.bench import reads
from mlx_flash.bench.__main__ import make_parser
from mlx_flash.bench.tools import read_methods
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.unit_file import UnitFile

KIB = 1 << 10


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "file.bin"
    path.write_bytes(np.random.default_rng(0).bytes(256 * KIB))
    return path


def run(*flags: str | Path) -> None:
    arguments = make_parser().parse_args(["reads", "--seconds", "0.001", "--rounds", "1", *map(str, flags)])
    arguments.run(arguments)


def test_a_tiny_file_gives_every_promised_field(
    path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(read_methods, "find_fio", lambda: None)
    run("--file", path, "--pieces-kib", "16,4", "--threads", "2,1", "--output", tmp_path / "out")
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result == json.loads((tmp_path / "out" / "reads.json").read_text())
    assert (tmp_path / "out" / "reads.png").read_bytes().startswith(b"\x89PNG")
    assert result["command"] == "reads" and result["ceiling"] == "best measured"
    assert result["cache"] in ("re-read", "warm", "unknown") and result["best_threads"] in (1, 2)
    assert [(row["piece_bytes"], row["threads"]) for row in result["rows"]] == [
        (4 * KIB, 1),
        (16 * KIB, 1),
        (4 * KIB, 2),
        (16 * KIB, 2),
    ]
    for row in result["rows"]:
        assert set(row["methods"]) == set(reads.METHODS) - {"fio"}
        for name, one in row["methods"].items():
            assert 0 < one["ratio"] <= 1 and one["slowest"] <= one["bytes_per_second"] <= one["fastest"]
            assert (one["batch_ms"] is not None) == (name in ("drained", "busy"))
    assert result["environment"]["disk"]["free_bytes"] > 0


def test_its_own_file_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    seen = []

    def measure(file: UnitFile, fio: str | None, arguments: object) -> list[reads.ReadRow]:
        seen.append((file.path, file.size))
        row = reads.ReadRow(4 * KIB, 1)
        row.samples = {name: [read_methods.ReadRate(8, 1.0, 1)] for name in reads.METHODS}
        return [row]

    monkeypatch.setattr(reads, "measure", measure)
    run("--size", "100KB", "--pieces-kib", "4", "--folder", tmp_path, "--output", tmp_path / "out")
    [(made, size)] = seen
    assert size == 100_000 and made.parent == tmp_path and not made.exists()
    with pytest.raises(UsageError, match="do not fit"):
        run("--size", "1000000GB", "--folder", tmp_path)
    with pytest.raises(UsageError, match="is not a folder"):
        run("--folder", tmp_path / "missing")


@pytest.mark.parametrize(
    "flags",
    [
        ["--pieces-kib", "16,x"],
        ["--threads", "0"],
        ["--rounds", "0"],
        ["--seconds", "0"],
        ["--seconds", "soon"],
        ["--size"],
    ],
)
def test_wrong_flags_exit_with_2(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        run(*flags)
    assert exit.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_what_does_not_go_together_exits_with_2(path: Path) -> None:
    pytest.importorskip("matplotlib")
    for flags in (["--pieces-kib", "6"], ["--pieces-kib", "4096", "--no-fio", "--file", str(path)]):
        with pytest.raises(UsageError) as error:
            run(*flags)
        assert error.value.exit_code == 2


def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    os.mkfifo(tmp_path / "pipe")
    for name in ("pipe", "missing", "."):
        with pytest.raises(UsageError, match="not a regular file"):
            run("--file", tmp_path / name, "--no-fio")


def test_without_matplotlib_it_says_so_at_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match="matplotlib"):
        run("--file", path)


def test_pieces_land_where_they_are_meant_to(path: Path) -> None:
    contents = path.read_bytes()
    with UnitFile(path) as file, Reader(2) as reader:
        pieces = read_methods.Pieces(file, 4 * KIB, 0)
        reader.wait(pieces.submit(reader))
        for i in range(pieces.reads):
            offset = int(pieces.offsets[i])
            assert pieces.place(i) == contents[offset : offset + 4 * KIB]
        pieces.use_slots(2)
        assert {pieces.place(i).nbytes for i in range(4)} == {4 * KIB}


def test_fio_is_read_and_its_failure_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = {"error": 0, "usr_cpu": 1.0, "sys_cpu": 3.0, "read": {"runtime": 500, "io_bytes": 8192, "total_ios": 2}}
    said = ["note: something\n" + json.dumps({"jobs": [job]}), "fio: no such file"]
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, 0, said.pop(0), ""))
    sample = read_methods.run_fio("fio", path, True, 4 * KIB, 4, 0.5)
    assert (sample.bytes_per_second, sample.reads) == (16384, 2)
    assert sample.cpu_seconds == pytest.approx(0.08)
    with pytest.raises(FlashError, match="no such file"):
        read_methods.run_fio("fio", path, True, 4 * KIB, 4, 0.5)


def test_the_cache_is_called_what_it_is_known_to_be() -> None:
    assert reads.cache_state(True, 0.0) == "re-read"
    assert reads.cache_state(True, None) == "unknown"
    assert reads.cache_state(False, 1.0) == "warm"
    assert reads.cache_state(False, 0.3) == "unknown"
