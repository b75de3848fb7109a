"""How many bytes this package writes to the disk per day: a record in the cache folder, and a bound for what recurs.

Conversations have a record and a bound of their own (conversation_folder.py), which `written_bytes` reads. Nothing here
fails a caller: what cannot be counted is not.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UsageError
from .cached import SSD_WRITES, cache_folder
from .conversation_folder import CONVERSATIONS, MOST_BYTES_PER_DAY, today, written_on

DOWNLOADS = "downloads"
CONVERSIONS = "conversions"
CHECKSUMS = "checksums"
COPIES = "copies of small files"  # of tokenizers and the like, at every load
PROBES = "disk probes"  # a file that is read for a moment, and removed
SMALL = "notes about models and disks"  # measured rates, plans, trials: all that `write_small` writes
KINDS = (DOWNLOADS, CONVERSIONS, CHECKSUMS, COPIES, PROBES, SMALL)
MOST_SMALL_PER_DAY = 100 * 10**6  # bytes
DAYS = 7  # are kept
LOCK_S = 0.5  # the longest wait for another process
LONGEST = 64 << 10  # bytes of a record, or of a note in JSON
MOST_COUNTED = 10**18  # bytes per day that a record can be right about


def count_written(kind: str, nbytes: int) -> None:
    """Adds to the bytes that were written today (UTC). kind: one of KINDS."""
    with contextlib.suppress(OSError, UsageError), _record() as record:
        day = record.setdefault(str(today()), {})
        day[kind] = day.get(kind, 0) + nbytes


def write_small(path: Path, content: str | bytes) -> bool:
    """Writes a file of the cache folder that can be made again, and counts it.

    Returns False, and writes nothing, once MOST_SMALL_PER_DAY were written today. Raises OSError.
    """
    data = content.encode() if isinstance(content, str) else content
    if _days().get(today(), {}).get(SMALL, 0) + len(data) > MOST_SMALL_PER_DAY:
        return False
    path.parent.mkdir(parents=True, exist_ok=True)
    write_beside(path, data)
    count_written(SMALL, len(data))
    return True


def read_small(path: Path) -> dict[str, Any]:
    """The JSON object in a file that `write_small` wrote; empty without a file, or if it is damaged or too large."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        if path.is_file() and path.stat().st_size <= LONGEST:  # a named pipe would wait for ever
            contents = json.loads(path.read_bytes())
            return contents if isinstance(contents, dict) else {}
    return {}


def write_beside(path: Path, data: bytes) -> None:
    """Writes a file beside its name and renames it, so that it is never seen half written. Raises OSError.

    There is no sync: after a power cut, the file may be damaged. A process that is killed may leave a file whose name
    `cached.py` knows.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}{threading.get_native_id()}.partial")
    try:
        beside.write_bytes(data)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def written_bytes() -> dict[str, Any]:
    """What was written, in bytes: of today, and of each of the last days that has a record, newest first.

    {"today": {kind: bytes}, "days": [{"day": "2026-11-30", "bytes": {kind: bytes}}], "most_per_day": {kind: bytes}}
    """
    days = _days()
    with contextlib.suppress(OSError, UsageError):
        day, written = written_on(cache_folder() / CONVERSATIONS)
        if written:
            days.setdefault(day, {})[CONVERSATIONS] = written
    return {
        "today": days.get(today(), {}),
        "days": [{"day": _date(day), "bytes": days[day]} for day in sorted(days, reverse=True)[:DAYS]],
        "most_per_day": {CONVERSATIONS: MOST_BYTES_PER_DAY, SMALL: MOST_SMALL_PER_DAY},
    }


def _date(day: int) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(day * 24 * 3600))


def _days() -> dict[int, dict[str, int]]:
    """The record, by days since 1970; empty if there is none."""
    with contextlib.suppress(OSError, UsageError):
        path = cache_folder() / SSD_WRITES
        if path.is_file():  # a named pipe would wait for ever
            with path.open("rb") as file:
                return {int(day): dict(kinds) for day, kinds in _parsed(file.read(LONGEST)).items()}
    return {}


@contextlib.contextmanager
def _record() -> Iterator[dict[str, dict[str, int]]]:
    """The record, which is written in place when the block ends. Other processes wait. Raises OSError."""
    path = cache_folder() / SSD_WRITES
    path.parent.mkdir(parents=True, exist_ok=True)
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(path, flags, 0o600)
    try:
        _lock(descriptor)
        record = _parsed(os.pread(descriptor, LONGEST, 0))
        yield record
        past = sorted((day for day in record if int(day) <= today()), key=int)
        for day in record.keys() - {*past[-DAYS:]}:  # Days to come are from a clock that was wrong.
            del record[day]
        data = json.dumps(record).encode()
        os.pwrite(descriptor, data, 0)
        os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)


def _parsed(data: bytes) -> dict[str, dict[str, int]]:
    """What is not a record counts as an empty one."""
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(data)
        if isinstance(record, dict) and all(_is_day(day, kinds) for day, kinds in record.items()):
            return record
    return {}


def _is_day(day: str, kinds: Any) -> bool:
    whole = isinstance(kinds, dict) and all(
        type(nbytes) is int and 0 <= nbytes <= MOST_COUNTED for nbytes in kinds.values()
    )
    return whole and day.isascii() and day.isdecimal() and len(day) < 10
