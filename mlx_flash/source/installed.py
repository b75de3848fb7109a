"""Finds the models on this machine: the stores in the cache folder, and the snapshots in the Hub's cache.

Only names, sizes and times of files are read. Whether a model would run is for `mlx_flash.plan` to say.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import UsageError
from ..flash.files import MANIFEST
from .cached import cache_folder, entries
from .resolve import demo_folder

HUB, CACHE, DEMO, FOLDER = "hub", "cache", "demo", "folder"  # where a model comes from
DEMO_NAME = "demo"
_SUFFIX = re.compile(r"-[0-9a-f]{12}$")  # of a store's folder in the cache folder
_REPOSITORY = "models--"  # prefix of a repository's folder in the Hub's cache


@dataclass(frozen=True)
class InstalledModel:
    """A model on the disk.

    name: in the list of models. model: the value of --model that runs it; None for the demo model. stamp: changes with
    any file in `folder`.
    """

    name: str
    source: str
    model: str | None
    folder: Path
    size_bytes: int
    stamp: str


def installed_models(checkpoint: Path | None = None) -> list[InstalledModel]:
    """The models in both caches, by name. The stores of `checkpoint` and of a checkpoint in the list are left out."""
    found = [*_in_hub_cache()]
    folders = [model.folder for model in found] + ([] if checkpoint is None else [checkpoint])
    with contextlib.suppress(UsageError):  # there is no place for the cache folder
        found += _stores({str(folder.resolve()) for folder in folders})
    return sorted(found, key=lambda model: model.name)


def folder_model(name: str, folder: Path) -> InstalledModel:
    """The model in a folder that a user named."""
    size, stamp = _measured(folder)
    return InstalledModel(name, FOLDER, str(folder), folder, size, stamp)


def with_own_names(models: list[InstalledModel], taken: set[str]) -> list[InstalledModel]:
    """The models, each with a name of its own that is not in `taken`.

    A name that several have is made longer: by the rest of a store's folder name, or by a snapshot's commit.
    """
    names = [model.name for model in models]
    shared = {name for name in names if names.count(name) > 1} | taken
    longer = [
        replace(
            model,
            name=f"{model.name}@{model.folder.name[:12]}" if model.source == HUB else model.folder.name,
        )
        if model.name in shared
        else model
        for model in models
    ]
    unique: dict[str, InstalledModel] = {}
    for model in longer:
        if model.name not in taken:
            unique.setdefault(model.name, model)
    return list(unique.values())


def may_be_installed(name: str) -> bool:
    """Whether a model of this name can be in one of the caches; only the names of their folders are read."""
    repository = _REPOSITORY + name.partition("@")[0].replace("/", "--")
    stores: list[str] = []
    with contextlib.suppress(UsageError, OSError):
        stores = os.listdir(cache_folder())
    with contextlib.suppress(OSError):
        if repository in os.listdir(hub_cache()):
            return True
    return name == DEMO_NAME or any(name in (store, _SUFFIX.sub("", store)) for store in stores)


def hub_cache() -> Path:
    """The folder of the Hub's cache."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE).expanduser()


def _in_hub_cache() -> list[InstalledModel]:
    """The snapshots of main branches that have a configuration or a manifest, whole or not."""
    found = []
    for repository in _children(hub_cache()):
        if not repository.name.startswith(_REPOSITORY):
            continue
        name = repository.name.removeprefix(_REPOSITORY).replace("--", "/")
        with contextlib.suppress(OSError, UnicodeDecodeError):
            commit = (repository / "refs" / "main").read_text().strip()
            folder = repository / "snapshots" / commit
            if re.fullmatch(r"\w+", commit) and ((folder / "config.json").is_file() or (folder / MANIFEST).is_file()):
                size, stamp = _measured(folder)
                found.append(InstalledModel(name, HUB, name, folder, size, stamp))
    return found


def _stores(checkpoints: set[str]) -> list[InstalledModel]:
    """The stores in the cache folder. checkpoints: those whose stores are left out."""
    found = []
    demo = str(demo_folder().resolve())
    for entry in entries(cache_folder()):
        if entry.kind != "store" or entry.superseded or entry.source in checkpoints:
            continue
        size, stamp = _measured(entry.path)
        if entry.source == demo:
            found.append(InstalledModel(DEMO_NAME, DEMO, None, entry.path, size, stamp))
        else:
            name = _SUFFIX.sub("", entry.name)
            found.append(InstalledModel(name, CACHE, str(entry.path), entry.path, size, stamp))
    return found


def _children(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _measured(folder: Path) -> tuple[int, str]:
    """(bytes of the files in a folder, a checksum of their names, sizes and times)."""
    seen: list[tuple[str, int, int]] = []
    with contextlib.suppress(OSError):
        for entry in os.scandir(folder):
            with contextlib.suppress(OSError):  # a broken link
                if entry.is_file():
                    status = entry.stat()
                    seen.append((entry.name, status.st_size, status.st_mtime_ns))
    text = json.dumps([str(folder), sorted(seen)], ensure_ascii=True)
    return sum(size for _, size, _ in seen), hashlib.sha256(text.encode()).hexdigest()
