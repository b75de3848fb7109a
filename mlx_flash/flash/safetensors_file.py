"""Headers of safetensors files, validated as they are read, and the checksums of a store's files."""

from __future__ import annotations

import hashlib
import json
import math
import os
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

CHUNK_BYTES = 4 << 20
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors itself
DTYPE_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}


@dataclass(frozen=True)
class TensorEntry:
    """One tensor of a safetensors file, as its header has it."""

    dtype: str  # the name in safetensors, such as "F16"
    shape: tuple[int, ...]
    begin: int  # bytes from the start of the file
    end: int


def read_header(path: Path) -> tuple[bytes, dict[str, TensorEntry]]:
    """The header of a safetensors file, including its length field, and the tensors in the order of their bytes.

    The tensors cover every byte after the header, and each has the size that its shape and dtype need. Otherwise this
    raises ValueError with the reason. A size that the file claims is checked before memory is allocated for it.
    """
    with path.open("rb") as file:
        data = header_bytes(file)
        return data, entries_of(data, os.fstat(file.fileno()).st_size)


def header_bytes(file: BinaryIO, most: int = MAX_HEADER_BYTES) -> bytes:
    """The header of a safetensors file from its beginning, including its length field, not yet parsed.

    Raises ValueError if the file claims a header of more than `most` bytes, or more than it has.
    """
    file_bytes = os.fstat(file.fileno()).st_size
    prefix = file.read(8)
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or length > min(most, file_bytes - 8):
        raise ValueError(f"its header claims {length} bytes, the file has {file_bytes}")
    text = file.read(length)
    if len(text) < length:
        raise ValueError("its header is not a JSON object")
    return prefix + text


def entries_of(data: bytes, file_bytes: int) -> dict[str, TensorEntry]:
    """The tensors of a header, with its length field, of a file of so many bytes; see `read_header`."""
    text = data[8:]
    try:
        header = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its header is not valid JSON ({error})") from None
    if not isinstance(header, dict):
        raise ValueError("its header is not a JSON object")
    if any("\ud800" <= character <= "\udfff" for character in "".join(header)):
        raise ValueError("its header names a tensor with half of a surrogate pair, which is not valid text")
    start = len(data)
    entries = [(name, _entry(name, fields, start)) for name, fields in header.items() if name != "__metadata__"]
    entries.sort(key=lambda item: (item[1].begin, item[1].end))
    position = start
    for name, entry in entries:
        if entry.begin != position:
            raise ValueError(f"tensor {name} begins at byte {entry.begin}, expected {position}")
        position = entry.end
    if position != file_bytes:
        raise ValueError(f"its tensors end at byte {position}, the file at {file_bytes}")
    return dict(entries)


def _entry(name: str, fields: Any, start: int) -> TensorEntry:
    try:
        dtype, shape, (begin, end) = fields["dtype"], tuple(fields["shape"]), fields["data_offsets"]
        numbers_are_sound = all(type(n) is int and 0 <= n < 1 << 62 for n in (*shape, begin, end)) and begin <= end
        numbers_are_sound = numbers_are_sound and all(n < 1 << 31 for n in shape)  # MLX's dimensions are 32 bits wide
        if not numbers_are_sound or not isinstance(dtype, str):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise ValueError(f"its header's entry for tensor {name} is malformed") from None
    if dtype in DTYPE_BYTES and math.prod(shape) * DTYPE_BYTES[dtype] != end - begin:
        raise ValueError(f"tensor {name} has {end - begin} bytes, too many or too few for {dtype} {list(shape)}")
    return TensorEntry(dtype, shape, start + begin, start + end)


def crc32_of(file: BinaryIO, count: int) -> tuple[int, int]:
    """(CRC-32, bytes read) of the next `count` bytes, or of what is left of the file."""
    crc, left = 0, count
    while left and (chunk := file.read(min(left, CHUNK_BYTES))):
        crc = zlib.crc32(chunk, crc)
        left -= len(chunk)
    return crc, count - left


def tensor_checksums(path: Path) -> dict[str, int]:
    """CRC-32 of every tensor of a safetensors file, and of its header under the empty name."""
    header, entries = read_header(path)
    sums = {"": zlib.crc32(header)}
    with path.open("rb") as file:
        for name, entry in entries.items():
            file.seek(entry.begin)
            sums[name] = crc32_of(file, entry.end - entry.begin)[0]
    return sums


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
