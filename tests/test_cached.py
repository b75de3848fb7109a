"""`mlxflash cache`: the list, superseded entries, and files that are never touched."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock

from mlx_flash import cache
from mlx_flash.cli import chat_input
from mlx_flash.cli.run import run_command
from mlx_flash.errors import ConversionError
from mlx_flash.flash.files import RECORD, is_store
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.flash.unit_sums import Ranges, RangeSums
from mlx_flash.loading import load, verification
from mlx_flash.source import cached, failures, resolve
from mlx_flash.source.cached import MATRICES, entries, in_use, remove
from mlx_flash.source.resolve import cached_store_path, find_store
from mlx_flash.source.ssd_writes import write_small

Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: Path) -> Path:
    """A cache folder. Conversions into it copy a store."""
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))

    def run(command: list[str]) -> int:
        shutil.copytree(store, command[command.index("--output") + 1])
        return 0

    monkeypatch.setattr(resolve, "run_child", run)
    return tmp_path / "cache"


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Cli:
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["cache", *arguments])
        with pytest.raises(SystemExit) as exit:
            run_command(cache.make_parser(), cache.main)
        return int(exit.value.code or 0), *capsys.readouterr()

    return run


@pytest.fixture
def source(tiny: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny.checkpoint, tmp_path / "model"))


def used(store: Path, when: float) -> None:
    os.utime(cached._note_of(store), (when, when))


def test_a_touched_small_file_does_not_make_another_store(folder: Path, source: Path) -> None:
    first = find_store(str(source))
    os.utime(source / "tokenizer_config.json", ns=(1, 1))
    (source / "._config.json").write_text("x")
    (source / "model-old.safetensors").write_text("a file that does not count")
    assert find_store(str(source)) == first
    text = (source / "tokenizer_config.json").read_text()
    (source / "tokenizer_config.json").write_text(text + " ")
    assert find_store(str(source)) != first


def test_the_older_store_of_a_source_is_superseded(folder: Path, source: Path, tmp_path: Path, cli: Cli) -> None:
    other = Path(shutil.copytree(source, tmp_path / "elsewhere" / "model"))
    said: list[str] = []
    first = find_store(str(source), said.append)
    used(first, 1e9)
    apart = find_store(str(other), said.append)
    used(apart, 1e9)
    assert not any("older stores" in text for text in said)
    (source / "extra.json").write_text("{}")
    second = find_store(str(source), said.append)
    assert "older stores" in said[-1] and "`mlxflash cache`" in said[-1]
    by_name = {entry.name: entry for entry in entries(folder)}
    assert {name: entry.superseded for name, entry in by_name.items()} == {
        first.name: True, second.name: False, apart.name: False
    }  # fmt: skip
    assert by_name[first.name].source == str(source) and by_name[apart.name].source == str(other)
    assert by_name[first.name].used == 1e9 and by_name[first.name].nbytes > 100_000

    code, out, err = cli()
    assert code == 0 and err == "" and len(out.splitlines()) == 4
    assert next(line for line in out.splitlines() if "superseded" in line).startswith(first.name)
    code, out, err = cli("--superseded")
    assert code == 2 and "Add --yes" in err and is_store(first)
    code, out, err = cli("--superseded", "--yes")
    assert code == 0 and f"removed {first.name}" in out and not first.exists() and is_store(second) and is_store(apart)
    assert cli("--superseded", "--yes") == (0, "nothing to remove\n", "")


def test_what_is_used_again_is_not_superseded(folder: Path, source: Path) -> None:
    first = find_store(str(source))
    text = (source / "tokenizer_config.json").read_text()
    (source / "tokenizer_config.json").write_text(text + " ")
    second = find_store(str(source))
    for store in (first, second):
        used(store, 1e9)
    (source / "tokenizer_config.json").write_text(text)
    assert find_store(str(source)) == first
    assert [entry.name for entry in entries(folder) if entry.superseded] == [second.name]


def test_what_runs_or_is_being_made_stays(folder: Path, source: Path, open_model: Any, cli: Cli) -> None:
    store = find_store(str(source))
    model = open_model(store)
    code, _, err = cli("--all", "--yes")
    assert code == 1 and err == f"{store.name} is in use and was not removed\n" and is_store(store)
    model.flash.close()
    for lock in (f".{store.name}.lock", f"{store.name}.lock"):
        with FileLock(folder / lock):
            assert cli("--remove", store.name, "--yes")[0] == 1 and is_store(store)
    code = cli("--remove", store.name, "--yes")[0]
    assert code == 0 and not store.exists() and list(folder.iterdir()) == []


def test_what_is_not_ours_is_neither_listed_nor_touched(folder: Path, source: Path, tmp_path: Path, cli: Cli) -> None:
    store = find_store(str(source))
    partial = folder / f"model-{'0' * 12}.partial"
    partial.mkdir()
    (partial / RECORD).write_text('{"mlx_flash": "0.1.0"}')
    (folder / "chat-history").write_text("hello\n")
    (folder / f"theirs-{'1' * 12}").mkdir()
    (folder / f"theirs-{'1' * 12}" / "manifest.json").write_text("{}")
    (folder / f"theirs-{'2' * 12}.partial").mkdir()
    (folder / "notes.txt").write_text("x")
    outside = Path(shutil.copytree(store, tmp_path / f"outside-{'3' * 12}"))
    (folder / outside.name).symlink_to(outside)
    kinds = {entry.name: entry.kind for entry in entries(folder)}
    assert kinds == {store.name: "store", partial.name: "partial conversion", "chat-history": "chat history"}
    assert cli("--remove", "notes.txt", "--yes")[0] == 2
    assert cli("--all", "--yes")[0] == 0
    assert entries(folder) == [] and is_store(outside)
    left = {path.name for path in folder.iterdir()}
    assert left == {f"theirs-{'1' * 12}", f"theirs-{'2' * 12}.partial", "notes.txt", outside.name}


def test_sums_and_error_reports_are_listed_and_removed(folder: Path, source: Path, cli: Cli) -> None:
    """The files are written by the functions that `--verify` and a failing command use."""
    weights = source / "model.safetensors"
    with UnitFile(weights) as file:
        sums = RangeSums(Ranges.of_units(np.array([0]), np.array([8])), np.array([5], np.uint32))
        verification._keep(weights, file.identity, sums, "0" * 64)
    assert failures._write_report(ValueError("x")) == folder / "last-error.txt"
    (kept,) = (folder / "sums").iterdir()
    (folder / "sums" / f"{kept.name}.123.partial").write_bytes(b"of a run that was killed")
    (folder / "sums" / "notes.txt").write_text("not ours")
    found = {entry.name: (entry.kind, entry.nbytes > 0) for entry in entries(folder)}
    assert found.pop("ssd-writes.json") == ("bytes written per day", True)
    assert found == {"sums": ("block sums", True), "last-error.txt": ("error report", True)}
    _, out, _ = cli()
    assert "block sums" in out and "error report" in out
    assert cli("--all", "--yes")[0] == 0
    assert [path.name for path in folder.rglob("*") if path.is_file()] == ["notes.txt"]
    assert entries(folder) == []
    (folder / "last-error.txt").write_text("somebody's own")
    assert entries(folder) == []


def test_what_an_interrupted_write_left_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files get the names that `write_small` gives, and are neither renamed nor removed, as after a kill."""
    monkeypatch.setattr(Path, "replace", lambda *_: None)
    monkeypatch.setattr(Path, "unlink", lambda *_, **__: None)
    model = f"model-{'0' * 12}"
    for name in ("disk-rates.json", "plans.json", "swapped.json", f"uses/{model}.uses", f"trials/{model}.json"):
        write_small(folder / name, "x")
    monkeypatch.undo()
    monkeypatch.setenv("MLX_FLASH_CACHE", str(folder))
    assert len(list(folder.rglob("*.partial"))) == 5
    for entry in entries(folder):
        assert remove(entry)
    assert list(folder.iterdir()) == []


