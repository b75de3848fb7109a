"""Which files of a checkpoint count: one rule for a folder and for the listing of a repository."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from fnmatch import fnmatchcase
from pathlib import Path

from .errors import CheckpointError
from .flash.plain_files import reading

# Configuration, tokenizer, chat template and generation settings.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")

# Kind by kind, the better first: the index that lists the shards, the single file, the shards where no index is.
WEIGHT_FILES = (
    ("model.safetensors.index.json", "model.safetensors", "model*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
    (None, None, "*.safetensors"),  # under another name
)
WEIGHT_PATTERNS = tuple(pattern for _, _, pattern in WEIGHT_FILES)


def matching(names: Collection[str], patterns: Collection[str]) -> list[str]:
    """Those names that fit one of the patterns, sorted; none in a subfolder, such as `original/params.json`."""
    return sorted(name for name in names if "/" not in name and any(fnmatchcase(name, p) for p in patterns))


def small_files(names: Collection[str]) -> list[str]:
    """What belongs to a checkpoint besides its weights; an index belongs to the weights."""
    return [name for name in matching(names, SMALL_FILES) if not name.endswith(".index.json")]


def weight_files(names: Collection[str], read: Callable[[str], str], where: object) -> tuple[str | None, list[str]]:
    """(the index, if there is one, the files that hold the weights). read(name) gives the text of an index.

    Raises CheckpointError if there are no weights, or shards are lacking, or the index is none.
    """
    for index, single, pattern in WEIGHT_FILES:
        if index is not None and index in names:
            return index, _shards_of(names, read(index), where, index)
        if single is not None and single in names:
            return None, [single]
        if shards := matching(names, [pattern]):
            return None, shards
    raise CheckpointError(f"{where} has no weights: expected {' or '.join(WEIGHT_PATTERNS[:2])}.")


def weights_in(folder: Path) -> list[Path]:
    """The files of a local folder that hold the weights; `weight_files` for it. Raises CheckpointError or ReadError."""

    def read(name: str) -> str:
        with reading(folder / name):
            return (folder / name).read_text(encoding="utf-8", errors="replace")

    names = [path.name for path in folder.iterdir() if path.is_file()]
    _, shards = weight_files(names, read, folder)
    return [folder / name for name in shards]


def _shards_of(names: Collection[str], text: str, where: object, index: str) -> list[str]:
    try:
        shards = sorted(set(json.loads(text)["weight_map"].values()))
        if not shards or not all(shard not in ("", ".", "..") and "/" not in shard for shard in shards):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"{where}: {index} is no index of shards. Download the checkpoint again.") from None
    if missing := [shard for shard in shards if shard not in names]:
        raise CheckpointError(
            f"{where} lacks {len(missing)} of {len(shards)} shards, the first is {missing[0]} (named in {index}). "
            "Download the checkpoint again."
        )
    return shards
