"""What the bits of a context depend on: contexts of another key are never used.

The key errs on the safe side. Where it differs although the bits would not, a conversation is read again.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from .. import __version__
from ..errors import FlashError
from ..flash.files import MANIFEST
from ..flash.safetensors_file import sha256_of
from ..layers.cache_parts import parts_of
from ..source.adapter_files import CONFIG, WEIGHTS
from ..source.cached import cache_folder
from ..source.conversation_folder import CONVERSATIONS, ConversationFolder
from ..text.conversation_files import ConversationFiles

PACKAGES = ("mlx", "mlx-lm", "mlx-vlm", "numpy")
DESCRIPTIONS = ("config.json", MANIFEST)
WEIGHT_ENDINGS = (".safetensors", ".bin")
# Variables that choose kernels, another BLAS, or the number of its threads, which may change the order of sums.
ARITHMETIC = re.compile(r"MLX_(?!FLASH_)|LD_PRELOAD$|DYLD_INSERT_LIBRARIES$|OPENBLAS_|OMP_NUM_THREADS$|VECLIB_")


def conversation_files(model: Any, most_bytes: int | None, note: Callable[[str], None]) -> ConversationFiles | None:
    """The files of a loaded model's conversations. most_bytes: of those of all models; 0 for none, None for a share.

    note: called with a sentence about each kind of trouble. None if nothing is kept.
    """
    if most_bytes == 0 or model.flash.folder is None:
        return None
    try:
        key = conversation_key(model)
        root = cache_folder() / CONVERSATIONS
    except (OSError, FlashError) as error:
        note(f"note: conversations are not kept on the disk: {error}")
        return None
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    about = {"model": key["folder"], "key": key}
    return ConversationFiles(
        ConversationFolder(root, f"{_label(Path(key['folder']))}-{digest}", about, most_bytes), model, note
    )


def conversation_key(model: Any) -> dict[str, Any]:
    """All that decides about the bits of a loaded model's contexts, as plain JSON. Raises OSError."""
    flash = model.flash
    folder: Path = flash.folder.resolve()
    device = mx.device_info()
    drafting, setting = flash.drafting, flash.setting
    return {
        "mlx_flash": __version__,
        "packages": {name: _version(name) for name in PACKAGES},
        "device": [str(mx.default_device()), *(str(device.get(name)) for name in ("architecture", "device_name"))],
        "system": [platform.system(), platform.machine(), platform.mac_ver()[0]],
        "compiler": shutil.which("g++") is not None,  # without it, MLX's CPU backend does not fuse
        "environment": {name: os.environ[name] for name in sorted(os.environ) if ARITHMETIC.match(name)},
        "folder": str(folder),
        "files": _files(folder),
        "adapter": None if flash.adapter is None else [sha256_of(flash.adapter / name) for name in (CONFIG, WEIGHTS)],
        "model": f"{type(model).__module__}.{type(model).__qualname__}",
        "images": flash.images is not None,
        "predictor": [flash.predictor, None if setting is None else [setting.target, *setting.shifts]],
        "chunk": flash.prefill_tokens,
        "drafts": None if drafting is None else str(drafting.kind),
        "cache": [_described(part) for part in parts_of(make_prompt_cache(model))],
    }


def _files(folder: Path) -> list[list[Any]]:
    """Small files that describe the model by their SHA-256, weights by size and times: hashing takes minutes."""
    found: list[list[Any]] = []
    for path in sorted(folder.iterdir()):
        if path.name in DESCRIPTIONS or path.name.endswith(".index.json"):
            found.append([path.name, sha256_of(path)])
        elif path.name.endswith(WEIGHT_ENDINGS):
            status = path.stat()
            # A tool that replaces a file may give it the time of another one, but not the time of that change.
            found.append([path.name, status.st_size, status.st_mtime_ns, status.st_ctime_ns])
    return found


def _described(part: Any) -> list[Any]:
    """The class of an empty part of a cache and the numbers that it was made with."""
    numbers = {name: value for name, value in vars(part).items() if type(value) in (bool, int, float, str)}
    return [f"{type(part).__module__}.{type(part).__qualname__}", numbers]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _label(folder: Path) -> str:
    """A name for people: the folder's, or the repository's in the Hub's cache."""
    name = folder.parent.parent.name.removeprefix("models--") if folder.parent.name == "snapshots" else folder.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._")[:80] or "model"
