"""Plain reads of files. Every error names the file and the part that was wanted."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import ReadError

if TYPE_CHECKING:  # `--help` must not wait for this import
    import numpy as np

DISK = "The disk or the connection to it reports this. Try again; if it persists, copy the file from a sound disk."
AWAY = (
    "The volume that it is on went away: connect it again, then start again. A server loads the model again by itself."
)
# What the system says of files on a volume that was disconnected, or on a server that does not answer.
OF_A_LOST_VOLUME = frozenset(
    {
        *(errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EHOSTDOWN),
        *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
    }
)
CUT = "The file was cut short or is still being copied. Copy it again."
REMEDIES: dict[type[Exception], str] = {
    FileNotFoundError: "Check the name, or put the file back. If it is on another volume, connect that.",
    NotADirectoryError: "Check the name.",
    IsADirectoryError: "Name a file.",
    PermissionError: "Give this user the right to read it.",
}


def unreadable(path: Path, error: Exception, what: str = "") -> ReadError:
    """The ReadError for a system error or an EOFError. what: the part of the file, such as "tensor x"."""
    remedy = CUT if isinstance(error, EOFError) else REMEDIES.get(type(error), DISK)
    if isinstance(error, OSError) and error.errno in OF_A_LOST_VOLUME:
        remedy = AWAY
    return ReadError(f"{path}{what and f': {what}'} cannot be read: {reason_of(error)}. {remedy}")


def reason_of(error: Exception) -> str:
    """An error's text in one line; a system error without its number and file name."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


@contextlib.contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Wraps a read of `path`. Raises ReadError for a system error, or if the file ends too early."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise unreadable(path, error, what) from None


def read_at(file: BinaryIO, offset: int, target: np.ndarray) -> None:
    """Fills `target` (contiguous uint8, any shape) with the bytes from `offset` on. Raises OSError or EOFError."""
    left = memoryview(target.reshape(-1))  # type: ignore[arg-type]  # np.ndarray is a buffer; its stub lacks that
    file.seek(offset)
    while left:
        if not (count := file.readinto(left)):  # type: ignore[attr-defined]
            end = min(file.tell(), os.fstat(file.fileno()).st_size)  # the file may end before `offset`
            raise EOFError(f"it ends at byte {end}, before byte {file.tell() + len(left)}")
        left = left[count:]
