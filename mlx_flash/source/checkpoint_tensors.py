"""Which tensor of a checkpoint counts, where several files have one of its name (docs/checkpoints.md)."""

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
    """chosen: tensor -> file. doubles: of those that nothing decides between, tensor -> all files that have it."""

    chosen: dict[str, str]
    doubles: dict[str, list[str]]


def choose(held: Mapping[str, Collection[str]], index_map: Mapping[str, str]) -> Choice:
    """For every tensor, the file whose tensor counts; names alone decide, in no order but their own.

    The file that the index names; where there is no index, or that file does not have the tensor, the one that has
    it. Several that have it must hold the same bytes, which is for the caller to see: they are `doubles`.

    held: file -> names of its tensors. index_map: tensor -> file, as the index has it.
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
    """Name -> (file, entry) of every tensor that counts of a checkpoint in safetensors files; headers are read, and
    of tensors that stand in several files the bytes. small: where the index is read; None: in the folder.

    Raises CheckpointError for what cannot be read, and for two tensors of one name between which nothing decides.
    """
    weights = weights_in(folder, small)
    if weights.names[0].endswith(".bin"):
        raise CheckpointError(
            f"{folder} has PyTorch files only ({weights.names[0]}), and its tensors are read where they lie, in "
            "safetensors files. Look for a checkpoint with *.safetensors."
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
        f"{folder}: the tensor {name} stands in {first} and, with other numbers, in {other}, and no index says which "
        "counts. Remove the file that does not belong to the checkpoint, or download it again."
    )


def entries_of(file: Path) -> dict[str, TensorEntry]:
    """The header of a safetensors file. Raises CheckpointError or ReadError."""
    try:
        with reading(file, "its header"):
            return read_header(file)[1]
    except ValueError as error:
        raise malformed(file, error) from None


def malformed(file: Path, error: Exception) -> CheckpointError:
    return CheckpointError(f"{file} is no readable safetensors file: {error_line(error)}. Download it again.")


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
    """How much a checkpoint holds: what its configuration claims is compared with this before a model is built."""

    tensors: int
    longest: int  # dimension of any of them


def extent_of(folder: Path, small: Path | None = None) -> Extent:
    """From headers alone; of PyTorch files, whose shapes only torch knows, from their lists of contents and sizes.

    small: where the index is read; None: in the folder.
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
    """How many arrays a PyTorch file has; 0 if it is not one, which is for torch to say."""
    try:
        with zipfile.ZipFile(file) as archive:
            return len(archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return 0
