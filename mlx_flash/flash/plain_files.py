"""Files that are read by plain calls: every error names the file, and what of it was wanted."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from ..errors import ReadError

if TYPE_CHECKING:  # `--help` must not wait for it
    import numpy as np

DISK = "The disk, or the connection to it, reports this: try again; if it stays, copy the file from a sound disk."
CUT = "It was cut short, or it is still being copied: copy it again."


def unreadable(path: Path, error: Exception, what: str = "") -> ReadError:
    """The error to raise for one of the system's, or an EOFError. what: of the file, "tensor x"."""
    remedy = CUT if isinstance(error, EOFError) else DISK
    return ReadError(f"{path}{what and f': {what}'} cannot be read: {reason_of(error)}. {remedy}")


def reason_of(error: Exception) -> str:
    """What an error says, in a line: an error of the system without its number and the name of a file."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return " ".join(text.split()).rstrip(".") or type(error).__name__


@contextlib.contextmanager
def reading(path: Path, what: str = "") -> Iterator[None]:
    """Around a read of `path`. Raises ReadError for the system's errors, and for a file that ends too early."""
    try:
        yield
    except (OSError, EOFError) as error:
        raise unreadable(path, error, what) from None


def read_at(file: BinaryIO, offset: int, target: np.ndarray) -> None:
    """Fills target, contiguous uint8 of any shape, with the bytes from `offset` on. Raises OSError or EOFError."""
    left = memoryview(target.reshape(-1))  # type: ignore[arg-type]  # a buffer, which the stub does not say
    file.seek(offset)
    while left:
        if not (count := file.readinto(left)):  # type: ignore[attr-defined]
            end = min(file.tell(), os.fstat(file.fileno()).st_size)  # it may end before `offset`
            raise EOFError(f"it ends at byte {end}, before byte {file.tell() + len(left)}")
        left = left[count:]
