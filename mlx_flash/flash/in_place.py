"""Units that are read from the checkpoint's own files, where they lie."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .inflight import InFlightReads
from .reader import Reader
from .unit_file import Int64Array, UnitFile


@dataclass(frozen=True)
class TensorParts:
    """One tensor of a layer's units, in place: the file and the offset of each unit's part, which is contiguous."""

    file_of: np.ndarray  # int (U,): index of the file
    offsets: np.ndarray  # int64 (U,): bytes
    shape: tuple[int, ...]  # shape of one unit's part
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one unit's part."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.size

    @property
    def is_table(self) -> bool:
        """Whether an expert's part is a vector or a number (a bias, a global scale). Tables are kept, not streamed."""
        return len(self.shape) < 2


@dataclass(frozen=True)
class TableTensor:
    """One tensor of a lookup table, in place: rows of one size, one after the other.

    file: index of the file. begin: offset of the first row, in bytes. rows: number of rows. shape, dtype: of one row.
    """

    file: int
    begin: int
    rows: int
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Bytes of one row."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.size

    def segments(self, groups: Int64Array, group_rows: int) -> tuple[Int64Array, Int64Array]:
        """The offset and the length of groups of rows, in bytes: int64 (n,) -> two int64 (n,). The last group of a
        table may be shorter."""
        rows = np.minimum(group_rows, self.rows - groups * group_rows)
        return self.begin + groups * (group_rows * self.nbytes), rows * self.nbytes

    def rows_at(self, number: int, offset: int, length: int) -> range:
        """The rows that own any of `length` bytes at `offset` of file `number`."""
        first, end = (offset - self.begin) // self.nbytes, -((self.begin - offset - length) // self.nbytes)
        return range(max(0, first), min(self.rows, end)) if number == self.file else range(0)


class InPlaceFiles(InFlightReads):
    """The state that the layers of one model share: the checkpoint's files, the reader's threads, counters."""

    def __init__(self, files: Sequence[UnitFile], reader: Reader) -> None:
        super().__init__(reader, files)
        self.layers: dict[str, dict[str, TensorParts]] = {}  # name of a layer of experts -> its tensors
        self.tensors: dict[str, TensorParts] = {}  # tensors of streamed layers, by name
        self.tables: dict[str, dict[str, TableTensor]] = {}  # name of a lookup table -> its tensors
        for number, file in enumerate(files):
            file.name_of = functools.partial(name_units, self.layers, self.tensors, self.tables, number)

    def verify_unchanged(self) -> None:
        """Raises ReadError if one of the files was changed."""
        for file in self.files:
            file.verify_unchanged()

    def is_lost(self) -> bool:
        """Whether one of the files went away, see `UnitFile.is_lost`."""
        return any(file.is_lost() for file in self.files)

    def close(self) -> None:
        self.reader.close()
        for file in self.files:
            file.close()


def name_units(
    layers: dict[str, dict[str, TensorParts]],
    whole: dict[str, TensorParts],
    tables: dict[str, dict[str, TableTensor]],
    number: int,
    offset: int,
    length: int,
) -> str:
    """Names the experts, the tensor or the rows that own any of `length` bytes at `offset` of a file; "" if none.

    layers, tables: see InPlaceFiles. whole: tensors that are read as a whole. number: index of the file.
    """

    def parts_at(place: TensorParts) -> np.ndarray:
        overlaps = (place.offsets < offset + length) & (place.offsets + place.nbytes > offset)
        return np.flatnonzero(overlaps & (place.file_of == number))

    for layer, tensors in layers.items():
        for tensor, place in tensors.items():
            if len(found := parts_at(place)):
                experts = f"expert {found[0]}" if len(found) == 1 else f"experts {found[0]}-{found[-1]}"
                return f"{layer}, {experts}, {tensor}"
    for name, place in whole.items():
        if len(parts_at(place)):
            return name
    for table, rows in tables.items():
        for tensor, found_in in rows.items():
            if owners := found_in.rows_at(number, offset, length):
                which = f"row {owners[0]}" if len(owners) == 1 else f"rows {owners[0]}-{owners[-1]}"
                return f"{table}, {which}, {tensor}"
    return ""
