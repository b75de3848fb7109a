"""Whatever is written to a full disk either refuses beforehand or goes on without. Conversions and downloads have tests
of their own (test_convert.py, test_hub.py)."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from kept_conversations import ask, fake, kept, prompt  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.cli.history import History
from mlx_flash.cli.saved_chat import write_chat
from mlx_flash.errors import FlashError
from mlx_flash.loading.options import LoadOptions
from mlx_flash.machine.kept_rates import Rate, keep_rates, kept_rates
from mlx_flash.server.model_plans import ModelPlans
from mlx_flash.source import failures
from mlx_flash.source.ssd_writes import DOWNLOADS, count_written, written_bytes
from mlx_flash.text.conversation import Turn


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A disk of its own without a free byte, where the cache folder is."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a small disk")
    try:
        with contextlib.suppress(OSError), (folder / "filler").open("wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        monkeypatch.setenv("MLX_FLASH_CACHE", str(folder / "cache"))
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def files(disk: Path) -> list[str]:
    """The files with contents, without the filler and the record of kept conversations, which is always as long."""
    found = [path for path in disk.rglob("*") if path.is_file() and path.stat().st_size]
    return sorted(path.name for path in found if path.name not in ("filler", "written"))


def test_what_can_be_made_again_is_not_kept(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keep_rates({"one": Rate(1e9, 0.25)})
    assert kept_rates() == {}
    ModelPlans(LoadOptions)._write()
    count_written(DOWNLOADS, 5)
    assert written_bytes()["today"] == {}
    History(disk / "cache" / "chat-history").add("a question")
    assert failures._write_report(ValueError("x")) is None
    assert "ValueError: x" in capsys.readouterr().err, "the traceback is shown instead"
    assert files(disk) == []


def test_a_conversation_is_not_kept_and_the_answer_is_the_same(disk: Path, tmp_path: Path, endless: Any) -> None:
    first, second = prompt(1, 40), prompt(2, 40)
    answers: list[Any] = []
    for root in (tmp_path / "elsewhere", disk):
        notes: list[str] = []
        turns = kept(root, fake("trims"), notes)
        answers.append([ask(turns, endless, ids) for ids in (first, second, first)])
        turns.close()
        assert len(notes) == (root == disk)
    assert answers[0] == answers[1] and "cannot keep conversations: No space left on device" in notes[0]
    assert files(disk) == []


def test_a_saved_chat_is_whole_or_not_there(disk: Path) -> None:
    (disk / "chat.json").touch()
    with pytest.raises(OSError, match="No space left"):
        write_chat(disk / "chat.json", None, [Turn("question", "answer" * 1000, [])], "model")
    assert files(disk) == [] and sorted(os.listdir(disk)) == ["chat.json", "filler"]


def test_a_model_is_loaded_without_its_checksums_kept(disk: Path, tmp_path: Path) -> None:
    folder, said = make_mixture(tmp_path / "model", "qwen3_moe"), list[str]()
    write_tokenizer(folder)
    for _ in range(2):
        model, _ = mlx_flash.load(folder, context=64, verify=True, say=said.append)
        model.flash.close()
    assert sum("checksums of model.safetensors cannot be kept" in text for text in said) == 2
    assert files(disk) == []


def test_a_full_temporary_folder_is_named(disk: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(disk))
    monkeypatch.setattr("tempfile.tempdir", str(disk))
    with pytest.raises(FlashError, match=r"temporary folder: No space left on device\. Make room there"):
        mlx_flash.plan(store)
    assert files(disk) == []


def test_generate_runs_with_a_full_cache_folder_and_a_full_log(disk: Path, store: Path) -> None:
    command = [sys.executable, "-m", "mlx_flash.generate", "--model", str(store), "--prompt", "abc", "-m", "3"]
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*command, "--ignore-chat-template"], stdout=subprocess.PIPE, stderr=full, timeout=600)
    assert done.returncode == 0 and done.stdout and files(disk) == []
