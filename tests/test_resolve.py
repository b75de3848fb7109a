"""From --model to a store: stores that are found, checkpoints that are converted, and the sentences of refusals."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Tiny  # type: ignore[import-not-found]

from mlx_flash.errors import ConversionError, UsageError
from mlx_flash.flash.files import is_store
from mlx_flash.source import cached, resolve
from mlx_flash.source.resolve import find_checkpoint, find_store


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("MLX_FLASH_CACHE", str(folder))
    return folder


@pytest.fixture
def no_conversion(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(_: list[str]) -> int:
        raise AssertionError("a conversion was started")

    monkeypatch.setattr(resolve, "run_child", run)


def fake_conversion(monkeypatch: pytest.MonkeyPatch, store: Path, code: int = 0) -> list[list[str]]:
    """Makes conversions copy `store`, or fail with `code`. Returns the list of their command lines, which grows."""
    commands: list[list[str]] = []

    def run(command: list[str]) -> int:
        commands.append(command)
        if code == 0:
            shutil.copytree(store, command[command.index("--output") + 1])
        return code

    monkeypatch.setattr(resolve, "run_child", run)
    return commands


@pytest.mark.usefixtures("no_conversion")
def test_a_store_is_taken_as_it_is(store: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_store(str(store)) == store
    monkeypatch.chdir(store.parent)
    assert find_store("store") == Path("store")
    assert not cache.exists()


def test_two_processes_convert_a_checkpoint_once(tiny: Tiny, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = (
        "import sys; from mlx_flash.source.resolve import find_store\n"
        "print(find_store(sys.argv[1], lambda text: print(text.split()[0])))"
    )
    command = [sys.executable, "-c", program, str(tiny.checkpoint)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = [process.communicate(timeout=600) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    said = sorted(output.splitlines()[0] for output, _ in outputs)
    assert said == ["converting", "waiting"]
    found = {output.splitlines()[-1] for output, _ in outputs}
    assert len(found) == 1 and is_store(target := Path(found.pop())) and target.parent == cache

    fake_conversion(monkeypatch, tiny.store, code=1)
    assert find_store(str(tiny.checkpoint)) == target  # it is not converted again


def test_a_changed_checkpoint_is_converted_again(
    tiny: Tiny, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = Path(shutil.copytree(tiny.checkpoint, tmp_path / "model"))
    (source / "tokenizer.json").unlink()
    commands = fake_conversion(monkeypatch, tiny.store)
    first = find_store(str(source))
    assert find_store(str(source)) == first and first.name.startswith("model-") and len(commands) == 1
    shutil.copy(tiny.checkpoint / "tokenizer.json", source)
    second = find_store(str(source))
    assert second != first and len(commands) == 2
    os.utime(source / "model.safetensors", ns=(0, 0))
    assert find_store(str(source)) not in (first, second) and len(commands) == 3
    assert commands[0][1:4] == ["-m", "mlx_flash.convert", "--model"]


def test_a_failed_conversion_can_be_tried_again(tiny: Tiny, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_conversion(monkeypatch, tiny.store, code=1)
    with pytest.raises(ConversionError, match="could not be converted"):
        find_store(str(tiny.checkpoint))
    held = None
    try:
        find_store(str(tiny.checkpoint))
    except ConversionError as error:
        held = error  # with its traceback, as an interactive session keeps it
    commands = fake_conversion(monkeypatch, tiny.store)
    said: list[str] = []
    assert is_store(find_store(str(tiny.checkpoint), said.append))
    assert held is not None and len(commands) == 1 and not any("waiting" in text for text in said)


@pytest.mark.skipif(os.geteuid() == 0 and sys.platform == "darwin", reason="needs a folder that cannot be made")
def test_a_cache_folder_that_cannot_be_made(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(ConversionError, match=r"cannot write to the cache folder .*MLX_FLASH_CACHE"):
        find_store(str(tiny.checkpoint))


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", "~/x")
    assert cached.cache_folder() == Path.home() / "x"
    monkeypatch.delenv("MLX_FLASH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "platform", "linux")
    assert cached.cache_folder() == tmp_path / "mlx_flash"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cached.cache_folder() == Path.home() / "Library" / "Caches" / "mlx_flash"


@pytest.mark.parametrize(
    "name", ["nothing", "./nothing", "/no/thing", "a/b/c", "~/no-such-folder", "a b/c d", "x/", ""]
)
def test_what_is_neither_a_folder_nor_an_id(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"is neither a folder|holds neither|is empty") as caught:
        find_store(name)
    assert caught.value.exit_code == 2


def test_folders_and_files_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"holds neither a store .* nor a checkpoint"):
        find_store(str(tmp_path))
    (tmp_path / "tiny.Q4_K_M.gguf").write_text("")
    for found in (tmp_path, tmp_path / "tiny.Q4_K_M.gguf"):
        with pytest.raises(UsageError, match=r"GGUF files cannot be read"):
            find_store(str(found))
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="is a file; expected the folder"):
        find_store(str(tmp_path / "file"))


def test_a_revision_is_a_repository_s(tiny: Tiny, store: Path) -> None:
    for folder in (tiny.checkpoint, store):
        with pytest.raises(UsageError, match="is a folder; only a Hugging Face repository has a revision"):
            find_store(str(folder), revision="main")
    with pytest.raises(UsageError, match="is a folder; only a Hugging Face repository has a revision"):
        find_checkpoint(str(tiny.checkpoint), "main")
    with pytest.raises(UsageError, match="a revision was given without a repository"):
        find_store(None, revision="main")
