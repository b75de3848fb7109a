"""The folder that keeps contexts of conversations: who may read it, how much it holds, how much is written per day.

It is in the cache folder, with a folder for each model and settings (see loading/conversation_key.py). Only this user
may enter it: the contexts are as private as the conversations. Several processes may use it at once. A lock on the
folder itself is held while its contents are counted; no file is locked for long.

A file is written beside its name, synced and renamed. A file that is being written is locked, so that the remains of a
killed process can be told from it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CONVERSATIONS = "conversations"
SUFFIX = ".safetensors"
MOST_BYTES = 2 * 10**9  # of all files, unless the user chooses
LEAST_FREE = 10  # the files take at most one tenth of what is free on the disk, unless the user chooses
MOST_BYTES_PER_DAY = 20 * 10**9  # written; bench/results/restart.md says why
DAY_S = 24 * 3600
LOCK_S = 1.0  # the longest wait for another process
LONGEST_ABOUT = 64 << 10

_ABOUT = "model.json"
_WRITTEN = "written"
_MODEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{12}")
_FILE = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUFFIX)}")
_PARTIAL = re.compile(r"\.[0-9a-f]{32}\.[0-9a-f]+\.partial")
_RECORD = re.compile(rb"(\d{10}) (\d{20})\n")  # day since 1970, bytes written on it


class NoRoomError(Exception):
    """A bound does not allow a file. The message says which one."""


@dataclass(frozen=True)
class FileInFolder:
    """A context's file. used: time of the last use, in seconds since 1970, never in the future."""

    name: str
    nbytes: int
    used: float


@dataclass(frozen=True)
class FolderState:
    """The bytes of all files, the most that they may be, and the bytes written on the day (UTC) of `day`."""

    used_bytes: int
    most_bytes: int
    written_bytes: int
    day: int

    @property
    def written_today_bytes(self) -> int:
        return self.written_bytes if self.day == today() else 0


@dataclass(frozen=True)
class KeptModel:
    """The files of one model and its settings. about: what `ConversationFolder` was given."""

    path: Path
    conversations: int
    nbytes: int
    used: float
    about: dict[str, Any]


