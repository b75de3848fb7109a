"""`--verify`: sums of what is read of a checkpoint, made once and kept in the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError, ReadError
from ..flash.reader import Reader
from ..flash.unit_file import UnitFile, identity_of
from ..flash.unit_sums import Ranges, RangeSums, make_sums
from ..source.cached import SUMS, SUMS_SUFFIX
from ..source.resolve import cache_folder

Identity = tuple[int, int, int, int]  # as `identity_of` gives it
SHA256 = re.compile("[0-9a-f]{64}")
GIT_SHA1 = re.compile("[0-9a-f]{40}")
NO_RANGES = Ranges(np.zeros(0, np.int64), np.zeros(0, np.int64))
LONGEST_HEAD = 64 << 10  # bytes of the first line of a file of sums
MOST_BYTES = 256 << 20  # of such a file: 20 for each range


def attach_sums(files: Sequence[UnitFile], units: Sequence[Ranges], reader: Reader, say: Callable[[str], None]) -> None:
    """From now on, what is read of the files is compared with sums.

    Where they are not kept from an earlier time, for exactly these files, all files that lack them are read once and
    compared with the SHA-256 that the Hub has of them, as far as that is known here.

    units: for each file, what will be read of it.
    Raises CheckpointError if a file is not what the Hub has, ReadError if one cannot be read.
    """
    from tqdm import tqdm

    missing = []
    for file, ranges in zip(files, units, strict=True):
        kept, expected = _kept(file.path, file.identity), known_sha256(file.path)
        if kept is not None and kept.ranges == ranges and expected in (None, kept.file_sha256):
            file.sums = kept
        else:
            missing.append((file, ranges, expected, None if kept is None else kept.file_sha256))
    if not missing:
        return
    unknown = [file.path.name for file, _, expected, _ in missing if expected is None]
    if unknown:
        say(
            f"note: no SHA-256 from the Hub is known of {len(unknown)} of {len(files)} files ({unknown[0]}...): their "
            "checksums are made of what they hold now"
        )
    total = sum(file.size for file, *_ in missing)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=total < 500e6, leave=False) as bar:
        for file, ranges, expected, earlier in missing:
            digest = hashlib.sha256()
            sums = make_sums(file, reader, ranges, digest.update, bar.update)
            if expected is not None and digest.hexdigest() != expected:
                raise _not_the_hubs(file.path, "SHA-256", digest.hexdigest(), expected)
            if expected is None and earlier not in (None, digest.hexdigest()):
                raise differs(file.path)
            file.sums = sums
            try:
                _keep(file.path, file.identity, sums, digest.hexdigest())
                _remove_stale(_place(file.path).parent)
            except OSError as error:
                say(f"note: the checksums of {file.path.name} cannot be kept, the next run makes them again: {error}")


def compare_small_file(path: Path, status: os.stat_result, content: bytes) -> None:
    """Compares a small file with what the Hub has of it, as far as that is known, and with its bytes at an earlier
    time; where none is kept of exactly this file, its checksum is kept now.

    status: of the file, when it was opened. content: all that was read of it. Raises CheckpointError or ReadError.
    """
    sha256 = hashlib.sha256(content).hexdigest()
    etag = _etag(path)
    if etag is not None and SHA256.fullmatch(etag) and etag != sha256:
        raise _not_the_hubs(path, "SHA-256", sha256, etag)
    if etag is not None and GIT_SHA1.fullmatch(etag) and etag != (found := _git_sha1(content)):
        raise _not_the_hubs(path, "SHA-1 in git", found, etag)
    identity = identity_of(status)
    if (kept := _kept(path, identity)) is None:
        with contextlib.suppress(OSError):  # that this folder cannot be written to is said of the weights
            _keep(path, identity, RangeSums(NO_RANGES, np.zeros(0, np.uint32)), sha256)
    elif kept.file_sha256 != sha256:
        raise differs(path)


def differs(path: Path, what: str = "") -> ReadError:
    """The error to raise where other bytes were read than when the checksums were made. what: of the file."""
    return ReadError(
        f"{path}{what and f': {what}'} does not match its checksum: the disk returned other bytes than it did before. "
        "Start again; if it stays, check the disk and the memory of this machine, and download the file again."
    )


def known_sha256(path: Path) -> str | None:
    """What the Hub has of a file in large file storage, by what huggingface_hub noted when it downloaded it.

    A file that was written to after its note is still meant to be that file: only its bytes can show that it is.
    """
    etag = _etag(path)
    return etag if etag is not None and SHA256.fullmatch(etag) else None


def _etag(path: Path) -> str | None:
    """The Hub's ETag of a file: its SHA-256 in large file storage, else its SHA-1 as a blob of git; None: not known."""
    if (blob := _blob(path)) is not None:
        return blob.name
    try:
        _, etag, noted_at = _note_of(path).read_text(encoding="utf-8")[:1000].split()
        float(noted_at)
    except (OSError, ValueError):
        return None
    return etag