def test_what_an_interrupted_removal_left_is_removed(folder: Path, source: Path, cli: Cli) -> None:
    store = find_store(str(source))
    for end in ("removed", "replaced"):
        shutil.copytree(store, folder / f".{store.name}.{end}")
    remains = {entry.name for entry in entries(folder) if entry.kind == "remains"}
    assert remains == {f".{store.name}.removed", f".{store.name}.replaced"}
    with FileLock(folder / f"{store.name}.lock"):  # the lock of a conversion between two renames
        assert cli("--remove", *remains, "--yes")[0] == 1 and len(entries(folder)) == 3
    assert cli("--remove", store.name, "--yes")[0] == 0, "though an earlier removal of this name was interrupted"
    assert [entry.name for entry in entries(folder)] == [f".{store.name}.replaced"]
    assert cli("--all", "--yes")[0] == 0 and list(folder.iterdir()) == []


def test_a_benchmarks_matrices_are_listed_and_stay_while_it_runs(folder: Path, source: Path, cli: Cli) -> None:
    folder.mkdir()
    left = folder / f"{MATRICES}abc"
    left.mkdir()
    (left / "matrices.bin").write_bytes(b"x" * 5000)
    assert [(entry.kind, entry.nbytes > 5000) for entry in entries(folder)] == [("benchmark's matrices", True)]
    with in_use(left):
        assert cli("--all", "--yes")[0] == 1 and left.exists()
    assert cli("--all", "--yes")[0] == 0 and not left.exists()


