"""Imports published predictors: PowerInfer's files `model_0.pt`, `model_1.pt`, ... (convert/FORMAT.md)."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np

from mlx_flash.errors import CheckpointError, UsageError
from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.source.checkpoint_files import matching

NAME = "model_{}.pt"
TENSORS = ("fc1.weight", "fc2.weight")
LEAST_WEIGHT = 1e-3  # A smaller weight of a norm, relative to its largest, erases an input.


def find_predictors(source: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """The folder of predictor files: a local one, or that of a Hugging Face repository (`mlx_flash.source.hub`).

    Raises UsageError if `source` is neither, CheckpointError if the repository holds no predictors, ConversionError if
    it cannot be downloaded.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise UsageError(
            f"--predictor-from {source} is neither a folder nor a Hugging Face repository id (owner/name). Expected "
            f"one with {NAME.format(0)}, {NAME.format(1)} and so on, a file for each layer."
        )
    from mlx_flash.source.hub import download

    return download(source, say=say, choose=_predictors_among)


def _predictors_among(names: Collection[str], _: Callable[[str], str], where: object) -> list[str]:
    """The predictor files of a repository. Raises CheckpointError if there are none."""
    if not (found := matching(names, [NAME.format("*")])):
        raise CheckpointError(f"{where} holds no predictors: expected {NAME.format(0)}, {NAME.format(1)} and so on.")
    return found


def find_files(folder: Path, layers: int) -> list[Path]:
    """One file for each layer, in order. Raises UsageError if files are missing or there are too many."""
    found = {path.name for path in folder.glob(NAME.format("*"))}
    expected = [NAME.format(layer) for layer in range(layers)]
    if missing := [name for name in expected if name not in found]:
        raise UsageError(
            f"{folder} lacks predictors of {len(missing)} of {layers} layers, the first is {missing[0]}. "
            "Expected the folder of PowerInfer's predictor files for exactly this model."
        )
    if extra := sorted(found - set(expected)):
        raise UsageError(f"{folder} has {extra[0]}, but the model has {layers} layers. They do not belong together.")
    return [folder / name for name in expected]


def check_files(paths: list[Path], neurons: int, width: int) -> None:
    """Checks the files before anything is written. Needs torch; only shapes are read. Raises CheckpointError."""
    for path in paths:
        found = _open(path, mmap=True)
        first, second = (tuple(found[name].shape) for name in TENSORS)
        _check_shapes(first, second, neurons, width, path)


def read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The two matrices of a layer, (r, D) and (F, r), float32. Needs torch. Raises CheckpointError."""
    found = _open(path, mmap=False)  # A page of a mapped file that cannot be read would kill this process.
    first, second = (found[name].float().numpy() for name in TENSORS)
    return first, second


def _open(path: Path, mmap: bool) -> dict[str, Any]:
    """The tensors of a file; with mmap they are not read yet. Raises CheckpointError."""
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path.name} is a PyTorch file; reading it needs torch: `pip install 'mlx-flash-runtime[convert]'`."
        ) from None
    try:
        found: Any = torch.load(path, mmap=mmap, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises a dozen kinds for a damaged file.
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read by torch: {text}. Download it again.") from None
    names = sorted(found) if isinstance(found, dict) else []
    if names != list(TENSORS) or not all(isinstance(found[name], torch.Tensor) for name in TENSORS):
        what = ", ".join(map(str, names[:4])) or type(found).__name__
        raise CheckpointError(f"{path} holds {what:.200}; expected only the tensors {' and '.join(TENSORS)}.")
    return found


def _check_shapes(first: tuple[int, ...], second: tuple[int, ...], neurons: int, width: int, where: Path) -> None:
    if len(first) != 2 or not first[0] or first[1] != width or second != (neurons, first[0]):
        raise CheckpointError(
            f"{where} has {TENSORS[0]} {first} and {TENSORS[1]} {second}; expected (r, {width}) and ({neurons}, r). "
            "Was it made for this model?"
        )


def map_layer(
    matrices: tuple[np.ndarray, np.ndarray], norm: nn.Module | None, neurons: int, width: int, where: Path
) -> dict[str, np.ndarray]:
    """One layer's matrices as the arrays of an ImportedPredictor: a (D, r), h (r,), b (r, F); float32.

    PowerInfer's predictors take the *input* p of the norm before the FFN: relu(p fc1^T) fc2^T. Ours take the norm's
    output x. For an RMS norm, x = p w / rms(p); for a layer norm, x = (p - mean(p)) w / deviation(p) + v. They have no
    biases, so a positive factor of p is a factor of the scores and does not change their signs. Therefore
    a = fc1^T / w and h = -(v / w) fc1^T choose the same neurons. Only mean(p) of a layer norm is lost; it is taken to
    be 0.

    norm: None if the FFN takes the residual itself.

    Raises CheckpointError if the shapes are not (r, D) and (F, r), if numbers are not finite, or if the norm erases an
    input.
    """
    first, second = matrices
    _check_shapes(first.shape, second.shape, neurons, width, where)
    if not all(np.isfinite(matrix).all() for matrix in matrices):
        raise CheckpointError(f"{where} has numbers that are not finite. Download it again.")
    a, shift = first.T, np.zeros(width, np.float32)
    if norm is not None and "weight" in norm:
        weight = to_numpy(norm.weight, np.float32)
        if np.abs(weight).min() < LEAST_WEIGHT * np.abs(weight).max():
            raise CheckpointError(
                f"{where} cannot be used: the norm before this layer's FFN erases inputs that the predictor needs. "
                "Convert without --predictor-from."
            )
        a = a / weight[:, None]
        if "bias" in norm:
            shift = to_numpy(norm.bias, np.float32)
    return {"a": a.copy(), "h": -shift @ a, "b": second.T.copy()}