def today() -> int:
    """Days since 1970, in UTC."""
    return int(time.time() // DAY_S)


class ConversationFolder:
    """The contexts of one model and its settings.

    root: the folder of all models, which is made when it is needed. name: of the model's own folder. about: plain JSON
    that is kept beside its files. most_bytes: of all models' files; None for MOST_BYTES, but at most a tenth of the
    free disk.

    Every method raises OSError if the folder is not there or cannot be used, and if it belongs to another user.
    """

    def __init__(self, root: Path, name: str, about: dict[str, Any], most_bytes: int | None = None) -> None:
        if not _MODEL.fullmatch(name):
            raise ValueError(f"{name} is not the name of a model's folder")
        self.root, self.name, self.most_bytes = root, name, most_bytes
        self._about = json.dumps(about).encode()
        self._own = os.urandom(8).hex()  # Process ids may be equal in containers that share the folder.

    def files(self) -> list[FileInFolder]:
        """This model's files."""
        with _folder(self.root) as root, _folder(self.name, root) as folder:
            return _files(folder)

    def changed(self) -> int:
        """A number that changes when files come or go."""
        return (self.root / self.name).stat(follow_symlinks=False).st_mtime_ns

    def open(self, name: str) -> int:
        """A descriptor of a file, for reading. Raises OSError as well if others could have written to it."""
        with _folder(self.root) as root, _folder(self.name, root) as folder:
            return _opened(name, folder)

    def used_now(self, name: str) -> None:
        """Marks a file as used, so that older ones go first."""
        descriptor = self.open(name)
        try:
            os.utime(descriptor)
        finally:
            os.close(descriptor)

    def remove(self, name: str) -> None:
        with _folder(self.root) as root, _folder(self.name, root) as folder, contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=folder)

    def state(self) -> FolderState:
        if not self.root.exists():
            there = next(path for path in self.root.absolute().parents if path.exists())
            return FolderState(0, self._most(os.statvfs(there), 0), 0, today())
        with _folder(self.root) as root, _locked(root):
            return self._state(root)

    def begin(self, name: str, nbytes: int) -> tuple[int, FolderState]:
        """Counts a file of so many bytes as written today, and makes room for it: the least recently used files go.

        Returns a descriptor for writing, to be passed to `finish` or `abandon`, and the folder's state with it. Raises
        NoRoomError.
        """
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        with _folder(self.root) as root, _locked(root):
            state = self._state(root)
            written = state.written_today_bytes + nbytes
            if written > MOST_BYTES_PER_DAY:
                raise NoRoomError(f"{MOST_BYTES_PER_DAY / 1e9:.0f} GB were written today, the most per day")
            if nbytes > state.most_bytes:
                raise NoRoomError(
                    f"a conversation takes {nbytes / 1e6:.0f} MB, and at most {state.most_bytes / 1e6:.0f} MB are kept"
                )
            used = _make_room(root, state.most_bytes - nbytes, self.name)
            _write_record(root, today(), written)
            with _folder(self.name, root, make=True) as folder:
                self._write_about(folder)
                flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                beside = self._beside(name)
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(beside, dir_fd=folder)
                descriptor = os.open(beside, flags, 0o600, dir_fd=folder)
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.ftruncate(descriptor, nbytes)  # so that others count it
                except BaseException:
                    os.unlink(beside, dir_fd=folder)
                    os.close(descriptor)
                    raise
        return descriptor, FolderState(used + nbytes, state.most_bytes, written, today())

    def finish(self, name: str, descriptor: int, replaced: str = "") -> None:
        """Gives a synced file its name. replaced: the file of an earlier state of the conversation, which goes."""
        with _folder(self.root) as root, _folder(self.name, root) as folder:
            os.rename(self._beside(name), name, src_dir_fd=folder, dst_dir_fd=folder)
            if replaced and replaced != name:
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(replaced, dir_fd=folder)
            os.fsync(folder)
        os.close(descriptor)

    def abandon(self, name: str, descriptor: int) -> None:
        """Removes a file that was begun."""
        with contextlib.suppress(OSError), _folder(self.root) as root, _folder(self.name, root) as folder:
            os.unlink(self._beside(name), dir_fd=folder)
        os.close(descriptor)

    def _state(self, root: int) -> FolderState:
        used = sum(file.nbytes for _, file in _all_files(root))
        day, written = _read_record(root)
        return FolderState(used, self._most(os.fstatvfs(root), used), written if day >= today() else 0, today())

    def _most(self, disk: os.statvfs_result, used: int) -> int:
        """The most bytes of all files, of which `used` bytes are there already."""
        if self.most_bytes is not None:
            return self.most_bytes
        return min(MOST_BYTES, (disk.f_bavail * disk.f_frsize + used) // LEAST_FREE)

    def _beside(self, name: str) -> str:
        return f".{name.removesuffix(SUFFIX)}.{self._own}.partial"

    def _write_about(self, folder: int) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with contextlib.suppress(FileExistsError), open(os.open(_ABOUT, flags, 0o600, dir_fd=folder), "wb") as file:
            file.write(self._about)


def written_on(root: Path) -> tuple[int, int]:
    """(day since 1970, bytes written on it): the last day on which a conversation was written. Raises OSError."""
    with _folder(root) as descriptor, open(_opened(_WRITTEN, descriptor), "rb") as file:
        found = _RECORD.fullmatch(file.read(100))
        return (int(found[1]), int(found[2])) if found else (0, 0)


def kept_models(root: Path) -> list[KeptModel]:
    """What is kept for each model, sorted by path. A folder that cannot be used counts as empty."""
    found = []
    with contextlib.suppress(OSError), _folder(root) as descriptor:
        for name in sorted(os.listdir(descriptor)):
            if not _MODEL.fullmatch(name):
                continue
            with contextlib.suppress(OSError), _folder(name, descriptor) as folder:
                files, about = _files(folder, partial=True), _read_about(folder)
                whole = sum(_FILE.fullmatch(file.name) is not None for file in files)
                used = max((file.used for file in files), default=os.fstat(folder).st_mtime)
                found.append(KeptModel(root / name, whole, sum(file.nbytes for file in files), used, about))
    return found


def remove_model(kept: KeptModel) -> None:
    """Removes all that is kept for a model. A server that runs it then finds nothing. Raises OSError."""
    with _folder(kept.path.parent) as root, _locked(root):
        with _folder(kept.path.name, root) as folder:
            for file in _files(folder, partial=True):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(file.name, dir_fd=folder)
        _remove_if_empty(kept.path.name, root)


# -- inside a folder ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _folder(path: Path | str, parent: int | None = None, make: bool = False) -> Iterator[int]:
    """A descriptor of a folder that belongs to this user alone. Links are not followed. Raises OSError."""
    if make:
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o700, dir_fd=parent)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags, dir_fd=parent)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid():
            raise PermissionError(errno.EPERM, "it belongs to another user", str(path))
        if status.st_mode & 0o077:
            os.fchmod(descriptor, 0o700)
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: int) -> Iterator[None]:
    """Holds the lock of a folder's descriptor. Raises TimeoutError, an OSError, if another process keeps it."""
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise TimeoutError(errno.ETIMEDOUT, "another process keeps it locked") from None
            time.sleep(0.01)
    try:
        yield
    finally:
        fcntl.flock(folder, fcntl.LOCK_UN)


