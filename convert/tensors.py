"""Writing safetensors one tensor at a time, and the raw bytes of MLX arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.flash.system import sync_to_disk

SAFETENSORS_NAMES = {
    mx.float32: "F32",
    mx.float16: "F16",
    mx.bfloat16: "BF16",
    mx.uint32: "U32",
    mx.int32: "I32",
    mx.uint8: "U8",
}


def to_bytes(array: mx.array) -> np.ndarray:
    """The array's elements in row order as uint8 (n,)."""
    return np.array(mx.contiguous(array).reshape(-1).view(mx.uint8))


def write_safetensors(
    path: Path,
    tensors: Iterable[tuple[str, tuple[int, ...], mx.Dtype, Callable[[], mx.array | Iterable[mx.array]]]],
    progress: Callable[[int], None] = lambda _: None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Writes (name, shape, dtype, load) in the given order, one in memory at a time; beside, fsynced, renamed.

    load gives the tensor, or one after another the pieces that its rows are cut into.
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
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, dtype, load in entries:
            loaded = load()
            for piece in (loaded,) if isinstance(loaded, mx.array) else loaded:
                data = to_bytes(piece.astype(dtype))
                file.write(data.data)
                progress(len(data))
        file.flush()
        sync_to_disk(file.fileno())
    partial.replace(path)
