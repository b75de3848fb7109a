"""Units that are read from the checkpoint's own files, where they lie."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from .inflight import InFlightReads
from .reader import Reader
from .unit_file import UnitFile


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


class InPlaceFiles(InFlightReads):
    """The state that the layers of one model share: the checkpoint's files, the reader's threads, counters."""

    def __init__(self, files: Sequence[UnitFile], reader: Reader) -> None:
        super().__init__(reader)
        self.files = files
        self.layers: dict[str, dict[str, TensorParts]] = {}  # name of a layer of experts -> its tensors
        self.tensors: dict[str, TensorParts] = {}  # tensors of streamed layers, by name
        for number, file in enumerate(files):
            file.name_of = functools.partial(name_units, self.layers, self.tensors, number)

    def verify_unchanged(self) -> None:
        """Raises ReadError if one of the files was changed."""
        for file in self.files:
            file.verify_unchanged()

    def close(self) -> None:
        self.reader.close()
        for file in self.files:
            file.close()


def name_units(
    layers: dict[str, dict[str, TensorParts]], whole: dict[str, TensorParts], number: int, offset: int, length: int
) -> str:
    """Names the experts, or else the tensor, that own any of `length` bytes at `offset` of file `number`; "" if none.

    layers: see InPlaceFiles. whole: tensors that are read as a whole.
    """

    def parts_at(place: TensorParts) -> np.ndarray:
        overlaps = (place.offsets < offset + length) & (place.offsets + place.nbytes > offset)
        return np.flatnonzero(overlaps & (place.file_of == number))

    for layer, tensors in layers.items():
        for tensor, place in tensors.items():
            if len(found := parts_at(place)):
                experts = f"expert {found[0]}" if len(found) == 1 else f"experts {found[0]}-{found[-1]}"
                return f"{layer}, {experts}, {tensor}"
    return next((name for name, place in whole.items() if len(parts_at(place))), "")
