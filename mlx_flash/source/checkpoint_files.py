"""Selects the files of a checkpoint that count, from a folder or a repository's listing (docs/checkpoints.md)."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable, Collection
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from ..flash.dataless import refuse_dataless, refuse_placeholders
from ..flash.plain_files import reading

# Configuration, tokenizer, chat template and generation settings.
SMALL_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "*.spm", "*.bpe", "*.codes")

# (index of the shards, single file, pattern of shards without an index) for each kind of file, best kind first.
WEIGHT_FILES = (
    ("model.safetensors.index.json", "model.safetensors", "model*.safetensors"),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", "pytorch_model*.bin"),
    (None, None, "*.safetensors"),  # other names
)
WEIGHT_PATTERNS = tuple(pattern for _, _, pattern in WEIGHT_FILES)

MAX_SMALL_BYTES = 64 << 20  # The largest known tokenizer.json has 33 MB, the largest known index 15 MB.
MAX_CONFIG_BYTES = 16 << 20  # JSON takes up to 30 times its size in memory; a config that lists every expert has 5 MB.
TEMPLATES_FOLDER = "additional_chat_templates"  # the only subfolder that transformers reads

KINDS_OF_ENTRIES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass(frozen=True)
class WeightFiles:
    """The files that hold a checkpoint's weights."""

    index: str | None  # name of the index, if there is one
    names: list[str]  # sorted
    index_map: dict[str, str]  # tensor -> file, from the index; empty without one


def matching(names: Collection[str], patterns: Collection[str]) -> list[str]:
    """The names that match one of the patterns, sorted.

    Names in a subfolder, such as `original/params.json`, are left out. So are hidden names: macOS leaves a `._NAME`
    beside every file on a disk with a foreign file system.
    """
    visible = [name for name in names if "/" not in name and not name.startswith(".")]
    return sorted(name for name in visible if any(fnmatchcase(name, pattern) for pattern in patterns))


def small_files(names: Collection[str]) -> list[str]:
    """The files of a checkpoint other than its weights. An index belongs to the weights."""
    return [name for name in matching(names, SMALL_FILES) if not name.endswith(".index.json")]


def further_templates(names: Collection[str]) -> list[str]:
    """The named chat templates in a repository's listing, which are in a subfolder."""
    prefix = f"{TEMPLATES_FOLDER}/"
    below = [name.removeprefix(prefix) for name in names if name.startswith(prefix)]
    return [prefix + name for name in matching(below, ["*.jinja"])]


def small_files_in(folder: Path) -> list[str]:
    """Every file of a local checkpoint or store that does not hold weights, an index included, relative to its folder.

    Raises ReadError. The files themselves are not checked; `files_in` does that.
    """
    templates = folder / TEMPLATES_FOLDER
    with reading(folder, "the list of its files"):
        paths = [*folder.iterdir(), *(templates.iterdir() if templates.is_dir() else ())]
    names = [str(path.relative_to(folder)) for path in paths if path.is_file()]
    return [*matching(names, SMALL_FILES), *further_templates(names)]


def weight_files(names: Collection[str], read: Callable[[str], str], where: object) -> WeightFiles:
    """The files, out of `names`, that hold the weights. read(name): returns the text of an index.

    Raises CheckpointError if there are no weights, if shards are missing, or if the index is invalid.
    """
    names = matching(names, ("*",))
    for index, single, pattern in WEIGHT_FILES:
        if index is not None and index in names:
            single = single if single in names else None
            index_map = _index_map(names, read(index), where, index, single)
            return WeightFiles(index, sorted(set(index_map.values())), index_map)
        if single is not None and single in names:
            return WeightFiles(None, [single], {})
        if shards := matching(names, [pattern]):
            return WeightFiles(None, shards, {})
    raise CheckpointError(
        f"{where} has no weights: expected {' or '.join(WEIGHT_PATTERNS[:2])}, or *.safetensors under other names. "
        f"{about_gguf(names) or 'Download the checkpoint again.'}"
    )


def about_gguf(names: Collection[str]) -> str:
    """What to do if a repository or folder has its weights as GGUF files; empty if it has none."""
    found = any(name.lower().endswith(".gguf") for name in names)
    return "GGUF files cannot be read. Choose a repository of the model with *.safetensors." if found else ""


