"""A file that units are read from, with its state when it was opened and a check that it is still the same."""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..errors import ReadError
from .plain_files import unreadable
from .system import READ_ALIGNMENT, open_for_reading

Int64Array = npt.NDArray[np.int64]


class Descriptor:
    """An open file, closed with the last reference to it. Its number cannot become another file's during a read."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        with contextlib.suppress(OSError):  # it was closed by its number
            os.close(self.number)


class Sums(Protocol):
    """The checksums of a file's units; unit_sums.py has them for every kind of unit."""

    def checks(self, offsets: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer] | int) -> Int64Array:
        """The checks for segments that are passed to `Reader.submit`: (m, 3) int64, ascending.

        A row has a position in the concatenated bytes of all segments, the number of bytes, and their CRC-32 (zlib's).
        Raises ValueError if bytes of a segment have no sum.
        """
        ...


class UnitFile:
    """A file that units are read from, open for positional reads.

    path: the path as given. size: bytes when opened. direct: whether reads go past the page cache, which a file system
    may refuse; `read_past_cache` changes it. alignment: bytes that reads are aligned to; 1 if they need not be.
    name_of: (offset, bytes) -> the units there, for messages ("layer 3, neurons 24-31"); "" if unknown. sums: checksums
    that verify every read; None to verify nothing.
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
        self._opened = status
        self._other: Descriptor | None = None  # the one for the other way of reading, once it was asked for

    @property
    def alignment(self) -> int:
        return READ_ALIGNMENT if self.direct else 1

    def read_past_cache(self, direct: bool) -> bool:
        """Makes the reads that are submitted from now on go past the page cache, or through it.

        Returns whether they do. They do not if the file system refuses, or if there is another file at the path now. A
        read that is in flight ends on the descriptor that it began with.
        """
        if direct == self.direct or self._descriptor is None:
            return direct == self.direct
        if self._other is None:
            try:
                fd, obtained = open_for_reading(self.path, direct)
            except OSError:
                return False
            other = Descriptor(fd)
            if obtained != direct or identity_of(os.fstat(fd)) != identity_of(self._opened):
                return False
            self._other = other
        self._descriptor, self._other, self.direct = self._other, self._descriptor, direct
        return True

    @property
    def fd(self) -> int:
        """The descriptor's number; -1 once the file is closed."""
        descriptor = self._descriptor
        return -1 if descriptor is None else descriptor.number

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """(inode, size, mtime, ctime), times in ns. It changes with every change of the contents."""
        return identity_of(self._opened)

    def verify_unchanged(self) -> None:
        """Raises ReadError if the file may have been written to since it was opened.

        A program can restore a file's size and mtime, but not its ctime. The ctime also changes with links, mode and
        owner. These changes are visible in the file's status and leave the bytes as they were. If only the ctime has
        changed, the file was written to and its mtime restored, or it was renamed, or its extended attributes were set.
        These cases look alike, so all of them count as a change.
        """
        descriptor = self._descriptor
        if descriptor is None:
            raise ReadError(f"{self.path} is closed, as its model is (`model.flash.close()`). Load the model again.")
        try:
            now = os.fstat(descriptor.number)
        except OSError as error:
            raise unreadable(self.path, error) from error
        then = self._opened
        if identity_of(now) == identity_of(then):
            return
        if now.st_size != then.st_size:
            how = f"it has {now.st_size} bytes and had {then.st_size}"
        elif now.st_mtime_ns != then.st_mtime_ns:
            how = "it was written to, or its modification time was set"
        elif _links_and_rights(now) != _links_and_rights(then):
            self._opened = now
            return
        else:
            how = "it was written to and its modification time restored, or it was renamed or given other attributes"
        raise ReadError(
            f"{self.path} was changed while it was in use ({how}). "
            "Do not change the files of a store or a checkpoint while a model runs. Start again."
        )

    def is_lost(self) -> bool:
        """Whether its path does not lead to it any more, or its descriptor reads nothing: its volume went away, or
        another file took its place. Once the path leads to a file again, that can be opened."""
        if (descriptor := self._descriptor) is None:
            return False
        try:
            there = os.stat(self.path)
            with mmap.mmap(-1, READ_ALIGNMENT) as page:
                os.preadv(descriptor.number, [page], 0)
        except OSError:
            return True
        return (there.st_dev, *identity_of(there)) != (self._opened.st_dev, *identity_of(self._opened))

    def close(self) -> None:
        """Closes the file, at once or when the last outstanding read has been waited for. May be called again."""
        self._descriptor = self._other = None

    def __enter__(self) -> UnitFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def identity_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """(inode, size, mtime, ctime) of a file, times in ns. If the tuple differs, the bytes may differ."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _links_and_rights(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_nlink, status.st_mode, status.st_uid, status.st_gid
