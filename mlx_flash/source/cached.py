"""The cache folder, its entries, and their removal. Entries in use and files of other programs are never removed."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError
from ..flash.files import FORMAT, MANIFEST, RECORD, Manifest
from .conversation_folder import CONVERSATIONS, KeptModel, kept_models, remove_model

HISTORY = "chat-history"
REPORT = "last-error.txt"  # the traceback of the latest unexpected error
REPORT_BEGINS = "mlx-flash-runtime "
DISK_RATES = "disk-rates.json"  # the speed of disks, as measured on the way to a forecast
USES = "uses"  # the folder for the uses of units, see kept_uses.py
SWAPS = "swapped.json"  # the models that ran while the system swapped
TRIALS = "trials"  # the folder for the results of trials, see kept_trials.py
SSD_WRITES = "ssd-writes.json"  # how many bytes were written per day
PLANS = "plans.json"  # what models on this machine need, as a server planned it
SUMS = "sums"  # the folder for the block sums that `--verify` makes of a checkpoint's files
SUMS_SUFFIX = ".sums"
PROBE = "disk-probe-"  # prefix of what the disk and the reader are tried with
MATRICES = "mlx_flash-matrices-"  # prefix of a benchmark's temporary folder beside a store
_STORE = re.compile(r".+-[0-9a-f]{12}")  # the names that resolve.cached_store_path gives
_PARTIAL, _REMOVED = ".partial", ".removed"
_REMAINS = re.compile(rf"\.({_STORE.pattern}(?:{re.escape(_PARTIAL)})?)\.(?:removed|replaced)")
_UNFINISHED = re.compile(r"(.+)\.[0-9]+\.partial")  # the names that ssd_writes.write_beside gives
_ONE_OF_THE_USES = re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{12}\.uses")
_RESULT = re.compile(r"[A-Za-z0-9._-]+-[0-9a-f]{12}\.json")
_ONE_OF_THE_SUMS = re.compile(rf"[0-9a-f]{{32}}{re.escape(SUMS_SUFFIX)}")
_FILES = {
    HISTORY: "chat history",
    DISK_RATES: "speed of disks",
    SSD_WRITES: "bytes written per day",
    PLANS: "plans of models",
    SWAPS: "models that were swapped",
}


def cache_folder() -> Path:
    """The folder for stores made without an explicit output: $MLX_FLASH_CACHE, or the system's cache folder.

    Raises UsageError if the folder depends on a home folder that the system does not know.
    """
    chosen = os.environ.get("MLX_FLASH_CACHE")
    try:
        if chosen:
            return Path(chosen).expanduser()
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "mlx_flash"
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mlx_flash"
    except RuntimeError:  # a user without a home folder, or "~name" of a user who does not exist
        where = f"MLX_FLASH_CACHE is {chosen!r:.200}, but" if chosen else "there is no place for the cache folder:"
        raise UsageError(
            f"{where} this system knows no such home folder. Set MLX_FLASH_CACHE to the full path of a folder."
        ) from None


@dataclass(frozen=True)
class Entry:
    """A file or folder in the cache folder that this package made."""

    path: Path
    kind: str  # one of the names that `_kind_of` returns
    nbytes: int
    source: str | None  # folder of the checkpoint; None if it was not recorded
    used: float  # time of the last use, in seconds since 1970
    superseded: bool  # a store of the same source was used later
    kept: KeptModel | None = None  # what is kept of a model's conversations

    @property
    def name(self) -> str:
        return self.path.name if self.kept is None else f"{CONVERSATIONS}/{self.path.name}"


def remember(store: Path, source: Path) -> None:
    """Records beside a store in the cache folder which checkpoint it was made from, and that it is used now."""
    note = _note_of(store)
    with contextlib.suppress(OSError):  # If the folder cannot be written to, only the list knows less.
        text = json.dumps({"source": str(source.resolve())})
        if not note.is_file() or note.read_text(encoding="utf-8", errors="replace") != text:
            note.write_text(text, encoding="utf-8")
        os.utime(note)


def entries(folder: Path) -> list[Entry]:
    """Everything in the cache folder that this package made, sorted by name. Links are not followed."""
    found = []
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(folder.iterdir()):
            if not path.is_symlink() and (kind := _kind_of(path)) is not None:
                note = _note_of(path.with_name(path.name.removesuffix(_PARTIAL)))
                nbytes = sum(map(_size_of, _sums_in(path))) if kind == "block sums" else _size_of(path)
                found.append(Entry(path, kind, nbytes, _source_in(note), _last_used(path, note), False))
    for kept in kept_models(folder / CONVERSATIONS):
        kind = "conversation" if kept.conversations == 1 else "conversations"
        source = kept.about.get("model")
        source = source if isinstance(source, str) else None
        kind = f"{kept.conversations} {kind}"
        found.append(Entry(kept.path, kind, kept.nbytes, source, kept.used, False, kept))
    latest: dict[str, float] = {}
    for entry in found:
        if entry.kind == "store" and entry.source is not None:
            latest[entry.source] = max(entry.used, latest.get(entry.source, 0.0))
    return [
        Entry(
            e.path,
            e.kind,
            e.nbytes,
            e.source,
            e.used,
            e.kind == "store" and e.used < latest.get(e.source or "", 0.0),
            e.kept,
        )
        for e in found
    ]


def remove(entry: Entry) -> bool:
    """Removes the entry; returns False, and removes nothing, if it is in use. Raises OSError."""
    with contextlib.ExitStack() as stack:
        if entry.kind == "benchmark's matrices" and not stack.enter_context(_alone_with_folder(entry.path)):
            return False
        if entry.kind in ("store", "partial conversion", "remains") and not stack.enter_context(
            _alone_with(entry.path)
        ):
            return False
        if entry.kept is not None:
            remove_model(entry.kept)
        elif entry.kind == "block sums":
            for path in _sums_in(entry.path):
                path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty: it holds a file of another program
                entry.path.rmdir()
        elif entry.kind in ("store", "partial conversion"):
            # Rename it first: a partly removed store must not be mistaken for a whole one.
            gone = entry.path.with_name(f".{entry.name}{_REMOVED}")
            if gone.is_dir():  # left by an interrupted removal of the same name
                shutil.rmtree(gone)
            entry.path.rename(gone)
            shutil.rmtree(gone)
        elif entry.path.is_dir():
            shutil.rmtree(entry.path)
        else:
            entry.path.unlink()
        if entry.kind == "store":
            _note_of(entry.path).unlink(missing_ok=True)
    return True


@contextlib.contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Marks a benchmark's folder as in use inside this context, so that `remove` does not remove it."""
    from ..flash.system import mark_in_use

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        mark_in_use(descriptor)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _alone_with_folder(folder: Path) -> Iterator[bool]:
    """Yields True if no process is inside `in_use` of the folder; none can enter it inside this context."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _alone_with(path: Path) -> Iterator[bool]:
    """Yields True if no process converts into a store's folder or runs it; none can start inside this context."""
    from filelock import FileLock, Timeout

    remains = _REMAINS.fullmatch(path.name)
    name = path.name if remains is None else remains[1]
    store = path.with_name(name.removesuffix(_PARTIAL))
    with contextlib.ExitStack() as stack:
        try:
            for lock in (store.with_name(f".{store.name}.lock"), store.with_name(f"{store.name}.lock")):
                stack.enter_context(FileLock(lock).acquire(timeout=0))
                stack.callback(lock.unlink, missing_ok=True)
            with contextlib.suppress(FileNotFoundError):
                neurons = stack.enter_context((path / Manifest.neurons_file).open("rb"))
                fcntl.flock(neurons, fcntl.LOCK_EX | fcntl.LOCK_NB)  # A process that runs it holds a shared lock.
        except (Timeout, BlockingIOError):
            yield False
            return
        yield True