def _blob(path: Path) -> Path | None:
    """The file in huggingface_hub's cache that a link there leads to: its name is its ETag."""
    real = path.resolve()
    return real if real.parent.name == "blobs" else None


def _git_sha1(content: bytes) -> str:
    """The name that git gives a file's contents: https://git-scm.com/book/en/v2/Git-Internals-Git-Objects."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _not_the_hubs(path: Path, kind: str, found: str, expected: str) -> CheckpointError:
    note = _note_of(path)
    on_purpose = f" If you changed it on purpose, remove {note}." if note.exists() else ""
    itself = "it" if (blob := _blob(path)) is None else f"{blob}, where it leads,"
    return CheckpointError(
        f"{path} is not the file that the Hub has: its {kind} is {found}, expected {expected}. "
        f"Delete {itself} and download it again.{on_purpose}"
    )


def _note_of(path: Path) -> Path:
    """Where `hf download --local-dir` notes what it downloaded."""
    return path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"


def _named(path: Path, identity: Identity) -> dict[str, Any]:
    inode, size, mtime_ns, ctime_ns = identity
    return {"path": str(path.resolve()), "inode": inode, "size": size, "mtime_ns": mtime_ns, "ctime_ns": ctime_ns}


def _place(path: Path) -> Path:
    """One for each path, so that the sums of a file that was replaced are replaced."""
    name = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_folder() / SUMS / f"{name}{SUMS_SUFFIX}"


def _kept(path: Path, identity: Identity) -> RangeSums | None:
    """The sums that were made of exactly this file."""
    with contextlib.suppress(OSError), _regular(_place(path)) as file:
        head, rest = file.readline(LONGEST_HEAD), file.read(MOST_BYTES)
        return RangeSums.from_bytes(head + rest, _named(path, identity)) if head.endswith(b"\n") else None
    return None


def _regular(path: Path) -> BinaryIO:
    """Opened for reading, without waiting for what is not a file. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a file")
    return os.fdopen(descriptor, "rb")


def _keep(path: Path, identity: Identity, sums: RangeSums, sha256: str) -> None:
    """Written beside and renamed; no sync, since they have a checksum of their own. Raises OSError."""
    place = _place(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    beside = place.with_name(f"{place.name}.{os.getpid()}{threading.get_native_id()}.partial")
    try:
        beside.write_bytes(sums.to_bytes(_named(path, identity), sha256))
        beside.replace(place)
    finally:
        beside.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    """Removes the sums of files that are gone, and what is none; what cannot be looked at stays."""
    for path in folder.glob(f"*{SUMS_SUFFIX}"):
        with contextlib.suppress(OSError):
            try:
                with _regular(path) as file:
                    head = json.loads(file.readline(LONGEST_HEAD))
                gone = not Path(head["identity"]["path"]).exists()
            except (ValueError, LookupError, TypeError, RecursionError):
                gone = True  # damaged, or of another version
            if gone:
                path.unlink(missing_ok=True)
