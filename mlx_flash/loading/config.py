"""Reads config.json of a checkpoint or a store, and finds which kind of model it describes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, CorruptStoreError
from ..flash.files import is_store
from ..flash.plain_files import reading, unreadable
from ..source.checkpoint_files import files_in
from ..source.checkpoint_tensors import extent_of
from ..source.config_counts import count_problem
from ..source.model_kind import is_mixture, refuse_own_code
from ..text.generation_config import check_end_tokens, vocabulary_of

CONFIG_FILES = ("config.json", "generation_config.json")


def holds_mixture(source: Path, small: Path | None = None) -> bool:
    """Whether a folder is the checkpoint of a mixture of experts.

    small: the folder that its configuration and its index are read from; None for `source`. Raises CheckpointError or
    UnsupportedModelError.
    """
    if is_store(source):
        return False
    config = read_config(small or source)
    refuse_own_code(config, source)
    extent = extent_of(source, small)
    if problem := count_problem(config, extent.tensors, extent.longest):
        raise CheckpointError(
            f"{source / 'config.json'} does not describe this checkpoint: {problem}. Download it again."
        )
    return is_mixture(config, source)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as mlx-lm reads it, with the stop tokens of generation_config.json. Errors name the file."""
    from mlx_lm.utils import load_config

    if not is_store(folder):
        files_in(folder)  # raises an error for entries that are not files or are too large
    vocabulary, ends = None, None
    for name in CONFIG_FILES:
        path = folder / name
        if not path.exists() and name != CONFIG_FILES[0]:
            continue
        with reading(path):
            content = path.read_bytes()
        try:
            if not isinstance(found := json.loads(content), dict):
                raise ValueError(f"it holds {found!r:.20}, expected a JSON object")
        except (ValueError, RecursionError) as error:
            if is_store(folder):
                raise CorruptStoreError(f"{path}: {error}. Convert the checkpoint again.") from None
            raise CheckpointError(f"{path} cannot be used: {error}. Download the checkpoint again.") from None
        if name == CONFIG_FILES[0]:
            vocabulary = vocabulary_of(found)
        check_end_tokens(path, found, vocabulary)
        ends = found.get("eos_token_id")
    try:
        config: dict[str, Any] = load_config(folder)
        if ends == 0:  # mlx-lm ignores a stop token 0 of generation_config.json
            config["eos_token_id"] = 0
    except RecursionError:
        raise CheckpointError(
            f"{folder / CONFIG_FILES[0]} is nested too deep. Download the checkpoint again."
        ) from None
    except (OSError, TypeError, ValueError) as error:  # the file changed after it was read above
        raise unreadable(folder, error, " or ".join(CONFIG_FILES)) from None
    return config


def number_of(config: dict[str, Any], key: str) -> int | None:
    """A number from a configuration, or from its part for the text model; None if it is in neither.

    Raises CheckpointError if it is not a positive whole number.
    """
    text = config.get("text_config")
    value = config.get(key, text.get(key) if isinstance(text, dict) else None)
    if value is None:
        return None
    if type(value) is not int or value < 1:
        raise CheckpointError(f"config.json: {key} is {value!r}, expected a positive whole number.")
    return value
