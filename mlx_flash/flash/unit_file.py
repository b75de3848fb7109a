"""A file that units are read from: what is known of it when it is opened, and whether it is still the same."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ReadError
from .system import READ_ALIGNMENT, open_for_reading

Int64Array = npt.NDArray[np.int64]


class Descriptor:
    """An open file, which is closed when nothing has it any more: under a read its number cannot become another's."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        with contextlib.suppress(OSError):  # someone closed it by its number
            os.close(self.number)


class Sums(Protocol):
    """The checksums of what is read of a file; unit_sums.py has them for every kind of unit."""

    def checks(self, offsets: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer] | int) -> Int64Array:
        """What the segments that `Reader.submit` is given are compared with: (m, 3) int64, ascending.

        Where in the bytes of all segments, one segment behind the other; how many bytes; the CRC-32 (of zlib) that
        they have. Raises ValueError if bytes of a segment have no sum.
        """
        ...


class UnitFile:
    """A file that units are read from, open for positional reads.

    path: as given. size: bytes when opened. direct: whether reads go past the page cache, which a file system may
    refuse. alignment: bytes that a read is aligned to, 1 if it need not be. name_of: (offset, bytes) -> which units
    lie there, for messages ("layer 3, neurons 24-31"); "" where that is not known. sums: of what every read is compared
    with; None to compare nothing.
    Raises ReadError if `path` is not a readable regular file.
    """

    def __init__(self, path: str | os.PathLike[str], direct: bool = True) -> None:
        self.path = Path(path)
        self.name_of: Callable[[int, int], str] = lambda offset, length: ""
        self.sums: Sums | None = None
        try:
            fd, self.direct = open_for_reading(path, direct)
            self._descriptor: Descriptor | None = Descriptor(fd)
            status = os.fstat(fd)
        except OSError as error:
            raise ReadError(f"{self.path} cannot be opened for reading: {error.strerror}.") from error
        if not stat.S_ISREG(status.st_mode):
            raise ReadError(f"{self.path} is not a regular file; the file of a store or a checkpoint was expected.")
        self.size = status.st_size
        self.alignment = READ_ALIGNMENT if self.direct else 1
        self._opened = status

    @property
    def fd(self) -> int:
        """The descriptor's number, -1 once the file is closed."""
        descriptor = self._descriptor
        return -1 if descriptor is None else descriptor.number

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """What changes with every change of the contents: inode, size, time of writing, time of any change (ns)."""
        return identity_of(self._opened)

    def verify_unchanged(self) -> None:
        """Raises ReadError if someone may have written into the file since it was opened.

        Size and time of writing can be put back, the time of the last change (ctime) cannot. It also moves when a link
        is made or removed or when mode or owner are set, which is seen in them and leaves the bytes as they were. When
        it moves alone, the file was written to and its time put back; or it was renamed, or its extended attributes
        set: that cannot be told apart, and counts as a change.
        """
        descriptor = self._descriptor
        if descriptor is None:
            raise ReadError(f"{self.path} is closed.")
        try:
            now = os.fstat(descriptor.number)
        except OSError as error:
            raise ReadError(f"{self.path} cannot be examined: {error.strerror}.") from error
        then = self._opened
        if identity_of(now) == identity_of(then):
            return
        if now.st_size != then.st_size:
            how = f"it has {now.st_size} bytes, and had {then.st_size}"
        elif now.st_mtime_ns != then.st_mtime_ns:
            how = "it was written to, or its time set"
        elif _links_and_rights(now) != _links_and_rights(then):
            self._opened = now
            return
        else:
            how = "it was written to and its time put back, or it was renamed or given other attributes"
        raise ReadError(
            f"{self.path} was changed while it was in use ({how}). "
            "Leave the files of a store or a checkpoint alone while a model runs; start again."
        )

    def close(self) -> None:
        """Closes the file, at once or when the last outstanding read has been waited for. May be called again."""
        self._descriptor = None

    def __enter__(self) -> UnitFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def identity_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """(inode, size, mtime, ctime) of a file: another tuple means that its bytes may be others."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _links_and_rights(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_nlink, status.st_mode, status.st_uid, status.st_gid
