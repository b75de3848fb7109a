"""`--verify`: checksums of the parts of a checkpoint that are read, made once and kept in the cache folder."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ..errors import CheckpointError, ReadError
from ..flash.reader import Reader
from ..flash.unit_file import UnitFile, identity_of
from ..flash.unit_sums import Ranges, RangeSums, make_sums
from ..source.cached import SUMS, SUMS_SUFFIX, cache_folder
from ..source.ssd_writes import CHECKSUMS, count_written, write_beside

Identity = tuple[int, int, int, int]  # the result of `identity_of`
SHA256 = re.compile("[0-9a-f]{64}")
GIT_SHA1 = re.compile("[0-9a-f]{40}")
NO_RANGES = Ranges(np.zeros(0, np.int64), np.zeros(0, np.int64))
LONGEST_HEAD = 64 << 10  # most bytes of the first line of a file of sums
MOST_BYTES = 256 << 20  # most bytes of the rest, with 20 for each range


def attach_sums(files: Sequence[UnitFile], units: Sequence[Ranges], reader: Reader, say: Callable[[str], None]) -> None:
    """Attaches sums to the files, so that from now on every read is compared with them.

    Sums may be kept from an earlier time, for exactly these files. Files without such sums are read once. They are
    compared with the SHA-256 that the Hub has of them, if it is known here.

    units: for each file, the ranges that will be read of it.
    Raises CheckpointError if a file differs from the Hub's, ReadError if one cannot be read.
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
            f"note: no SHA-256 from the Hub is known for {len(unknown)} of {len(files)} files ({unknown[0]}...): their "
            "checksums are made from their present contents"
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
                say(f"note: the checksums of {file.path.name} cannot be kept; the next run makes them again: {error}")


def compare_small_file(path: Path, status: os.stat_result, content: bytes) -> None:
    """Compares a small file with the Hub's checksum, if it is known, and with the checksum kept at an earlier time. If
    none is kept for exactly this file, its checksum is kept now.

    status: the file's status when it was opened. content: its whole contents. Raises CheckpointError or ReadError.
    """
    sha256 = hashlib.sha256(content).hexdigest()
    etag = _etag(path)
    if etag is not None and SHA256.fullmatch(etag) and etag != sha256:
        raise _not_the_hubs(path, "SHA-256", sha256, etag)
    if etag is not None and GIT_SHA1.fullmatch(etag) and etag != (found := _git_sha1(content)):
        raise _not_the_hubs(path, "SHA-1 in git", found, etag)
    identity = identity_of(status)
    if (kept := _kept(path, identity)) is None:
        with contextlib.suppress(OSError):  # `attach_sums` notes that the cache folder cannot be written to
            _keep(path, identity, RangeSums(NO_RANGES, np.zeros(0, np.uint32)), sha256)
    elif kept.file_sha256 != sha256:
        raise differs(path)


def differs(path: Path, what: str = "") -> ReadError:
    """The error for bytes that differ from those that the checksums were made of. what: the part of the file."""
    return ReadError(
        f"{path}{what and f': {what}'} does not match its checksum: the disk returned other bytes than it did before. "
        "Start again. If the error persists, check the disk and the memory of this machine, and download the file "
        "again."
    )


def known_sha256(path: Path) -> str | None:
    """The Hub's SHA-256 of a file in large file storage, as huggingface_hub noted it at the download; None if unknown.

    A file that was written to after its note should still be that file. Only its bytes can show that it is.
    """
    etag = _etag(path)
    return etag if etag is not None and SHA256.fullmatch(etag) else None


def _etag(path: Path) -> str | None:
    """The Hub's ETag of a file: its SHA-256 in large file storage, else its SHA-1 as a git blob; None if unknown."""
    if (blob := _blob(path)) is not None:
        return blob.name
    try:
        _, etag, noted_at = _note_of(path).read_text(encoding="utf-8")[:1000].split()
        float(noted_at)
    except (OSError, ValueError):
        return None
    return etag


def _blob(path: Path) -> Path | None:
    """The file that a link in huggingface_hub's cache leads to, or None. Its name is its ETag."""
    real = path.resolve()
    return real if real.parent.name == "blobs" else None


def _git_sha1(content: bytes) -> str:
    """Git's name for a file's contents (https://git-scm.com/book/en/v2/Git-Internals-Git-Objects)."""
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
    """The file in which `hf download --local-dir` notes a file's download."""
    return path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"


def _named(path: Path, identity: Identity) -> dict[str, Any]:
    inode, size, mtime_ns, ctime_ns = identity
    return {"path": str(path.resolve()), "inode": inode, "size": size, "mtime_ns": mtime_ns, "ctime_ns": ctime_ns}


def _place(path: Path) -> Path:
    """The file for a path's sums. There is one for each path, so that a replaced file replaces its sums."""
    name = hashlib.sha256(str(path.resolve()).encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_folder() / SUMS / f"{name}{SUMS_SUFFIX}"


def _kept(path: Path, identity: Identity) -> RangeSums | None:
    """The sums that are kept for exactly this file, or None."""
    with contextlib.suppress(OSError), _regular(_place(path)) as file:
        head, rest = file.readline(LONGEST_HEAD), file.read(MOST_BYTES)
        return RangeSums.from_bytes(head + rest, _named(path, identity)) if head.endswith(b"\n") else None
    return None


def _regular(path: Path) -> BinaryIO:
    """Opens a regular file for reading, without blocking on any other kind. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(f"{path} is not a file")
    return os.fdopen(descriptor, "rb")


def _keep(path: Path, identity: Identity, sums: RangeSums, sha256: str) -> None:
    """Writes sums, without a sync: they have their own checksum. Raises OSError."""
    place = _place(path)
    place.parent.mkdir(parents=True, exist_ok=True)
    data = sums.to_bytes(_named(path, identity), sha256)
    write_beside(place, data)
    count_written(CHECKSUMS, len(data))


def _remove_stale(folder: Path) -> None:
    """Removes sums of files that are gone, and files without valid sums. A file that cannot be read stays."""
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