def _kind_of(path: Path) -> str | None:
    try:
        if path.name == REPORT and path.is_file():
            with path.open("rb") as file:
                return "error report" if file.read(len(REPORT_BEGINS)) == REPORT_BEGINS.encode() else None
        if _finished(path) in _FILES and path.is_file():
            return _FILES[_finished(path)]
        if path.name.startswith(PROBE):
            return "remains of a disk probe"
        if path.name == USES and _all_named(path, _ONE_OF_THE_USES):
            return "uses of units"
        if path.name == TRIALS and _all_named(path, _RESULT):
            return "results of trials"
        if path.name == SUMS and path.is_dir() and _sums_in(path):
            return "block sums"
        if path.name.startswith(MATRICES) and path.is_dir():
            return "benchmark's matrices"
        if _REMAINS.fullmatch(path.name) and path.is_dir():
            return "remains"  # left by an interrupted removal or replacement
        if _STORE.fullmatch(path.name) and FORMAT.encode() in (path / MANIFEST).read_bytes():
            return "store"
        name = path.name.removesuffix(_PARTIAL)
        if name != path.name and _STORE.fullmatch(name) and b'"mlx_flash"' in (path / RECORD).read_bytes():
            return "partial conversion"
    except OSError:
        pass
    return None


def _finished(path: Path) -> str:
    """The name that a file has, or would have got from a run that was killed."""
    unfinished = _UNFINISHED.fullmatch(path.name)
    return path.name if unfinished is None else unfinished[1]


def _sums_in(folder: Path) -> list[Path]:
    """The files in the folder of sums that this package made, including those of an interrupted run."""
    return [
        path
        for path in folder.iterdir()
        if _ONE_OF_THE_SUMS.fullmatch(_finished(path)) and path.is_file() and not path.is_symlink()
    ]


def _all_named(folder: Path, names: re.Pattern[str]) -> bool:
    """Whether a folder holds only files with names that this package gives."""
    return folder.is_dir() and all(
        names.fullmatch(_finished(path)) and path.is_file() and not path.is_symlink() for path in folder.iterdir()
    )


def _note_of(store: Path) -> Path:
    return store.with_name(f".{store.name}.json")


def _source_in(note: Path) -> str | None:
    try:
        source = json.loads(note.read_text(encoding="utf-8"))["source"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return source if isinstance(source, str) else None


def _last_used(path: Path, note: Path) -> float:
    times = []
    for each in (note, path / MANIFEST, path):
        with contextlib.suppress(OSError):
            times.append(each.stat().st_mtime)
    return times[0] if times else 0.0


def _size_of(path: Path) -> int:
    """Bytes used on the disk, without files that cannot be read."""
    total = 0
    for each in (path, *(path.rglob("*") if path.is_dir() else ())):
        with contextlib.suppress(OSError):
            total += each.lstat().st_blocks * 512
    return total
