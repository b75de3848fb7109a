"""Builds the zoo's model of a checkpoint without reading a weight, and notes where its parameters come from.

A zoo builds the model lazily, from tensors that are handed to it. No family is named here.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..errors import CheckpointError, FlashError, UnsupportedModelError
from ..flash.plain_files import reading, unreadable
from ..flash.safetensors_file import TensorEntry
from ..flash.stored_tensors import is_as_entered, lazily_loaded
from ..source.checkpoint_files import files_in, read_config
from ..source.checkpoint_tensors import malformed, tensors_in
from ..source.compared_copies import no_room, temporary_folder
from ..source.model_kind import error_line
from ..source.quantisation import foreign_quantisation, group_problem
from ..source.zoos import MLX_LM, MLX_VLM, zoo_of
from .mlx_vlm_model import Sanitize, load_by_mlx_vlm
from .provenance import Provenance

MODELOPT = "hf_quant_config.json"  # the zoos use it as config.json's quantization_config
FOLDER = "model_path"  # of a model of mlx-vlm that reads more of its configuration when it is called first
CONFIGURATION = frozenset({"config.json", "generation_config.json", MODELOPT})  # files that the zoos read
UNQUANTISED = (
    "Use a checkpoint in MLX's own quantisation, or convert the unquantised one once: `mlxflash convert --model MODEL "
    "--bits 4 --output OUTPUT`, and run OUTPUT."
)


@dataclass
class LazyModel:
    """The zoo's model of a checkpoint, with its weights unread.

    entries: the checkpoint's tensors -> (index in `files`, entry in that file's header).
    """

    folder: Path
    model: Any
    config: dict[str, Any]
    files: list[Path]
    entries: dict[str, tuple[int, TensorEntry]]
    provenance: Provenance


def open_lazily(folder: Path, small: Path | None = None, zoo: str | None = None, images: bool = False) -> LazyModel:
    """Builds the model without reading a weight.

    small: the folder that its configuration and index are read from; None for `folder`. zoo: the zoo that builds it;
    None for the first that has its type. images: whether it is to read images; then mlx-vlm builds it.

    Raises CheckpointError or UnsupportedModelError.
    """
    small = small or folder
    counted = tensors_in(folder, small)
    files = sorted({file for file, _ in counted.values()})
    numbers = {file: number for number, file in enumerate(files)}
    entries = {name: (numbers[file], entry) for name, (file, entry) in counted.items()}
    zoo = MLX_VLM if images else zoo or zoo_of(read_config(small)) or MLX_LM
    provenance = Provenance(zoo=zoo)

    def watch(sanitize: Sanitize, model: Callable[[], Any]) -> dict[str, Any]:
        weights = provenance.watch(sanitize, lazy_tensors(counted))
        _check_scales(folder, model(), weights)
        return weights

    quantised = _quantised(folder, small, {name: entry.dtype for name, (_, entry) in counted.items()})
    try:
        with _configuration_alone(small) as alone:
            if zoo == MLX_LM:
                model, config = _load_by_mlx_lm(alone, watch)
            else:
                model, config = load_by_mlx_vlm(alone, watch, images)
        if hasattr(type(model), FOLDER):
            setattr(model, FOLDER, str(small))
    except FlashError:
        raise
    except Exception as error:  # the zoos raise plain exceptions
        remedy = "Check that all shards are there and that config.json belongs to them."
        if quantised:
            remedy = f"It is quantised ({quantised}). {UNQUANTISED}"
        raise CheckpointError(f"{zoo} cannot load {folder}: {error_line(error)}. {remedy}") from None
    return LazyModel(folder, model, config, files, entries, provenance)


def _load_by_mlx_lm(
    folder: Path, watch: Callable[[Sanitize, Callable[[], Any]], dict[str, Any]]
) -> tuple[Any, dict[str, Any]]:
    """Calls mlx-lm's `load_model` lazily. Returns (model, configuration).

    The arguments are those of `load_by_mlx_vlm`.
    """
    from mlx_lm.utils import _get_classes, load_model

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        model_class, args_class = _get_classes(config)

        class Watched(model_class):  # type: ignore[misc, valid-type]
            def sanitize(self, _: dict[str, Any]) -> dict[str, Any]:
                return watch(getattr(super(), "sanitize", lambda same: same), lambda: self)

        return Watched, args_class

    return load_model(folder, lazy=True, get_model_classes=classes, trust_remote_code=False)


@contextmanager
def _configuration_alone(folder: Path) -> Iterator[Path]:
    """A temporary folder with only the configuration of `folder`, and one file without tensors.

    Both zoos take every file of tensors in a folder, in the order of the file system.
    """
    with temporary_folder() as alone:
        for name in CONFIGURATION.intersection(files_in(folder)):
            with reading(folder / name):
                content = (folder / name).read_bytes()
            if name == MODELOPT and (problem := _modelopt_problem(content)):
                raise CheckpointError(f"{folder / name}: {problem}. Download the checkpoint again.")
            try:
                (alone / name).write_bytes(content)
            except OSError as error:
                raise no_room(error) from None
        try:
            mx.save_safetensors(str(alone / "model.safetensors"), {})
        except RuntimeError as error:
            raise no_room(error) from None
        yield alone


def _modelopt_problem(content: bytes) -> str | None:
    try:
        return group_problem({"quantization_config": json.loads(content)})
    except (ValueError, RecursionError) as error:
        return error_line(error)


def lazy_tensors(counted: dict[str, tuple[Path, TensorEntry]]) -> dict[str, mx.array]:
    """The tensors in `counted`, by name, not yet read. Raises CheckpointError or ReadError."""
    weights: dict[str, mx.array] = {}
    for file in sorted({file for file, _ in counted.values()}):
        try:
            loaded = lazily_loaded(file)
        except ValueError as error:
            raise malformed(file, error) from None
        for name, array in loaded.items():
            holder, entry = counted.get(name, (None, None))
            if entry is None or (holder == file and not is_as_entered(array, entry)):
                raise unreadable(file, ValueError(f"MLX finds a different tensor {name} in it"), "its header")
            if holder == file:
                weights[name] = array
    return weights


def _check_scales(folder: Path, model: nn.Module, weights: dict[str, mx.array]) -> None:
    """Raises CheckpointError for more scales than numbers. mlx-lm would infer groups of 0, and MLX divide by that."""
    for path, module in model.named_modules():
        scales, weight = weights.get(f"{path}.scales"), module.get("weight")
        if scales is not None and isinstance(weight, mx.array) and scales.shape[-1:] > weight.shape[-1:]:
            raise CheckpointError(
                f"{folder}: {path}.scales has {scales.shape[-1]} columns, but in config.json its matrix has only "
                f"{weight.shape[-1]}. Download the checkpoint again."
            )


def _quantised(folder: Path, small: Path, dtype_of: dict[str, str]) -> str | None:
    """The kind of quantisation if it is not MLX's own, else None. The error names it if mlx-lm cannot read it.

    Raises UnsupportedModelError for a quantisation whose experts mlx-lm unpacks or packs anew while it loads,
    CheckpointError for one that config.json describes wrongly.
    """
    config = read_config(small)
    if problem := group_problem(config):
        raise CheckpointError(f"{folder / 'config.json'}: {problem}. Download the checkpoint again.")
    kind = foreign_quantisation(config, files_in(small), dtype_of)
    if kind and any(name.endswith(".qweight") for name in dtype_of):
        raise UnsupportedModelError(
            f"{folder} is quantised ({kind}), and its weights are not stored in the form that the model computes with. "
            f"{UNQUANTISED}"
        )
    return kind


def read_all(arrays: Iterable[mx.array], folder: Path, what: str) -> None:
    """Reads lazy arrays of a checkpoint, the largest first. what: one of them, for messages. Raises ReadError."""
    for array in sorted(arrays, key=lambda array: array.nbytes, reverse=True):
        try:
            mx.eval(array)
        except RuntimeError as error:  # MLX names neither file nor tensor
            raise unreadable(folder, error, what) from None
