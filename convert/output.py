"""The output folder of a conversion, and the renames at the end. A kill at any moment loses nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from tqdm import tqdm

from mlx_flash.errors import ConversionError, NoSpaceError, ReadError, StoreError, UsageError
from mlx_flash.flash.files import FORMAT, MANIFEST, RECORD, Manifest, is_store
from mlx_flash.flash.plain_files import reading
from mlx_flash.flash.safetensors_file import tensor_checksums
from mlx_flash.flash.system import sync_to_disk
from mlx_flash.source.ssd_writes import CONVERSIONS, count_written

from .sums import WrittenSums

SPARE_BYTES = 64 << 20
INDEX, LAST_FILE = "model.safetensors.index.json", "config.json"  # the last files of a checkpoint in MLX's form


@contextlib.contextmanager
def taken(output: Path, source: Path, overwrite: bool) -> Iterator[Path]:
    """Keeps other processes from converting into `output` meanwhile. Yields its resolved path.

    source: the checkpoint's folder. overwrite: whether an existing store may be replaced. Errors inside the context are
    turned into sentences.

    Raises UsageError (the output exists), NoSpaceError or ConversionError.
    """
    if not Path(os.path.realpath(output)).name:
        raise UsageError(f"--output {output} is the root of the file system. Choose a folder.")
    # Resolved, so that a link stays a link and the partial folder is on the disk that it leads to.
    output = Path(os.path.realpath(output))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{output}.lock").acquire(timeout=0) as lock:
            try:
                recover(output)
                refuse_to_replace(output, source, overwrite)
                yield output
            finally:  # Remove it while it is held: a process that opened it meanwhile notices that, and tries again.
                with contextlib.suppress(OSError):
                    os.unlink(lock.lock_file)
    except Timeout:
        if not Path(f"{output}.lock").exists():  # filelock retries until its timeout if it cannot make the file.
            raise ConversionError(
                f"cannot write {output}: no file can be made in its folder. Choose an --output elsewhere."
            ) from None
        raise ConversionError(f"another process is converting into {output}. Wait for it, or stop it.") from None
    except (StoreError, ReadError) as error:  # in the partial folder, or in a file of the checkpoint
        raise ConversionError(str(error)) from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise NoSpaceError(
                f"the disk of {output} is full. The finished part is kept in {output}.partial. Make room and run the "
                "same command again to continue, or remove that folder."
            ) from None
        if not os.path.lexists(f"{output}.partial"):
            raise ConversionError(f"cannot write {output}: {error}. Choose an --output elsewhere.") from None
        raise ConversionError(
            f"cannot write {output}: {error}. The finished part is kept. Fix the problem, then run the same command "
            "again to continue."
        ) from None


class PartialFolder:
    """The folder `output` + ".partial", which becomes the output when it is complete."""

    written: WrittenSums  # checksums of its files, once it is claimed
    _sources: dict[Path, tuple[int, int, int] | None]

    def __init__(self, output: Path) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".partial")

    def claim(self, key: dict[str, Any], sources: Iterable[Path]) -> WrittenSums:
        """Continues a partial conversion of the same input, or starts a new one. Returns the log of its checksums.

        key: all that the output depends on. sources: the files of weights that are read; they must stay as they are
        until `check_sources`. Raises UsageError for a folder that is not left over from a conversion.
        """
        self._sources = {path: _state_of(path) for path in sources}
        wanted = json.dumps(key, sort_keys=True).encode()
        record = self.path / RECORD
        if self.path.is_symlink() or (self.path.exists() and not self.path.is_dir()):
            raise UsageError(f"{self.path} is in the way: the conversion needs a folder there. Remove it.")
        with reading(record):
            is_same = record.is_file() and record.read_bytes() == wanted
        if is_same:
            tqdm.write(f"continuing the conversion in {self.path}", file=sys.stderr)
        else:
            self._start(record)
            record.write_bytes(wanted)
            fsync(record)
        self.written = WrittenSums(self.path)
        return self.written

    def _start(self, record: Path) -> None:
        if self.path.exists():
            present = sorted(self.path.iterdir(), key=lambda path: path == record)
            if present and present[-1] != record:
                raise UsageError(f"{self.path} is not left over from a conversion (no {RECORD}). Move it away.")
            tqdm.write(f"note: {self.path} belongs to another input; starting again", file=sys.stderr)
            for path in present:  # The record goes last, so that after a kill this function still knows the folder.
                path.unlink()
        self.path.mkdir(exist_ok=True)

    def check_free_space(self, needed: int, what: str) -> None:
        """Raises NoSpaceError if `what`, which needs so many bytes in all, does not fit on the disk."""
        present = sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())
        needed = needed + needed // 50 + SPARE_BYTES - present
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise NoSpaceError(
                f"{what} needs {needed / 1e9:.2f} GB more at {self.output}, where {free / 1e9:.2f} GB are free. "
                "Make room, or choose an --output on another disk."
            )

    def is_finished(self, name: str) -> bool:
        """Whether a safetensors file exists and holds exactly what was written. Raises ReadError."""
        path = self.path / name
        if (sums := self.written.of(name)) is None or not path.exists():
            return False
        try:
            with reading(path):
                return tensor_checksums(path) == sums
        except ValueError:
            return False

    def check_sources(self) -> None:
        """Raises ConversionError if a file of weights changed or vanished since `claim`.

        The output may be made of its old and its new bytes, so it must not be completed.
        """
        for path, state in self._sources.items():
            if _state_of(path) != state:
                raise ConversionError(
                    f"{path} changed or vanished while it was converted. Leave the checkpoint as it is, and run the "
                    "same command again; it starts again."
                )

    def rename(self, is_work_file: Callable[[str], bool]) -> None:
        """Renames the folder, which is now complete, to the output. `recover` handles a kill at any point.

        is_work_file: whether a file, by its name, does not belong to the output.
        """
        files = list(self.path.iterdir())
        count_written(CONVERSIONS, sum(path.stat().st_size for path in files))
        for path in files:
            if is_work_file(path.name) and path.name != RECORD:
                path.unlink()
        replaced = replaced_path(self.output)
        if is_store(self.output):
            self.output.rename(replaced)
        self.path.rename(self.output)
        fsync(self.output.parent)
        # The record is removed last: a partial folder without one would not be recognised as ours.
        (self.output / RECORD).unlink()
        fsync(self.output)
        if replaced.exists():
            shutil.rmtree(replaced)


def _state_of(path: Path) -> tuple[int, int, int] | None:
    """Changes with every change of a file that does not hide itself; None if it is gone."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def is_our_store(folder: Path) -> bool:
    """Whether a folder is a store, even a damaged one. Other programs also write a file manifest.json."""
    path = folder / MANIFEST
    if not path.is_file():
        return False
    with reading(path):
        return (folder / Manifest.neurons_file).exists() or FORMAT.encode() in path.read_bytes()


