"""The folder of contexts on the disk: its bounds, failures of the disk, keys, and what the cache command shows."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from kept_conversations import MANY, NAME, ask, fake, kept, names, prompt  # type: ignore[import-not-found]

from mlx_flash.loading.conversation_key import conversation_files, conversation_key
from mlx_flash.loading.load import load
from mlx_flash.source import conversation_folder
from mlx_flash.source.cached import entries, remove
from mlx_flash.source.conversation_folder import ConversationFolder, NoRoomError
from mlx_flash.text import conversation_files as files_module


@pytest.fixture
def notes() -> list[str]:
    return []


# -- the bounds ------------------------------------------------------------------------------------------------------


def write(folder: ConversationFolder, number: int, nbytes: int) -> str:
    name = f"{number:032x}.safetensors"
    descriptor, _ = folder.begin(name, nbytes)
    folder.finish(name, descriptor)
    return name


def test_the_least_recently_used_of_all_models_goes_first(tmp_path: Path) -> None:
    root = tmp_path / "conversations"
    one, two = (ConversationFolder(root, f"{name}-0123456789ab", {}, 1000) for name in ("one", "two"))
    first, second, third = write(one, 1, 400), write(two, 2, 300), write(one, 3, 300)
    for age, (folder, name) in enumerate([(one, third), (two, second), (one, first)]):
        os.utime(root / folder.name / name, (1e9 - age, 1e9 - age))
    one.used_now(first)
    write(two, 4, 300)
    assert {file.name for file in one.files()} == {first, third} and not (root / two.name / second).exists()
    with pytest.raises(NoRoomError):
        write(one, 5, 1001)
    write(two, 6, 1000)
    assert not (root / one.name).exists() and len(two.files()) == 1 and two.state().used_bytes == 1000


def test_bytes_per_day(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    day = [20000]
    monkeypatch.setattr(conversation_folder, "MOST_BYTES_PER_DAY", 1000)
    monkeypatch.setattr(conversation_folder, "today", lambda: day[0])

    def folder() -> ConversationFolder:
        return ConversationFolder(tmp_path / "conversations", NAME, {}, MANY)

    write(folder(), 1, 900)
    with pytest.raises(NoRoomError, match="written today"):
        write(folder(), 2, 200)
    day[0] -= 5  # The clock goes back: what was written still counts.
    with pytest.raises(NoRoomError):
        write(folder(), 2, 200)
    write(folder(), 2, 100)
    day[0] += 1
    write(folder(), 3, 950)
    assert folder().state().written_today_bytes == 950
    for damaged in (b"", b"x" * 32, b"\0" * 500):
        (tmp_path / "conversations" / "written").write_bytes(damaged)
        with pytest.raises(NoRoomError):
            write(folder(), 4, 100)
        day[0] += 1
        write(folder(), 5, 100)


def test_remains_of_a_killed_process_go_and_what_is_being_written_stays(tmp_path: Path) -> None:
    folder = ConversationFolder(tmp_path / "conversations", NAME, {}, 1000)
    write(folder, 1, 10)
    remains = tmp_path / "conversations" / NAME / f".{9:032x}.77ab.partial"
    remains.write_bytes(bytes(600))
    name = f"{2:032x}.safetensors"
    descriptor, state = folder.begin(name, 500)
    assert not remains.exists() and state.used_bytes == 510
    with pytest.raises(NoRoomError, match="other servers"):
        write(folder, 3, 600)
    folder.finish(name, descriptor)
    assert {file.nbytes for file in folder.files()} == {500}


PROCESS = """
import sys
from pathlib import Path
from mlx_flash.source.conversation_folder import ConversationFolder, NoRoomError
folder = ConversationFolder(Path(sys.argv[1]), "model-0123456789ab", {}, 1000)
for number in range(60):
    name = f"{number % 7 + 10 * int(sys.argv[2]):032x}.safetensors"
    try:
        descriptor, state = folder.begin(name, 300)
    except NoRoomError:
        continue
    assert state.used_bytes <= 1000
    folder.finish(name, descriptor)
