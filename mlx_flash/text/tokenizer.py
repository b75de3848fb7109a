"""Loads a model's tokenizer with mlx-lm's wrapper, or reports which of its files is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, FlashError, ReadError
from ..flash.files import is_store
from ..flash.plain_files import reading, unreadable
from ..source.checkpoint_files import files_in, small_files
from ..source.model_kind import error_line, first_line
from .encoding import is_from_library
from .tokenizer_files import WITHOUT_VOCABULARY, fault_in

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json")


def require_tokenizer(folder: Path) -> None:
    """Raises CheckpointError if the folder has no file of a tokenizer."""
    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has no tokenizer files (expected one of {', '.join(TOKENIZER_FILES)}).")


def load_tokenizer(folder: Path, config: dict[str, Any] | None = None) -> Any:
    """mlx-lm's TokenizerWrapper with our Detokenizer.

    config: the model's config.json, for its eos_token_id. Raises CheckpointError if there are no usable tokenizer
    files, ReadError if one cannot be read.
    """
    from mlx_lm.utils import load_tokenizer as load_mlx_lm_tokenizer

    from .detokenizer import used_by_mlx_lm

    if not is_store(folder):
        files_in(folder)  # raises an error for entries that are not files, or that lead out of the folder
    require_tokenizer(folder)
    # For families that transformers lacks, it would ask whether to run the checkpoint's own code, or print a warning.
    warns = logging.getLogger("transformers.configuration_utils")
    level = warns.level
    warns.setLevel(logging.ERROR)
    try:
        eos_token_ids = (config or {}).get("eos_token_id")
        with used_by_mlx_lm():
            extra = {"trust_remote_code": False} | _older_template(folder)
            tokenizer = load_mlx_lm_tokenizer(folder, extra, eos_token_ids=eos_token_ids)
        # transformers warns once about a text longer than `model_max_length`. Here the plan limits the length.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        return tokenizer
    except BaseException as error:  # The tokenizers library raises plain Exceptions, which name no file.
        if not is_from_library(error):
            raise
        raise _tokenizer_error(folder, error) from None
    finally:
        warns.setLevel(level)


def _tokenizer_error(folder: Path, error: BaseException) -> FlashError:
    """Our error for another library's error. It names the file, if one cannot be read or has a known fault."""
    present = [name for name in small_files([path.name for path in folder.iterdir() if path.is_file()])]
    for name in present:
        try:
            with reading(folder / name):
                (folder / name).read_bytes()
        except ReadError as found:
            return found
    remedy = (
        "Convert the checkpoint again, with sound files." if is_store(folder) else "Correct it, or download it again."
    )
    with reading(folder):
        if fault := fault_in(folder):
            return CheckpointError(f"the tokenizer in {folder} cannot be loaded: {fault}. {remedy}")
    if isinstance(error, OSError) or (isinstance(error, Exception) and "os error" in str(error)):  # from Rust
        return unreadable(folder, error, f"one of {', '.join(present)}")
    if set(present) <= WITHOUT_VOCABULARY:
        return CheckpointError(
            f"the tokenizer in {folder} cannot be loaded: no file has a vocabulary (expected tokenizer.json, "
            f"tokenizer.model, vocab.json or another; found {', '.join(present)}). {remedy}"
        )
    problem = error_line(error) if isinstance(error, Exception) else first_line(error)
    return CheckpointError(
        f"the tokenizer in {folder} cannot be loaded: {problem}. Download its files ({', '.join(present)}) again."
    )


def _older_template(folder: Path) -> dict[str, Any]:
    """The template of chat_template.json, which transformers reads only for processors; {} if there is a newer one."""
    path, settings = folder / "chat_template.json", folder / "tokenizer_config.json"
    if not path.is_file() or (folder / "chat_template.jinja").is_file():
        return {}
    if settings.is_file() and json.loads(settings.read_bytes()).keys() & {"chat_template", "chat_template_type"}:
        return {}
    return {"chat_template": json.loads(path.read_bytes())["chat_template"]}