def replaced_path(output: Path) -> Path:
    """The path of a store that is being replaced, between two renames."""
    return output.with_name(f".{output.name}.replaced")


def recover(output: Path) -> None:
    """Completes or undoes renames that a kill interrupted."""
    replaced = replaced_path(output)
    if replaced.is_dir():
        if is_store(output):
            shutil.rmtree(replaced)
        elif not output.exists():
            replaced.rename(output)
    if is_store(output) or all((output / name).is_file() for name in (INDEX, LAST_FILE)):
        (output / RECORD).unlink(missing_ok=True)


def refuse_to_replace(output: Path, source: Path, overwrite: bool) -> None:
    """Raises UsageError if the output exists, unless it is an empty folder or, with `overwrite`, a store."""
    checkpoint = source.resolve()
    if output == checkpoint or output in checkpoint.parents:
        raise UsageError(f"--output {output} holds the checkpoint itself. Choose another --output.")
    if not output.exists():
        return
    if not output.is_dir():
        raise UsageError(f"--output {output} is a file. Choose another --output.")
    if is_our_store(output):
        if not overwrite:
            raise UsageError(
                f"{output} is already a complete store. Choose another --output, or replace it with --overwrite."
            )
    elif any(output.iterdir()):
        raise UsageError(f"{output} is a folder with other files in it, not a store. Choose another --output.")


def fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        sync_to_disk(descriptor)
    finally:
        os.close(descriptor)


def publish(folder: Path, manifest: Manifest) -> None:
    """Makes sure that every file is on the disk, then writes the manifest, which makes the folder a store."""
    for name in manifest.files:
        fsync(folder / name)
    fsync(folder)
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        file.write(manifest.to_json())
        file.flush()
        sync_to_disk(file.fileno())
    fsync(folder)