"""


def test_two_processes(tmp_path: Path) -> None:
    root = tmp_path / "conversations"
    both = [subprocess.Popen([sys.executable, "-c", PROCESS, str(root), str(number)]) for number in range(2)]
    assert [process.wait(600) for process in both] == [0, 0]
    state = ConversationFolder(root, NAME, {}, 1000).state()
    assert 600 <= state.used_bytes <= 1000 and not list(root.glob("*/.*.partial"))


def test_another_server_s_conversation_is_found(tmp_path: Path, endless: Any, notes: list[str]) -> None:
    model, first = fake("recurrent"), prompt(1, 40)
    one, two = (kept(tmp_path, model, notes) for _ in range(2))
    made, _ = ask(one, endless, first)
    ask(two, endless, prompt(2, 30))
    one.close()
    ask(two, endless, [*first, *made, 5])
    assert two.reused == 42 and notes == []


def test_a_disk_that_fails_fails_no_request(
    tmp_path: Path, endless: Any, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fake("trims")
    turns = kept(tmp_path, model, notes)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "ftruncate", full)
        for seed in range(3):
            ask(turns, endless, prompt(seed, 30))
    assert len(notes) == 1 and "No space left" in notes[0] and names(tmp_path) == []
    monkeypatch.setattr(files_module, "sync_to_disk", full)
    ask(turns, endless, prompt(4, 30))
    turns.close()
    assert names(tmp_path) == [] and not list((tmp_path / "conversations").glob("*/.*"))


def test_a_slow_disk_is_left_alone(
    tmp_path: Path, endless: Any, notes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = kept(tmp_path, fake("trims"), notes)
    monkeypatch.setattr(files_module, "WRITE_S", 0.0)
    monkeypatch.setattr(files_module.ConversationFiles.write, "__defaults__", (0.0,))
    for seed in range(3):
        ask(turns, endless, prompt(seed, 30))
    assert names(tmp_path) == [] and len(notes) == 1 and "too slow" in notes[0]


def test_the_folder_may_vanish(tmp_path: Path, endless: Any, notes: list[str]) -> None:
    turns = kept(tmp_path, fake("trims"), notes)
    for seed in range(4):
        ask(turns, endless, prompt(seed, 30))
        shutil.rmtree(tmp_path / "conversations", ignore_errors=True)
    ask(turns, endless, prompt(9, 30))
    turns.close()
    assert len(names(tmp_path)) >= 1 and len(notes) <= 1  # It may vanish between two steps of a writing.


def test_a_conversation_that_grows_has_one_file(tmp_path: Path, endless: Any, notes: list[str]) -> None:
    model, ids = fake("window"), prompt(1, 40)
    for _ in range(3):
        turns = kept(tmp_path, model, notes)
        made, _ = ask(turns, endless, ids)
        ids = [*ids, *made, 5, 6]
        turns.close()
        assert len(names(tmp_path)) == 1
    before = turns._files.folder.state().written_today_bytes  # type: ignore[union-attr]
    turns = kept(tmp_path, model, notes)
    turns.close()
    assert turns._files.folder.state().written_today_bytes == before  # type: ignore[union-attr]
    assert turns.statistics().on_disk.contexts == 1  # type: ignore[union-attr]


def test_echoed_prompts_are_read_from_the_beginning(tmp_path: Path, endless: Any, notes: list[str]) -> None:
    model, ids = fake("trims"), prompt(1, 40)
    turns = kept(tmp_path, model, notes)
    ask(turns, endless, ids)
    ask(turns, endless, prompt(2, 20))
    ask(turns, endless, ids, prompt_logits_callback=lambda logits: None)
    assert turns.reused == 0


# -- keys and commands -----------------------------------------------------------------------------------------------


def test_the_key(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store_copy = shutil.copytree(store, tmp_path / "store")

    def key(**options: Any) -> Any:
        model, _ = load(store_copy, **{"memory": "4GB", **options})
        try:
            return conversation_key(model)
        finally:
            model.flash.close()

    usual = key()
    assert key(memory="3GB", threads=2, prompt_cache="1MB") == usual, "the text does not depend on these"
    others = [key(predictor="none"), key(prefill_chunk=64), key(draft="ngram")]
    monkeypatch.setenv("MLX_ENABLE_TF32", "0")
    others.append(key())
    monkeypatch.delenv("MLX_ENABLE_TF32")
    os.utime(store_copy / "neurons.bin", (1e9, 1e9))
    others.append(key())
    shutil.copyfile(store / "neurons.bin", store_copy / "neurons.bin")
    os.utime(store_copy / "neurons.bin", (1e9, 1e9))
    others.append(key())  # The size and the time of other bytes do not make them the same.
    assert usual not in others and len({repr(each) for each in others}) == len(others)


def test_the_cache_command_lists_and_removes(tmp_path: Path, endless: Any, notes: list[str]) -> None:
    turns = kept(tmp_path, fake("trims"), notes)
    ask(turns, endless, prompt(1, 40))
    ask(turns, endless, prompt(2, 40))
    turns.close()
    (entry,) = entries(tmp_path)
    assert (entry.name, entry.kind, entry.source) == (f"conversations/{NAME}", "2 conversations", "m")
    assert entry.nbytes == sum(path.stat().st_size for path in (tmp_path / "conversations").glob("*/*.safetensors"))
    assert abs(entry.used - time.time()) < 600
    (tmp_path / "conversations" / NAME / "theirs.txt").write_text("x")
    assert remove(entry) and names(tmp_path) == []
    assert (tmp_path / "conversations" / NAME / "theirs.txt").exists()


def test_none_without_bytes(store: Path, open_model: Any) -> None:
    assert conversation_files(open_model(store), 0, print) is None