@pytest.mark.parametrize(("answer", "removed"), [("y", True), ("YES", True), ("", False), ("n", False), (None, False)])
def test_the_question(
    folder: Path, source: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch, answer: str | None, removed: bool
) -> None:
    store = find_store(str(source))

    def reply(prompt: str) -> str:
        if answer is None:
            raise EOFError
        return answer

    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", reply)
    code, out, _ = cli("--all")
    assert store.name in out and store.exists() is not removed and code == (0 if removed else 1)


def test_a_cache_folder_that_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli, source: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    monkeypatch.setenv("MLX_FLASH_CACHE", str(path))
    for arguments in ((), ("--all", "--yes")):
        code, out, err = cli(*arguments)
        assert (code, out) == (2, "") and err.endswith(f"folder {path} is a file. Set MLX_FLASH_CACHE to a folder.\n")
    with pytest.raises(ConversionError, match=rf"cannot write to the cache folder {path}: File exists\. Set"):
        find_store(str(source))


@pytest.mark.parametrize("chosen", ["~no-such-user/cache", None])
def test_no_home_folder(
    monkeypatch: pytest.MonkeyPatch, cli: Cli, chosen: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    """A container whose user is only a number has no home folder."""
    for name in ("MLX_FLASH_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    if chosen is not None:
        monkeypatch.setenv("MLX_FLASH_CACHE", chosen)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # os.path.expanduser does this without a home folder
    code, _, errors = cli()
    assert code == 2 and errors.endswith("Set MLX_FLASH_CACHE to the full path of a folder.\n"), errors
    assert chat_input.history_file() == Path(os.devnull)
    assert "traceback is above" in failures.sentence(KeyError("x")) and "KeyError" in capsys.readouterr().err


def test_what_cannot_be_removed_is_named_and_the_rest_is_removed(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli
) -> None:
    folder.mkdir()
    (folder / "chat-history").write_text("hello\n")
    failures._write_report(ValueError("x"))
    real = cached.remove

    def refuse(entry: cached.Entry) -> bool:
        if entry.kind == "chat history":
            raise OSError(30, "Read-only file system", str(entry.path))
        return real(entry)

    monkeypatch.setattr(cached, "remove", refuse)
    code, out, err = cli("--all", "--yes")
    assert (code, err) == (1, "chat-history cannot be removed: Read-only file system\n") and "last-error.txt" in out


def test_a_folder_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Cli) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "none"))
    assert cli() == (0, f"{tmp_path / 'none'}: 0.00 GB\n", "")


def test_a_cache_that_cannot_be_written_to_still_runs(folder: Path, source: Path, monkeypatch: Any) -> None:
    store = find_store(str(source))

    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "utime", refuse)
    cached._note_of(store).unlink()
    monkeypatch.setattr(Path, "write_text", refuse)
    assert find_store(str(source)) == store and cached_store_path(source, str(source))[0] == store
    assert load.is_store(store)
