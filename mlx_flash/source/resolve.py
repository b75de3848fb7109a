"""Turns the value of --model into a folder: a store, a checkpoint to convert first, or a repository to download."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConversionError, UsageError
from ..flash.files import VERSION, is_store
from ..flash.plain_files import reason_of
from ..flash.safetensors_file import sha256_of
from .cached import cache_folder, entries, remember
from .checkpoint_files import SMALL_FILES, about_gguf, files_in, matching, weights_in
from .children import run_child

if TYPE_CHECKING:
    from filelock import FileLock


def demo_folder() -> Path:
    """The packaged demo model: an unconverted checkpoint."""
    return Path(str(files("mlx_flash.demo").joinpath("model")))


def find_checkpoint(
    model: str, revision: str | None = None, say: Callable[[str], None] = lambda _: None, fetch: bool = True
) -> Path:
    """The folder of a checkpoint or store, named by a local folder or a Hugging Face repository id.

    A repository is looked up in huggingface_hub's cache. fetch: whether it may be downloaded from the Hub.

    Raises UsageError if there is no such folder, repository or revision, CheckpointError if the repository holds no
    model, ConversionError if the Hub cannot be reached.
    """
    try:
        folder = Path(model).expanduser()
        is_folder, exists = folder.is_dir(), folder.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name too long, ~ of an unknown user, a zero byte
        raise UsageError(f"{model:.80} cannot be a folder: {error}.") from None
    if not model:
        raise UsageError("--model is empty; leave it out for the demo model.")
    if is_folder:
        if revision is not None:
            raise UsageError(f"{model} is a folder; only a Hugging Face repository has a revision. Leave it out.")
        return folder
    if exists:
        found = f"{model} is a file; expected the folder of a checkpoint or a store, or a repository id."
        raise UsageError(f"{found} {about_gguf([model])}".rstrip())
    if model.count("/") != 1 or model.startswith((".", "/", "~")):
        away = " If it is on another volume, connect that." if model.startswith(("/", "~")) else ""
        raise UsageError(f"{model} is neither a folder nor a Hugging Face repository id (owner/name).{away}")
    from .hub import download

    return download(model, revision, say, fetch=fetch)


def resolve_source(model: str | None, revision: str | None, say: Callable[[str], None], fetch: bool = True) -> Path:
    """The folder of the store or checkpoint that `model` names: a folder or a repository id; None: the demo model.

    Raises the errors of `find_checkpoint`, and UsageError for a folder that holds neither a store nor a checkpoint.
    """
    if model is None and revision is not None:
        raise UsageError("a revision was given without a repository. Name one with --model, or leave the revision out.")
    source = demo_folder() if model is None else find_checkpoint(model, revision, say, fetch)
    if not is_store(source) and "config.json" not in files_in(source):
        found = f"{source} holds neither a store (manifest.json) nor a checkpoint (config.json)."
        raise UsageError(f"{found} {about_gguf([path.name for path in source.iterdir()])}".rstrip())
    return source


def find_store(model: str | None, say: Callable[[str], None] = lambda _: None, revision: str | None = None) -> Path:
    """The store for a store's folder, a checkpoint's folder or a repository id; None: the demo model."""
    return ensure_store(resolve_source(model, revision, say), model, say)


def ensure_store(source: Path, model: str | None, say: Callable[[str], None]) -> Path:
    """`source` itself if it is a store, else the store that it is converted to. model: the name that the user gave.

    A checkpoint is converted once, into the cache folder. A separate process does it, so that its memory does not count
    as this process's. A second process that wants the same store waits for the first.
    """
    if is_store(source):
        return source
    target, size = cached_store_path(source, model)
    if not is_store(target):
        _convert_into_cache(source, target, size, say)
        remember(target, source)
        older = [
            entry for entry in entries(target.parent) if entry.superseded and entry.source == str(source.resolve())
        ]
        if older:
            size = sum(entry.nbytes for entry in older)
            say(
                f"note: {size / 1e9:.2f} GB of older stores of {source} remain; `mlxflash cache` lists and removes them"
            )
    else:
        remember(target, source)
    return target


def cached_store_path(source: Path, model: str | None) -> tuple[Path, int]:
    """(path of a checkpoint's store in the cache folder, bytes of the checkpoint's weights)."""
    # Small files are identified by their content, because a copy may change their times. Weights are identified by size
    # and time, because hashing them would take minutes.
    weights = {name: (source / name).stat() for name in weights_in(source).names}
    state = [[name, status.st_size, status.st_mtime_ns] for name, status in weights.items()]
    small = {name: sha256_of(source / name) for name in matching(files_in(source), SMALL_FILES)}
    identity = hashlib.sha256(json.dumps([str(source.resolve()), small, state, VERSION]).encode()).hexdigest()[:12]
    if model is None:
        name = "demo"
    else:
        name = source.resolve().name if Path(model).expanduser().is_dir() else model.replace("/", "--")
    return cache_folder() / f"{name}-{identity}", sum(status.st_size for status in weights.values())


def _convert_into_cache(source: Path, target: Path, size: int, say: Callable[[str], None]) -> None:
    waiting = f"waiting for another process that is converting {source}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        lock = _acquired(target.parent / f".{target.name}.lock", waiting, say)
    except OSError as error:
        raise ConversionError(
            f"cannot write to the cache folder {target.parent}: {reason_of(error)}. Set MLX_FLASH_CACHE to another "
            "folder."
        ) from None
    try:
        # The converter's own lock, held by a conversion that was started by hand, or that is ending after its parent.
        its_own = Path(f"{os.path.realpath(target)}.lock")
        if not is_store(target) and its_own.exists():
            _acquired(its_own, waiting, say).release()
        if is_store(target):
            return
        say(f"converting {source} ({size / 1e6:.1f} MB), once, into {target}")
        command = [sys.executable, "-m", "mlx_flash.convert", "--model", str(source), "--output", str(target)]
        if run_child(command):
            raise ConversionError(
                f"{source} could not be converted (see above). If the disk of {target.parent} is the reason, set "
                "MLX_FLASH_CACHE to a folder on another one."
            )
    finally:
        lock.release()  # `with lock` would acquire it a second time, and release it only once.


def _acquired(path: Path, waiting: str, say: Callable[[str], None]) -> FileLock:
    """Acquires and returns the lock; says `waiting` if it has to wait."""
    from filelock import FileLock, Timeout

    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(waiting)
        lock.acquire()
    return lock
