"""Reading a Hugging Face checkpoint one tensor at a time."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.checkpoint_files import weights_in
from mlx_flash.defaults import DTYPES
from mlx_flash.errors import CheckpointError
from mlx_flash.flash.checksums import TensorEntry, read_header
from mlx_flash.flash.plain_files import read_at, reading, unreadable
from mlx_flash.stored_tensors import lazily_loaded


@dataclass(frozen=True)
class Tensor:
    """Where a tensor is and what it is, known without reading it."""

    shard: Path
    shape: tuple[int, ...]
    dtype: str  # "float16"


class Checkpoint:
    """A folder with `config.json` and `*.safetensors` (or, through torch, `pytorch_model*.bin`).

    Nothing is read before it is asked for; `load` returns a tensor that nobody else holds.
    Raises CheckpointError for what is missing or malformed, ReadError for what the disk cannot read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        config_path = folder / "config.json"
        if not config_path.is_file():
            raise CheckpointError(
                f"{folder} has no config.json: expected the folder of a Hugging Face checkpoint, with config.json, "
                "model*.safetensors and tokenizer files."
            )
        try:
            with reading(config_path):
                self.config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise CheckpointError(f"{config_path} is not valid JSON: {error}. Download the checkpoint again.") from None
        if not isinstance(self.config, dict):
            raise CheckpointError(f"{config_path} holds no JSON object. Download the checkpoint again.")
        self.shards = weights_in(folder)
        self._headers: dict[Path, dict[str, TensorEntry]] = {}
        self.tensors: dict[str, Tensor] = {}
        for shard in self.shards:
            for name, tensor in self._open(shard).items():
                dtype = str(tensor.dtype).removeprefix("mlx.core.").removeprefix("torch.")
                self.tensors.setdefault(name, Tensor(shard, tuple(tensor.shape), dtype))

    def _open(self, shard: Path) -> dict[str, Any]:
        """Name -> tensor, not yet read."""
        if shard.suffix == ".bin":
            return _open_bin(shard)
        try:
            if shard not in self._headers:
                with reading(shard, "its header"):
                    self._headers[shard] = read_header(shard)[1]
            return lazily_loaded(shard)
        except ValueError as error:
            raise CheckpointError(f"{shard} is no readable safetensors file: {error}. Download it again.") from None

    def load(self, name: str, begin: int = 0, end: int | None = None) -> mx.array:
        """The tensor, or rows begin to end of it; of those files only these are read.

        Raises ReadError for the disk's errors, CheckpointError for a file that is not what it was.
        """
        shard, dtype = self.tensors[name].shard, self.tensors[name].dtype
        whole = begin == 0 and end is None
        try:
            if shard.suffix == ".bin":
                tensor = self._open(shard)[name]
                return _from_torch(tensor if whole else tensor[begin:end])
            if not whole and dtype in DTYPES:
                return _rows_of(shard, self._headers[shard][name], getattr(mx, dtype), begin, end)
            tensor = self._open(shard)[name]
            tensor = tensor if whole else tensor[begin:end]
            mx.eval(tensor)
        except (RuntimeError, TypeError, ValueError, OSError, EOFError) as error:
            entry = self._headers.get(shard, {}).get(name)
            whole_file = entry is None or shard.stat().st_size >= entry.end
            if whole_file and isinstance(error, (RuntimeError, OSError)):  # MLX's, which names nothing, or the system's
                raise unreadable(shard, error, f"tensor {name}") from None
            raise CheckpointError(f"{shard}: tensor {name} cannot be read ({error}). Download it again.") from None
        return tensor

    def files(self) -> dict[str, Any]:
        """What identifies the weights: per file its size and a checksum of its first MiB (header and names)."""
        result = {}
        for shard in self.shards:
            with reading(shard), shard.open("rb") as file:
                head = hashlib.sha256(file.read(1 << 20)).hexdigest()
            result[shard.name] = {"bytes": shard.stat().st_size, "head_sha256": head}
        return result


def _rows_of(shard: Path, entry: TensorEntry, dtype: mx.Dtype, begin: int, end: int | None) -> mx.array:
    begin, end, _ = slice(begin, end).indices(entry.shape[0])
    row_bytes = (entry.end - entry.begin) // entry.shape[0]
    count = (end - begin) * row_bytes
    data = np.empty(count, np.uint8)
    with shard.open("rb", buffering=0) as file:
        read_at(file, entry.begin + begin * row_bytes, data)
    return mx.array(data).view(dtype).reshape(end - begin, *entry.shape[1:])


def _open_bin(shard: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{shard.name} is a PyTorch file; reading it needs torch: `pip install 'mlx-flash-runtime[convert]'`, "
            "or use a checkpoint with *.safetensors."
        ) from None
    try:
        tensors = torch.load(shard, mmap=True, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        text = str(error)
        if wanted := re.search(r"(?i)unsupported (?:global: )?GLOBAL (\S+)", text):
            # Its own sentence also says how to load the file all the same.
            raise CheckpointError(
                f"{shard} holds more than tensors: reading it would call {wanted[1]}, which was not done. Do not use "
                "this file; look for a checkpoint with *.safetensors."
            ) from None
        if "_use_new_zipfile_serialization" in text:
            raise CheckpointError(
                f"{shard} is in the format of PyTorch before 1.6, which cannot be read a tensor at a time. Load and "
                "save it with a newer torch (torch.load with weights_only=True, torch.save), or use *.safetensors."
            ) from None
        raise CheckpointError(f"{shard} cannot be read by torch: {error}. Download it again.") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(f"{shard} holds something else than named tensors. Expected a model's weights.")
    return tensors


def _from_torch(tensor: Any) -> mx.array:
    import torch

    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.contiguous().view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.contiguous().numpy())
