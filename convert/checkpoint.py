"""Reads a Hugging Face checkpoint, one tensor at a time."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.defaults import DTYPES
from mlx_flash.errors import CheckpointError
from mlx_flash.flash.plain_files import read_at, reading, reason_of, unreadable
from mlx_flash.flash.safetensors_file import TensorEntry
from mlx_flash.flash.stored_tensors import lazily_loaded
from mlx_flash.layers.quantised import companions
from mlx_flash.source.checkpoint_files import WeightFiles, files_in, read_config, weights_in
from mlx_flash.source.checkpoint_tensors import choose, malformed, tensors_in, two_of_a_name
from mlx_flash.source.config_counts import count_problem
from mlx_flash.source.model_kind import error_line
from mlx_flash.source.quantisation import foreign_quantisation, mlx_settings

# Names of types in safetensors -> in MLX; other types keep their names.
DTYPE_NAMES = {
    **{"BOOL": "bool_", "U8": "uint8", "U16": "uint16", "U32": "uint32", "U64": "uint64", "C64": "complex64"},
    **{"I8": "int8", "I16": "int16", "I32": "int32", "I64": "int64"},
    **{"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"},
}
ROWS_READ = (*DTYPES, "uint32")  # types whose rows can be read without the rest of the tensor


@dataclass(frozen=True)
class Tensor:
    """The location, shape and type of a tensor, known without reading it."""

    shard: Path
    shape: tuple[int, ...]
    dtype: str  # "float16"


class Checkpoint:
    """A folder with `config.json` and `*.safetensors` (or, through torch, `pytorch_model*.bin`).

    Tensors are read only on request; `load` returns a tensor that nothing else refers to. A matrix that mlx-lm
    quantised is listed as one tensor, with the shape and type that it has after unpacking.

    Raises CheckpointError for missing or malformed files, ReadError for files that the disk cannot read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        weights = weights_in(folder)
        self.shards = [folder / name for name in weights.names]
        self._headers: dict[Path, dict[str, TensorEntry]] = {}
        self._stored = self._list_bin(weights) if self.shards[0].suffix == ".bin" else self._list_safetensors()
        longest = max((max(tensor.shape, default=0) for tensor in self._stored.values()), default=0)
        if problem := count_problem(self.config, len(self._stored), longest):
            raise CheckpointError(
                f"{folder / 'config.json'} does not describe this checkpoint: {problem}. Download it again."
            )
        self.tensors = dict(self._stored)
        self._packed: dict[str, tuple[int, int]] = {}  # matrices that mlx-lm quantised -> (group size, bits)
        for name in [name for name, tensor in self._stored.items() if tensor.dtype == "uint32"]:
            self._unpack(name)

    def _list_safetensors(self) -> dict[str, Tensor]:
        found = {}
        for name, (shard, entry) in tensors_in(self.folder).items():
            if shard not in self._headers:
                self._headers[shard] = {}
                try:
                    lazily_loaded(shard)  # raises an error for types that MLX cannot read
                except ValueError as error:
                    raise malformed(shard, error) from None
            self._headers[shard][name] = entry
            found[name] = Tensor(shard, entry.shape, DTYPE_NAMES.get(entry.dtype, entry.dtype))
        return found

    def _list_bin(self, weights: WeightFiles) -> dict[str, Tensor]:
        opened = {shard.name: _open_bin(shard) for shard in self.shards}
        choice = choose(opened, weights.index_map)
        for name, files in choice.doubles.items():
            for other in files[1:]:
                if not _are_equal(opened[files[0]][name], opened[other][name]):
                    raise two_of_a_name(self.folder, name, files[0], other)
        found = {}
        for name, file in choice.chosen.items():
            tensor = opened[file][name]
            found[name] = Tensor(self.folder / file, tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))
        return found

    def _unpack(self, name: str) -> None:
        """Lists a matrix that mlx-lm quantised, in place of its three parts."""
        path, words, parts = name.removesuffix(".weight"), self._stored[name], companions(name)
        if not name.endswith(".weight") or not all(part in self._stored for part in parts):
            return
        scales, biases = (self._stored[part] for part in parts)
        if (settings := mlx_settings(self.config, path)) is None:
            raise CheckpointError(
                f"{self.folder} is quantised by MLX in a way that cannot be unpacked here: its config.json has no "
                f'"quantization" with group_size, bits and the affine mode for {path}. Use the unquantised checkpoint, '
                "or the output of `mlx_lm.convert --dequantize` for this one."
            )
        group_size, bits = settings
        shape = (*scales.shape[:-1], scales.shape[-1] * group_size)
        if scales.shape != biases.shape or (*shape[:-1], shape[-1] * bits) != (*words.shape[:-1], words.shape[-1] * 32):
            raise CheckpointError(
                f"{self.folder}: {name} has shape {words.shape}, its scales {scales.shape}; expected {bits} bits in "
                f"groups of {group_size}, as config.json says. Download the checkpoint again."
            )
        self._packed[name] = settings
        self.tensors[name] = Tensor(words.shard, shape, scales.dtype)
        for part in parts:
            del self.tensors[part]

    def foreign_quantisation(self) -> str | None:
        """The format of packed numbers that cannot be read here, such as "GPTQ, 4 bits"; None for readable ones."""
        dtype_of = {name: tensor.dtype for name, tensor in self.tensors.items()}
        return foreign_quantisation(self.config, files_in(self.folder), dtype_of)

    def load(self, name: str, begin: int = 0, end: int | None = None) -> mx.array:
        """The tensor, or its rows begin to end. Only these rows are read, if the file's format allows it.

        Raises ReadError for errors of the disk, CheckpointError for a file that has changed or is malformed.
        """
        if name not in self._packed:
            return self._load_stored(name, begin, end)
        group_size, bits = self._packed[name]
        words, scales, biases = (self._load_stored(part, begin, end) for part in (name, *companions(name)))
        try:
            matrix = mx.dequantize(words, scales, biases, group_size=group_size, bits=bits)
            mx.eval(matrix)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(f"{self.folder}: {name} cannot be unpacked ({error_line(error)}).") from None
        return matrix

    def _load_stored(self, name: str, begin: int, end: int | None) -> mx.array:
        shard, dtype = self._stored[name].shard, self._stored[name].dtype
        whole = begin == 0 and end is None
        try:
            if shard.suffix == ".bin":
                tensor = _open_bin(shard)[name]
                return _from_torch(tensor if whole else tensor[begin:end])
            if not whole and dtype in ROWS_READ:
                return _rows_of(shard, self._headers[shard][name], getattr(mx, dtype), begin, end)
            tensor = lazily_loaded(shard)[name]
            tensor = tensor if whole else tensor[begin:end]
            mx.eval(tensor)
        except (RuntimeError, TypeError, ValueError, OSError, EOFError) as error:
            entry = self._headers.get(shard, {}).get(name)
            whole_file = entry is None or shard.stat().st_size >= entry.end
            # From MLX, whose message names no file, or from the system.
            if whole_file and isinstance(error, (RuntimeError, OSError)):
                raise unreadable(shard, error, f"tensor {name}") from None
            text = reason_of(error)
            raise CheckpointError(f"{shard}: tensor {name} cannot be read ({text}). Download it again.") from None
        return tensor

    def files(self) -> dict[str, Any]:
        """The identity of the weights: for each file, its size and the SHA-256 of its first MiB (header and names)."""
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
    except Exception as error:  # torch raises a dozen kinds for a damaged file.
        text = str(error)
        if wanted := re.search(r"(?i)unsupported (?:global: )?GLOBAL (\S+)", text):
            # torch's own message also explains how to load the file nevertheless, so it is not shown.
            raise CheckpointError(
                f"{shard} holds more than tensors: reading it would call {wanted[1]}, which was not done. Do not use "
                "this file; look for a checkpoint with *.safetensors."
            ) from None
        if "_use_new_zipfile_serialization" in text:
            raise CheckpointError(
                f"{shard} is in the format of PyTorch before 1.6, which cannot be read one tensor at a time. Load and "
                "save it with a newer torch (torch.load with weights_only=True, torch.save), or use *.safetensors."
            ) from None
        raise CheckpointError(f"{shard} cannot be read by torch: {error}. Download it again.") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise CheckpointError(
            f"{shard} does not hold named tensors; expected a model's weights. Download the checkpoint again."
        )
    return tensors


def _are_equal(one: Any, two: Any) -> bool:
    import torch

    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(one, two)


def _from_torch(tensor: Any) -> mx.array:
    import torch

    if tensor.dtype == torch.bfloat16:
        return mx.array(tensor.contiguous().view(torch.uint16).numpy()).view(mx.bfloat16)
    return mx.array(tensor.contiguous().numpy())
