"""Chooses the tensor that counts if several files of a checkpoint have one of the same name (docs/checkpoints.md)."""

from __future__ import annotations

import zipfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..errors import CheckpointError
from ..flash.plain_files import read_at, reading
from ..flash.safetensors_file import CHUNK_BYTES, TensorEntry, read_header
from .checkpoint_files import weights_in
from .model_kind import error_line


@dataclass(frozen=True)
class Choice:
    """The files chosen for the tensors of a checkpoint.

    chosen: tensor -> file. doubles: tensor -> all files that have it, for tensors where neither the index nor a single
    holder decides.
    """

    chosen: dict[str, str]
    doubles: dict[str, list[str]]


def choose(held: Mapping[str, Collection[str]], index_map: Mapping[str, str]) -> Choice:
    """Chooses the file that counts for every tensor. The result depends on names alone, not on the order of `held`.

    It is the file that the index names. Without an index, or if that file lacks the tensor, it is the file that has it.
    If several have it, the tensor is listed in `doubles`, and the caller must check that they hold the same bytes.

    held: file -> names of its tensors. index_map: tensor -> file, from the index.
    """
    holders: dict[str, list[str]] = {}
    for file in sorted(held):
        for name in held[file]:
            holders.setdefault(name, []).append(file)
    chosen, doubles = {}, {}
    for name, files in holders.items():
        wanted = index_map.get(name)
        chosen[name] = wanted if wanted in files else files[0]
        if wanted not in files and len(files) > 1:
            doubles[name] = files
    return Choice(chosen, doubles)


def tensors_in(folder: Path, small: Path | None = None) -> dict[str, tuple[Path, TensorEntry]]:
    """Name -> (file, entry) of every tensor that counts in a checkpoint of safetensors files.

    Only headers are read, and the bytes of tensors that are in several files. small: folder from which the index is
    read; None: `folder`.

    Raises CheckpointError for invalid files, and for two different tensors of one name if no index names a file.
    Raises ReadError for files that cannot be read.
    """
    weights = weights_in(folder, small)
    if weights.names[0].endswith(".bin"):
        raise CheckpointError(
            f"{folder} has only PyTorch files ({weights.names[0]}), but this model is read in place from safetensors "
            "files. Look for a checkpoint with *.safetensors."
        )
    headers = {name: entries_of(folder / name) for name in weights.names}
    choice = choose(headers, weights.index_map)
    for name, files in choice.doubles.items():
        first = files[0]
        for other in files[1:]:
            if not _same(folder / first, headers[first][name], folder / other, headers[other][name]):
                raise two_of_a_name(folder, name, first, other)
    return {name: (folder / file, headers[file][name]) for name, file in choice.chosen.items()}


def two_of_a_name(folder: Path, name: str, first: str, other: str) -> CheckpointError:
    return CheckpointError(
        f"{folder}: the tensor {name} is in {first} and, with other values, in {other}, and no index says which one "
        "counts. Remove the file that does not belong to the checkpoint, or download it again."
    )


def entries_of(file: Path) -> dict[str, TensorEntry]:
    """Tensor -> entry, from the header of a safetensors file. Raises CheckpointError or ReadError."""
    try:
        with reading(file, "its header"):
            return read_header(file)[1]
    except ValueError as error:
        raise malformed(file, error) from None


def malformed(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is not a valid safetensors file: {error_line(error)}. Download it again.")


def _same(first: Path, one: TensorEntry, other: Path, two: TensorEntry) -> bool:
    if (one.dtype, one.shape) != (two.dtype, two.shape):
        return False
    left = one.end - one.begin
    pieces = [np.empty(min(left, CHUNK_BYTES), np.uint8) for _ in range(2)]
    with reading(first), first.open("rb") as a, reading(other), other.open("rb") as b:
        for begin in range(0, left, CHUNK_BYTES):
            count = min(CHUNK_BYTES, left - begin)
            read_at(a, one.begin + begin, pieces[0][:count])
            read_at(b, two.begin + begin, pieces[1][:count])
            if not np.array_equal(pieces[0][:count], pieces[1][:count]):
                return False
    return True


@dataclass(frozen=True)
class Extent:
    """The size of a checkpoint. The counts in its configuration are compared with it before a model is built."""

    tensors: int
    longest: int  # the longest dimension of any tensor


def extent_of(folder: Path, small: Path | None = None) -> Extent:
    """The Extent of a checkpoint, from its headers.

    Only torch can read the shapes in a PyTorch file, so its list of contents and its size are used instead.
    small: folder from which the index is read; None: `folder`. Raises CheckpointError or ReadError.
    """
    tensors = longest = 0
    for name in weights_in(folder, small).names:
        file = folder / name
        if file.suffix == ".bin":
            tensors += _entries_of_bin(file)
            longest = max(longest, file.stat().st_size)
        else:
            entries = entries_of(file)
            tensors += len(entries)
            longest = max(longest, *(max(entry.shape, default=0) for entry in entries.values()), 0)
    return Extent(tensors, longest)


def _entries_of_bin(file: Path) -> int:
    """The number of arrays in a PyTorch file; 0 if it is not one (torch reports that later)."""
    try:
        with zipfile.ZipFile(file) as archive:
            return len(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return 0
