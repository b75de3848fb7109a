"""What lies in the cache folder: how much, and what could be removed."""

from __future__ import annotations

import os
import time
from pathlib import Path

from ..source.cached import Entry, cache_folder, entries
from ..source.ssd_writes import written_bytes
from .told import Facts

STALE_DAYS = 7  # An unfinished conversion of this age is not being made.
STALE_KINDS = ("partial conversion", "remains", "benchmark's matrices", "remains of a disk probe")


def cache_contents() -> Facts:
    """folder: its path. writable: whether it can be written to. total_bytes. entries: [{"name", "kind", "bytes",
    "days"}], the largest first; days since the last use. superseded_bytes: of stores that newer ones replace.
    stale_bytes: of remains that nothing uses. conversations: their number. conversation_bytes.
    written: what this package wrote to the disk, see `written_bytes`.

    Raises UsageError if there is no place for the folder.
    """
    folder = cache_folder()
    found = entries(folder)
    talks = [entry for entry in found if entry.kept is not None]
    return {
        "folder": str(folder),
        "writable": writable(folder),
        "total_bytes": sum(entry.nbytes for entry in found),
        "entries": [
            {"name": e.name, "kind": e.kind, "bytes": e.nbytes, "days": round(_days(e), 1)}
            for e in sorted(found, key=lambda e: -e.nbytes)
        ],
        "superseded_bytes": sum(entry.nbytes for entry in found if entry.superseded),
        "stale_bytes": sum(e.nbytes for e in found if e.kind in STALE_KINDS and _days(e) >= STALE_DAYS),
        "conversations": sum(entry.kept.conversations for entry in talks if entry.kept is not None),
        "conversation_bytes": sum(entry.nbytes for entry in talks),
        "written": written_bytes(),
        "unknown": {},
    }


def writable(folder: Path) -> bool:
    """Whether files can be written to a folder, which is made if it is not there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.access(folder, os.W_OK | os.X_OK)
    except OSError:
        return False


def _days(entry: Entry) -> float:
    return max(0.0, time.time() - entry.used) / 86400
