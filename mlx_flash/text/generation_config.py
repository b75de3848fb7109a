"""Reads generation_config.json: the sampling settings of the model's authors, and the tokens that end its text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

NAME = "generation_config.json"
MOST_BYTES = 1 << 20
MOST_TOKENS = 1 << 31  # limit of token ids if the vocabulary's size is not known


@dataclass(frozen=True)
class GenerationConfig:
    """The settings in a generation_config.json.

    sampling: the values among temperature, top_p, top_k, min_p and repetition_penalty that the file sets.
    """

    sampling: dict[str, Any] = field(default_factory=dict)


def _number(least: float, most: float) -> Callable[[Any], float | None]:
    def parse(value: Any) -> float | None:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            return None
        return float(value)

    return parse


def _count(value: Any) -> int | None:
    number = _number(-1, 2**31)(value)
    return None if number is None or not number.is_integer() else max(0, int(number))


SETTINGS: dict[str, tuple[Callable[[Any], float | None], str]] = {
    "temperature": (_number(0, 1000), "a number from 0 to 1000"),
    "top_p": (_number(0, 1), "a number from 0 to 1"),
    "top_k": (_count, "a whole number, 0 or more"),
    "min_p": (_number(0, 1), "a number from 0 to 1"),
    "repetition_penalty": (_number(0.01, 10), "a number from 0.01 to 10"),
}


def read_generation_config(folder: Path, vocabulary: int | None = None) -> GenerationConfig:
    """Reads the file in the folder of a store or a checkpoint. If there is none, nothing is set.

    vocabulary: from `vocabulary_of`. `do_sample: false` means a temperature of 0, even if the file sets another.
    Raises CheckpointError for a file with invalid values, ReadError for one that cannot be read.
    """
    path = folder / NAME
    values = _read(path)
    check_end_tokens(path, values, vocabulary)
    for name in ("bos_token_id", "pad_token_id"):  # They are not used, and published files contain -1.
        if not _are_numbers(values.get(name)):
            raise _wrong(path, name, values[name], "a token id or a list of them")
    if not isinstance(sample := values.get("do_sample"), bool | None):
        raise _wrong(path, "do_sample", sample, "true or false")
    sampling: dict[str, Any] = {}
    for name, (parse, expected) in SETTINGS.items():
        if (value := values.get(name)) is not None:
            if (parsed := parse(value)) is None:
                raise _wrong(path, name, value, expected)
            sampling[name] = parsed
    if sample is False:
        sampling["temperature"] = 0.0
    return GenerationConfig(sampling)


def _read(path: Path) -> dict[str, Any]:
    from ..flash.plain_files import reading  # It imports NumPy, which `--help` must not wait for.

    with reading(path):
        if not path.exists():
            return {}
        if (size := path.stat().st_size) > MOST_BYTES:
            raise CheckpointError(f"{path} has {size} bytes, expected at most {MOST_BYTES}. Download it again.")
        content = path.read_bytes()
    try:
        values = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be used: {error}. Download it again, or remove it.") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds {type(values).__name__}, expected a JSON object. Download it again.")
    return values


def vocabulary_of(config: dict[str, Any]) -> int | None:
    """The model's number of tokens, from its config.json; it may exceed the tokenizer's. None: not given there."""
    parts = (config, config.get("text_config"))
    sizes = [part.get("vocab_size") for part in parts if isinstance(part, dict)]
    return next((size for size in sizes if type(size) is int and size > 0), None)


def check_end_tokens(path: Path, values: dict[str, Any], vocabulary: int | None) -> None:
    """Raises CheckpointError for an eos_token_id that is not a token of the model. path: the file of these values."""
    if (ends := values.get("eos_token_id")) is None:
        return
    most = MOST_TOKENS if vocabulary is None else vocabulary
    if not _are_numbers(ends) or not all(0 <= each < most for each in (ends if isinstance(ends, list) else [ends])):
        known = "" if vocabulary is None else f" from 0 to {vocabulary - 1} (vocab_size in config.json)"
        raise _wrong(path, "eos_token_id", ends, f"a token id{known} or a list of them")


def _are_numbers(value: Any) -> bool:
    return value is None or all(type(each) is int for each in (value if isinstance(value, list) else [value]))


def _wrong(path: Path, name: str, value: Any, expected: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: {name} is {value!r:.80}, expected {expected}. Correct the file, or download it again."
    )
