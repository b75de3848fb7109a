"""The tensors of safetensors files, read by MLX. Errors name the file and the tensor, and checksums are verified."""

from __future__ import annotations

import contextlib
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx

from ..errors import CorruptStoreError
from .files import AGAIN
from .host_arrays import to_bytes
from .plain_files import reading, reason_of, unreadable
from .safetensors_file import TensorEntry, crc32_of, read_header

SAFETENSORS_NAMES = {
    mx.bool_: "BOOL",
    mx.uint8: "U8",
    mx.int8: "I8",
    mx.uint16: "U16",
    mx.int16: "I16",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.float32: "F32",
    mx.uint64: "U64",
    mx.int64: "I64",
    mx.complex64: "C64",
}


def lazily_loaded(path: Path) -> dict[str, mx.array]:
    """The tensors of a safetensors file, not yet read. Raises ReadError, or ValueError if it is not such a file."""
    try:
        loaded: Any = mx.load(str(path))
        return dict(loaded)
    except RuntimeError as error:
        if "[read]" in str(error):
            raise unreadable(path, error, "its header") from None
        raise ValueError(str(error)) from None


def is_as_entered(array: mx.array, entry: TensorEntry) -> bool:
    """Whether MLX, which reads the header itself, found the shape and the dtype of `entry`."""
    same_type = entry.dtype == SAFETENSORS_NAMES[array.dtype]
    return tuple(array.shape) == entry.shape and (same_type or (entry.dtype[:3] == "F8_" and array.dtype == mx.uint8))


def evaluated(array: mx.array, path: Path, name: str, entry: TensorEntry | None = None) -> mx.array:
    """The same array, read from its file. entry: its entry in the file's header, if known.

    Raises ReadError. The array must not be used after an error, because MLX then treats it as evaluated.
    """
    try:
        mx.eval(array)
    except RuntimeError as error:  # MLX says only that it could not read
        problem: Exception = error
        with contextlib.suppress(OSError):
            if entry is not None and (size := path.stat().st_size) < entry.end:
                problem = EOFError(f"the file ends at byte {size}, before byte {entry.end}")
        raise unreadable(path, problem, f"tensor {name}") from None
    return array


class StoredTensors:
    """The tensors of a safetensors file. Each is verified against its CRC-32 when it is taken.

    `arrays` holds the tensors that were not taken yet. They are not read: only their shape, dtype and size are used.

    Raises ReadError if the file cannot be read, CorruptStoreError if its header does not match the checksums.
    """

    def __init__(self, path: Path, sums: dict[str, int], again: str = AGAIN) -> None:
        """sums: tensor name -> CRC-32, with the header's under the empty name. again: the remedy named in errors."""
        self.path, self.again, self._sums = path, again, sums
        try:
            with reading(path, "its header"):
                self.header, self.entries = read_header(path)
            if zlib.crc32(self.header) != sums.get(""):
                raise CorruptStoreError(f"{path}: its header does not match its checksum. {again}")
            self.arrays = lazily_loaded(path)
        except ValueError as error:
            raise CorruptStoreError(f"{path} cannot be read: {reason_of(error)}. {again}") from None
        for name in self.arrays.keys() | self.entries.keys() | sums.keys() - {""}:
            array, entry = self.arrays.get(name), self.entries.get(name)
            if array is None or entry is None or name not in sums or not is_as_entered(array, entry):
                raise CorruptStoreError(f"{path}: tensor {name} is not the one that its checksum belongs to. {again}")

    def take(self, name: str) -> mx.array:
        """Reads a tensor as it is stored. Raises KeyError, ReadError, or CorruptStoreError if its checksum differs."""
        array = evaluated(self.arrays.pop(name), self.path, name, self.entries[name])
        if zlib.crc32(to_bytes(array).data) != self._sums[name]:
            raise self._damaged(name)
        return array

    def compare(self, names: Iterable[str]) -> None:
        """Compares the bytes of tensors in the file with their checksums, with one piece in memory at a time.

        Raises the errors of `take`.
        """
        with reading(self.path), self.path.open("rb") as file:
            for name in names:
                entry = self.entries[name]
                file.seek(entry.begin)
                if crc32_of(file, entry.end - entry.begin)[0] != self._sums[name]:
                    raise self._damaged(name)

    def _damaged(self, name: str) -> CorruptStoreError:
        return CorruptStoreError(f"{self.path}: tensor {name} does not match its checksum. {self.again}")
