"""Writes safetensors files one tensor at a time, and returns checksums of the bytes written."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.flash.host_arrays import to_bytes
from mlx_flash.flash.stored_tensors import SAFETENSORS_NAMES
from mlx_flash.flash.system import sync_to_disk


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], mx.Dtype, Callable[[], mx.array | Iterable[mx.array]]]],
    progress: Callable[[int], None] = lambda _: None,
    metadata: dict[str, str] | None = None,
    written: Callable[[dict[str, int]], None] = lambda _: None,
) -> dict[str, int]:
    """Writes the tensors (name, shape, dtype, load) in the given order, with one in memory at a time.

    The file is written under another name, fsynced and renamed. load: returns the tensor, or yields its rows in pieces.
    progress: called with the number of bytes written since its last call. written: called with the checksums before the
    rename.

    Returns the CRC-32 of every tensor, and that of the header under the empty name. They are made from the bytes in
    memory that were passed to the system, not from what the disk returns.
    """
    entries = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "mlx", **(metadata or {})}}
    position = 0
    for name, shape, dtype, _ in entries:
        size = int(np.prod(shape, dtype=np.int64)) * dtype.size
        header[name] = {
            "dtype": SAFETENSORS_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    text = len(text).to_bytes(8, "little") + text
    sums = {"": zlib.crc32(text)}
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(text)
        for name, _, dtype, load in entries:
            loaded, crc = load(), 0
            for piece in (loaded,) if isinstance(loaded, mx.array) else loaded:
                data = to_bytes(piece.astype(dtype))
                crc = zlib.crc32(data.data, crc)
                file.write(data.data)
                progress(len(data))
            sums[name] = crc
        file.flush()
        sync_to_disk(file.fileno())
    written(sums)
    partial.replace(path)
    return sums
