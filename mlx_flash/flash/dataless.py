"""Files whose contents are in iCloud, or with another cloud service, and not on this disk.

macOS fetches such a file when it is first read, and the read waits for that: hours for a large model, or for ever
without a network. A status can be read without that.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from pathlib import Path

from ..errors import ReadError

_SF_DATALESS = 0x40000000  # in st_flags; sys/stat.h of macOS
_PLACEHOLDER = re.compile(r"\.(.+)\.icloud")  # what earlier versions of macOS leave in the place of a file


def refuse_dataless(path: Path, status: os.stat_result) -> None:
    """Raises ReadError if the contents of a file are not on this disk. status: the file's."""
    if is_dataless(status):
        raise _in_icloud(path)


def is_dataless(status: os.stat_result) -> bool:
    """Whether the contents of a file are elsewhere, by its status."""
    return bool(_flags_of(status) & _SF_DATALESS)


def refuse_placeholders(folder: Path, entries: Collection[str], counts: Callable[[str], object]) -> None:
    """Raises ReadError if a file of a folder is in iCloud, and only its placeholder is here.

    entries: the names in the folder. counts: whether a file of that name is read.
    """
    for name in sorted(entries):
        found = _PLACEHOLDER.fullmatch(name)
        if found and found[1] not in entries and counts(found[1]):
            raise _in_icloud(folder / found[1])


def _flags_of(status: os.stat_result) -> int:
    return getattr(status, "st_flags", 0)  # macOS has it


def _in_icloud(path: Path) -> ReadError:
    return ReadError(
        f"{path} is in iCloud, or with another cloud service, and not on this disk. Download it first (in the Finder: "
        "Download Now, then Keep Downloaded), or move the model to a folder that is not synced."
    )