def _opened(name: str, folder: int) -> int:
    """Opens a regular file that only this user can write to, without waiting on any other kind. Raises OSError."""
    descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=folder)
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o022:
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "it is not a file that only this user can write to", name)
    return descriptor


def _files(folder: int, partial: bool = False) -> list[FileInFolder]:
    """The files of a model's folder. partial: also those that are being written."""
    found, now = [], time.time()
    for name in os.listdir(folder):
        if _FILE.fullmatch(name) or (partial and _PARTIAL.fullmatch(name)):
            with contextlib.suppress(OSError):
                status = os.stat(name, dir_fd=folder, follow_symlinks=False)
                nbytes = status.st_size if stat.S_ISREG(status.st_mode) else 0
                found.append(FileInFolder(name, nbytes, min(status.st_mtime, now)))
    return found


def _all_files(root: int) -> list[tuple[str, FileInFolder]]:
    """(folder, file) for all models, those that are being written included."""
    found = []
    for name in os.listdir(root):
        if _MODEL.fullmatch(name):
            with contextlib.suppress(OSError), _folder(name, root) as folder:
                found += [(name, file) for file in _files(folder, partial=True)]
    return found


def _make_room(root: int, most: int, keep: str) -> int:
    """Removes remains of killed processes, then the least recently used files, until at most `most` bytes are left.

    keep: a model whose folder stays, even if it is empty. Returns the bytes that are left. Raises NoRoomError.
    """
    files = _all_files(root)
    left = sum(file.nbytes for _, file in files)

    def remove(model: str, file: FileInFolder, check: Callable[[int], bool] = lambda _: True) -> int:
        with contextlib.suppress(OSError), _folder(model, root) as folder:
            if check(folder):
                os.unlink(file.name, dir_fd=folder)
                return file.nbytes
        return 0

    partial = [(model, file) for model, file in files if _PARTIAL.fullmatch(file.name)]
    for model, file in partial:
        left -= remove(model, file, lambda folder, name=file.name: _is_remains(name, folder))  # type: ignore[misc]
    for model, file in sorted(files, key=lambda item: item[1].used):
        if left <= most:
            break
        if (model, file) not in partial:
            left -= remove(model, file)
    for model in {model for model, _ in files} - {keep}:
        _remove_if_empty(model, root)
    if left > most:
        raise NoRoomError("other servers are writing, and there is no room beside their files")
    return left


def _is_remains(name: str, folder: int) -> bool:
    """Whether no process writes a file that was begun."""
    descriptor = _opened(name, folder)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(descriptor)
    return True


def _remove_if_empty(model: str, root: int) -> None:
    with contextlib.suppress(OSError):
        with _folder(model, root) as folder:
            if set(os.listdir(folder)) - {_ABOUT}:
                return
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_ABOUT, dir_fd=folder)
        os.rmdir(model, dir_fd=root)


def _read_about(folder: int) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError, RecursionError), open(_opened(_ABOUT, folder), "rb") as file:
        about = json.loads(file.read(LONGEST_ABOUT))
        return about if isinstance(about, dict) else {}
    return {}


def _read_record(root: int) -> tuple[int, int]:
    """(day, bytes written on it). What is not such a record is made one of a full day, so that the bound holds."""
    try:
        with open(_opened(_WRITTEN, root), "rb") as file:
            if found := _RECORD.fullmatch(file.read(100)):
                return int(found[1]), int(found[2])
    except FileNotFoundError:
        return 0, 0
    _write_record(root, today(), MOST_BYTES_PER_DAY)
    return today(), MOST_BYTES_PER_DAY


def _write_record(root: int, day: int, written: int) -> None:
    """Overwrites the record in place: it always has the same size, so a crash leaves the old one or the new one."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    descriptor = os.open(_WRITTEN, flags, 0o600, dir_fd=root)
    try:
        os.pwrite(descriptor, b"%010d %020d\n" % (day, written), 0)
        os.ftruncate(descriptor, 32)
    finally:
        os.close(descriptor)
