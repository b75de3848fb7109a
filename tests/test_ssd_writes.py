"""The record of bytes written per day."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mlx_flash.source import ssd_writes
from mlx_flash.source.cached import SSD_WRITES, entries, remove
from mlx_flash.source.conversation_folder import CONVERSATIONS, ConversationFolder
from mlx_flash.source.ssd_writes import CONVERSIONS, DOWNLOADS, SMALL, count_written, write_small, written_bytes

DAY_S = 24 * 3600


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_bytes_are_counted_by_day_and_kind(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert written_bytes()["today"] == {} and written_bytes()["days"] == []
    begin = 20_000 * DAY_S
    for day in range(ssd_writes.DAYS + 3):
        monkeypatch.setattr(time, "time", lambda day=day: begin + day * DAY_S + 5.0)
        count_written(DOWNLOADS, 10**9)
        count_written(DOWNLOADS, day)
        count_written(CONVERSIONS, 7)
    found = written_bytes()
    assert found["today"] == {DOWNLOADS: 10**9 + 9, CONVERSIONS: 7}
    assert len(found["days"]) == ssd_writes.DAYS and found["days"][0] == {"day": "2024-10-13", "bytes": found["today"]}
    assert found["most_per_day"].keys() == {CONVERSATIONS, SMALL} and json.dumps(found)
    monkeypatch.setattr(time, "time", lambda: begin + 100 * DAY_S)
    assert written_bytes()["today"] == {}
    (entry,) = entries(cache)
    assert entry.kind == "bytes written per day" and remove(entry) and written_bytes()["days"] == []


def test_conversations_are_read_from_their_own_record(cache: Path) -> None:
    folder = ConversationFolder(cache / CONVERSATIONS, "model-0123456789ab", {})
    descriptor, _ = folder.begin("0" * 32 + ".safetensors", 4096)
    folder.abandon("0" * 32 + ".safetensors", descriptor)
    assert written_bytes()["today"] == {CONVERSATIONS: 4096}


def count_often(number: int) -> None:
    for _ in range(20):
        count_written(DOWNLOADS, number)


def test_processes_count_together() -> None:
    with ThreadPoolExecutor(4) as pool:  # A lock belongs to an opening of the file, so threads wait as processes do.
        list(pool.map(count_often, [1, 2, 3, 4]))
    assert written_bytes()["today"] == {DOWNLOADS: 200}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b'{"x": {}}',
        b'{"1": {"a": -1}}',
        b'{"1": 2}',
        b"\xff",
        b"[" * 60_000,
        b'{"1": {"a": 1%s}}' % (b"0" * 400),
    ],
)
def test_a_damaged_record_begins_anew(cache: Path, content: bytes) -> None:
    cache.mkdir()
    (cache / SSD_WRITES).write_bytes(content)
    assert written_bytes()["days"] == []
    count_written(DOWNLOADS, 5)
    assert written_bytes()["today"] == {DOWNLOADS: 5}


def test_days_to_come_do_not_displace_today(cache: Path) -> None:
    cache.mkdir()
    later = {str(ssd_writes.today() + 100 + day): {SMALL: 1} for day in range(ssd_writes.DAYS)}
    (cache / SSD_WRITES).write_text(json.dumps(later))
    count_written(DOWNLOADS, 5)
    assert written_bytes()["today"] == {DOWNLOADS: 5} and len(written_bytes()["days"]) == 1


def test_a_pipe_in_place_of_the_record(cache: Path) -> None:
    cache.mkdir()
    os.mkfifo(cache / SSD_WRITES)
    assert written_bytes()["days"] == []
    count_written(DOWNLOADS, 5)
    assert write_small(cache / "note", "text") and (cache / "note").read_text() == "text"


def test_a_record_that_cannot_be_written_fails_nothing(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write_text("a file is in the way")
    count_written(DOWNLOADS, 5)
    assert written_bytes()["today"] == {}
    cache.unlink()
    (cache / SSD_WRITES).mkdir(parents=True)
    count_written(DOWNLOADS, 5)
    assert written_bytes()["today"] == {}


def test_what_recurs_is_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ssd_writes, "MOST_SMALL_PER_DAY", 10)
    assert write_small(cache / "rates.json", "12345") and write_small(cache / "rates.json", "67890")
    assert not write_small(cache / "rates.json", "x")
    assert (cache / "rates.json").read_text() == "67890" and written_bytes()["today"] == {SMALL: 10}
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + DAY_S)
    assert write_small(cache / "rates.json", "x")


def test_a_write_that_fails_leaves_the_old_file(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_small(cache / "rates.json", "old")

    def full(path: Path, _: bytes) -> int:
        path.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        write_small(cache / "rates.json", "new")
    assert (cache / "rates.json").read_text() == "old" and sorted(os.listdir(cache)) == ["rates.json", SSD_WRITES]