def files_in(folder: Path) -> list[str]:
    """Names of the files of a local checkpoint that count, sorted.

    Raises CheckpointError for a link that leaves the folder (unless it leads to the blobs of the same repository in
    the Hub's cache), for an entry that is not a file, and for a small file that is larger than any real one. Raises
    ReadError if something cannot be read, or is in iCloud.
    """
    home = folder.resolve()
    with reading(folder, "the list of its files"):
        entries = sorted(folder.iterdir())
        if (templates := folder / TEMPLATES_FOLDER).is_dir():
            entries += [templates, *sorted(templates.iterdir())]
    for path in entries:
        if path.is_symlink() and not path.name.startswith("."):
            _check_link(path, home)
    here, patterns = [path.name for path in entries if path.parent == folder], (*SMALL_FILES, *WEIGHT_PATTERNS)
    refuse_placeholders(folder, here, lambda name: matching([name], patterns))
    names = matching(here, patterns)
    further = further_templates([str(path.relative_to(folder)) for path in entries])
    small = {*matching(names, SMALL_FILES), *further}
    for name in [*names, *further]:
        with reading(folder / name):
            status = (folder / name).stat()
        refuse_dataless(folder / name, status)
        if not stat.S_ISREG(status.st_mode):
            what = KINDS_OF_ENTRIES.get(stat.S_IFMT(status.st_mode), "not a file")
            raise CheckpointError(f"{folder / name} is {what}; expected a file. Remove it, or download it again.")
        bound = MAX_CONFIG_BYTES if name == "config.json" else MAX_SMALL_BYTES
        if name in small and status.st_size > bound:
            raise CheckpointError(
                f"{folder / name} has {status.st_size / 1e6:.0f} MB; a file of its kind has at most "
                f"{bound >> 20} MiB. Remove it, or download it again."
            )
    return names


def _check_link(path: Path, home: Path) -> None:
    """Raises CheckpointError for a link out of the checkpoint. home: the checkpoint's folder, resolved."""
    try:
        target = path.resolve(strict=True)
    except (OSError, RuntimeError):  # RuntimeError: links that form a loop
        raise CheckpointError(f"{path} is a link that leads nowhere. Download the file again.") from None
    # huggingface_hub: .../models--OWNER--NAME/snapshots/COMMIT/FILE -> ../../blobs/ETAG
    of_the_hub = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not of_the_hub and home not in target.parents:
        raise CheckpointError(
            f"{path} is a link to {target}, which is outside the checkpoint's folder and is not read. "
            "Put the file itself into the folder."
        )


def weights_in(folder: Path, small: Path | None = None) -> WeightFiles:
    """The files of a local folder that hold the weights. small: folder from which the index is read; None: `folder`.

    Raises CheckpointError or ReadError, as `files_in` does.
    """

    def read(name: str) -> str:
        path = (small or folder) / name
        with reading(path):
            return path.read_text(encoding="utf-8", errors="replace")

    return weight_files(files_in(folder), read, folder)


def read_config(folder: Path) -> dict[str, Any]:
    """The content of config.json. Raises CheckpointError or ReadError."""
    path = folder / "config.json"
    if "config.json" not in files_in(folder):
        raise CheckpointError(
            f"{folder} has no config.json: expected the folder of a Hugging Face checkpoint, with config.json, "
            "model*.safetensors and tokenizer files."
        )
    try:
        with reading(path):
            config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}. Download the checkpoint again.") from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} is not a JSON object. Download the checkpoint again.")
    return config


def _index_map(names: Collection[str], text: str, where: object, index: str, single: str | None) -> dict[str, str]:
    """Tensor -> shard. single: the single file with all weights, if that exists as well."""
    suffix = Path(index.removesuffix(".index.json")).suffix
    try:
        index_map = dict(json.loads(text)["weight_map"])
        shards = sorted(set(index_map.values()))
        if not shards or not all(shard.endswith(suffix) and "/" not in shard for shard in shards):
            raise ValueError
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"{where}: {index} is not an index of shards. Download the checkpoint again.") from None
    if missing := [shard for shard in shards if shard not in names]:
        beside = f" If {single} holds the whole model, remove {index}." if single else ""
        raise CheckpointError(
            f"{where} lacks {len(missing)} of {len(shards)} shards, the first is {missing[0]} (named in {index}). "
            f"Download the checkpoint again.{beside}"
        )
    return index_map
