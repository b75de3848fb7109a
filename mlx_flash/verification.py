"""`--verify`: sums of the units that are read in place from a checkpoint, made once and kept in the cache folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .cached import SUMS, SUMS_SUFFIX
from .errors import CheckpointError
from .finding import cache_folder
from .flash.reader import Reader, UnitFile
from .flash.system import sync_to_disk
from .flash.unit_sums import Ranges, RangeSums, make_sums

SHA256 = re.compile("[0-9a-f]{64}")
LONGEST_HEAD = 64 << 10  # bytes of the first line of such a file


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
        expected = known_sha256(file.path)
        if (kept := _kept(file, ranges, expected)) is not None:
            file.sums = kept
        else:
            missing.append((file, ranges, expected))
    if not missing:
        return
    unknown = [file.path.name for file, _, sha256 in missing if sha256 is None]
    if unknown:
        say(
            f"note: no SHA-256 from the Hub is known of {len(unknown)} of {len(files)} files ({unknown[0]}...): their "
            "checksums are made of what they hold now"
        )
    total = sum(file.size for file, _, _ in missing)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verifying", disable=total < 500e6, leave=False) as bar:
        for file, ranges, expected in missing:
            digest = hashlib.sha256()
            sums = make_sums(file, reader, ranges, digest.update, bar.update)
            if expected is not None and digest.hexdigest() != expected:
                note = _note_of(file.path)
                on_purpose = f" If you changed it on purpose, remove {note}." if note.exists() else ""
                raise CheckpointError(
                    f"{file.path} is not the file that the Hub has: its SHA-256 is {digest.hexdigest()}, expected "
                    f"{expected}. Delete it and download it again.{on_purpose}"
                )
            file.sums = sums
            try:
                _keep(file, sums, digest.hexdigest())
            except OSError as error:
                say(f"note: the checksums of {file.path.name} cannot be kept, the next run makes them again: {error}")


def known_sha256(path: Path) -> str | None:
    """What the Hub has of a file in large file storage, by what huggingface_hub noted when it downloaded it.

    A file that was written to after its note is still meant to be that file: only its bytes can show that it is.
    """
    real = path.resolve()
    if real.parent.name == "blobs" and SHA256.fullmatch(real.name):  # in its cache a file's name is its ETag
        return real.name
    try:
        _, etag, noted_at = _note_of(path).read_text(encoding="utf-8")[:1000].split()
        float(noted_at)
    except (OSError, ValueError):
        return None
    return etag if SHA256.fullmatch(etag) else None


def _note_of(path: Path) -> Path:
    """Where `hf download --local-dir` notes what it downloaded."""
    return path.parent / ".cache" / "huggingface" / "download" / f"{path.name}.metadata"


def _identity(file: UnitFile) -> dict[str, Any]:
    inode, size, mtime_ns, ctime_ns = file.identity
    path = str(file.path.resolve())
    return {"path": path, "inode": inode, "size": size, "mtime_ns": mtime_ns, "ctime_ns": ctime_ns}


def _place(file: UnitFile) -> Path:
    """One for each path, so that the sums of a file that was replaced are replaced."""
    name = hashlib.sha256(str(file.path.resolve()).encode(errors="surrogateescape")).hexdigest()[:32]
    return cache_folder() / SUMS / f"{name}{SUMS_SUFFIX}"


def _kept(file: UnitFile, ranges: Ranges, expected: str | None) -> RangeSums | None:
    """The sums that were made of this file, if it had the expected SHA-256 then (None: any)."""
    path = _place(file)
    try:
        if path.stat().st_size > LONGEST_HEAD + 20 * len(ranges.offsets):
            return None
        data = path.read_bytes()
    except OSError:
        return None
    return RangeSums.from_bytes(data, _identity(file), ranges, expected)


def _keep(file: UnitFile, sums: RangeSums, sha256: str) -> None:
    """Written beside, flushed to the disk, renamed. Sums of files that are gone are removed."""
    path = _place(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(path.parent)
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with beside.open("wb") as target:
            target.write(sums.to_bytes(_identity(file), sha256))
            target.flush()
            sync_to_disk(target.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _remove_stale(folder: Path) -> None:
    for path in folder.glob(f"*{SUMS_SUFFIX}"):
        try:
            with path.open("rb") as file:
                head = json.loads(file.readline(LONGEST_HEAD))
            gone = not Path(head["identity"]["path"]).exists()
        except (ValueError, LookupError, TypeError):
            gone = True  # damaged, or of another version
        if gone:
            path.unlink(missing_ok=True)
