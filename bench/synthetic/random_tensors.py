"""Writes checkpoints of random tensors, one tensor in memory at a time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.convert.tensors import write_safetensors
from mlx_flash.errors import UsageError

from .opt_checkpoint import copy_tokenizer

SHARD_BYTES = 4e9
Load = Callable[[], mx.array]
RandomTensor = tuple[str, tuple[int, ...], mx.Dtype, Load]
"""Name, shape, dtype, and a function that makes the array."""


def must_be_new(output: Path) -> None:
    """Raises UsageError unless a folder is empty or does not exist."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(f"{output} exists already. Choose another --output.")


def write_random(
    output: Path,
    tensors_of: Callable[[int], Iterable[RandomTensor]],
    config_of: Callable[[int], dict[str, Any]],
) -> int:
    """Writes a checkpoint to a temporary folder and renames it, so that it is complete. Returns its bytes.

    tensors_of, config_of: the tensors and the configuration for a size of the vocabulary, which is the demo model's.
    """
    from mlx_flash.text.tokenizer import load_tokenizer

    with complete(output) as partial_folder:
        vocabulary = len(load_tokenizer(partial_folder).vocab)
        tensors = list(tensors_of(vocabulary))
        size = bytes_of(tensors)
        must_fit(size, partial_folder, output, "fewer --layers or another --output")
        with tqdm(total=size, unit="B", unit_scale=True, desc="synthetic weights", dynamic_ncols=True) as bar:
            shards = _in_shards(tensors)
            places: dict[str, str] = {}
            for number, shard in enumerate(shards):
                name = f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
                write_safetensors(partial_folder / name, shard, bar.update)
                places |= {tensor[0]: name for tensor in shard}
        index = {"metadata": {"total_size": size}, "weight_map": places}
        (partial_folder / "model.safetensors.index.json").write_text(json.dumps(index))
        config = config_of(vocabulary)
        (partial_folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return size


@contextmanager
def complete(output: Path) -> Iterator[Path]:
    """Yields a temporary folder with the demo model's tokenizer. It is renamed at the end, so `output` is complete."""
    partial_folder = output.with_name(output.name + ".partial")
    shutil.rmtree(partial_folder, ignore_errors=True)
    partial_folder.mkdir(parents=True)
    try:
        copy_tokenizer(partial_folder)
        yield partial_folder
        if output.exists():
            output.rmdir()
        partial_folder.rename(output)
    except BaseException:
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise


def bytes_of(tensors: Iterable[tuple[str, tuple[int, ...], mx.Dtype, Any]]) -> int:
    """Bytes of tensors, given as in `RandomTensor`."""
    return sum(int(np.prod(dims, dtype=np.int64)) * kind.size for _, dims, kind, _ in tensors)


def must_fit(size: int, folder: Path, output: Path, remedy: str) -> None:
    """Raises UsageError if `size` bytes do not fit on the disk of a folder. remedy: what to choose instead."""
    if (free := shutil.disk_usage(folder).free) < 1.02 * size:
        raise UsageError(
            f"the checkpoint needs {size / 1e9:.1f} GB at {output}, where {free / 1e9:.1f} GB are free. "
            f"Choose {remedy}."
        )


def packed(
    path: str, quantisation: Mapping[str, Any], dims: tuple[int, ...], spread: float, dtype: mx.Dtype, seed: list[int]
) -> Iterator[RandomTensor]:
    """A quantised matrix, or one per expert: random packed bits, with scales that give the numbers that spread."""
    bits, group = quantisation["bits"], quantisation["group_size"]
    *rest, columns = dims
    words_of, scales = (*rest, columns * bits // 32), (*rest, columns // group)

    def words() -> mx.array:
        return mx.array(np.random.default_rng(seed).integers(0, 2**32, words_of, np.uint32, endpoint=False))

    yield f"{path}.weight", words_of, mx.uint32, words
    if quantisation.get("mode") == "mxfp4":  # scales are exponents; the numbers' spread is about 2.9
        yield f"{path}.scales", scales, mx.uint8, partial(mx.full, scales, 127 + round(np.log2(spread / 2.9)), mx.uint8)
        return
    step = spread / (2**bits / 12**0.5)  # for evenly spread numbers
    yield f"{path}.scales", scales, dtype, partial(mx.full, scales, step, dtype)
    yield f"{path}.biases", scales, dtype, partial(mx.full, scales, -step * (2**bits - 1) / 2, dtype)


def _in_shards(tensors: list[Any]) -> list[list[Any]]:
    shards: list[list[Any]] = [[]]
    filled = 0.0
    for tensor in tensors:
        size = float(np.prod(tensor[1], dtype=np.int64)) * tensor[2].size
        if filled and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0.0
        shards[-1].append(tensor)
        filled += size
    return shards


def normal(seed: list[int], dims: tuple[int, ...], spread: float, mean: float, dtype: mx.Dtype) -> mx.array:
    """Normal random numbers of a shape."""
    values = np.random.default_rng(seed).standard_normal(dims, dtype=np.float32)
    return mx.array(values * np.float32(spread) + np.float32(mean)).astype(dtype)
