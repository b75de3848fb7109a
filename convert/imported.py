"""Predictors that others have published: PowerInfer's, `model_0.pt`, `model_1.pt`, ... (convert/FORMAT.md)."""

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
LEAST_WEIGHT = 1e-3  # of a norm, against its largest: what is smaller erases an input


def find_predictors(source: str, say: Callable[[str], None] = lambda _: None) -> Path:
    """A local folder, or a Hugging Face repository through huggingface_hub's cache (`mlx_flash.source.hub.download`).

    Raises UsageError for what is neither, CheckpointError if the repository holds no predictors, ConversionError if
    it cannot be downloaded.
    """
    folder = Path(source).expanduser()
    if source and folder.is_dir():
        return folder
    if folder.exists() or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source):
        raise UsageError(
            f"--predictor-from {source} is neither a folder nor a Hugging Face repository id (owner/name). Expected "
            f"one with {NAME.format(0)}, {NAME.format(1)} and so on, one for each layer."
        )
    from mlx_flash.source.hub import download

    return download(source, say=say, choose=_predictors_among)


def _predictors_among(names: Collection[str], _: Callable[[str], str], where: object) -> list[str]:
    """Those of a repository's files that are to be downloaded. Raises CheckpointError if there are none."""
    if not (found := matching(names, [NAME.format("*")])):
        raise CheckpointError(f"{where} holds no predictors: expected {NAME.format(0)}, {NAME.format(1)} and so on.")
    return found


def find_files(folder: Path, layers: int) -> list[Path]:
    """One file for each layer, in order. Raises UsageError if they are not exactly those of a model of `layers`."""
    found = {path.name for path in folder.glob(NAME.format("*"))}
    expected = [NAME.format(layer) for layer in range(layers)]
    if missing := [name for name in expected if name not in found]:
        raise UsageError(
            f"{folder} lacks predictors of {len(missing)} of {layers} layers, the first is {missing[0]}. "
            "Expected the folder of PowerInfer's predictor files, made for this very model."
        )
    if extra := sorted(found - set(expected)):
        raise UsageError(f"{folder} has {extra[0]}, but the model has {layers} layers. They do not belong together.")
    return [folder / name for name in expected]


def check_files(paths: list[Path], neurons: int, width: int) -> None:
    """Before anything is written. Needs torch; only shapes are read. Raises CheckpointError."""
    for path in paths:
        found = _open(path, mmap=True)
        first, second = (tuple(found[name].shape) for name in TENSORS)
        _check_shapes(first, second, neurons, width, path)


def read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """The two matrices of a layer, (r, D) and (F, r), float32. Needs torch. Raises CheckpointError."""
    found = _open(path, mmap=False)  # a page of a mapped file that cannot be read would kill this process
    first, second = (found[name].float().numpy() for name in TENSORS)
    return first, second


def _open(path: Path, mmap: bool) -> dict[str, Any]:
    """Torch's tensors; with mmap not yet read."""
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{path.name} is a PyTorch file; reading it needs torch: `pip install 'mlx-flash-runtime[convert]'`."
        ) from None
    try:
        found: Any = torch.load(path, mmap=mmap, weights_only=True, map_location="cpu")
    except Exception as error:  # torch raises a dozen kinds for a damaged file
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"{path} cannot be read by torch: {text}. Download it again.") from None
    names = sorted(found) if isinstance(found, dict) else []
    if names != list(TENSORS) or not all(isinstance(found[name], torch.Tensor) for name in TENSORS):
        what = ", ".join(map(str, names[:4])) or type(found).__name__
        raise CheckpointError(f"{path} holds {what:.200}; expected the tensors {' and '.join(TENSORS)} and no others.")
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

    They score what *enters* the norm before the FFN, p: relu(p fc1^T) fc2^T; ours see its result. For an RMS norm
    x = p w / rms(p), and for a layer norm x = (p - mean(p)) w / deviation(p) + v. There are no biases between, so
    a factor of p is one of the scores and does not change their signs: a = fc1^T / w and h = -(v / w) fc1^T give
    the same choice. What is lost is a layer norm's mean(p), which is taken to be 0. norm: None where the FFN takes
    the residual itself.

    Raises CheckpointError if the shapes are not (r, D) and (F, r), or numbers are not finite; or if the norm erases
    an input.
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
