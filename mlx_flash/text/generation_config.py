"""generation_config.json: how the model's authors sample from it, and which tokens end its text."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

NAME = "generation_config.json"
MOST_BYTES = 1 << 20
MOST_TOKENS = 1 << 31  # where the vocabulary is not known


@dataclass(frozen=True)
class GenerationConfig:
    """sampling: those of temperature, top_p, top_k, min_p and repetition_penalty that the file sets."""

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
    """The file in the folder of a store or a checkpoint; without one, nothing is set. vocabulary: as `vocabulary_of`.

    `do_sample: false` is a temperature of 0, whatever else the file says. Raises CheckpointError for a file that
    has values that mean nothing, ReadError for one that cannot be read.
    """
    path = folder / NAME
    values = _read(path)
    check_end_tokens(path, values, vocabulary)
    for name in ("bos_token_id", "pad_token_id"):  # nothing uses them, and published files have -1 in them
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
    from ..flash.plain_files import reading  # with NumPy, which `--help` does not wait for

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
    """The tokens that the model of a config.json knows, which may be more than its tokenizer does; None: not said."""
    parts = (config, config.get("text_config"))
    sizes = [part.get("vocab_size") for part in parts if isinstance(part, dict)]
    return next((size for size in sizes if type(size) is int and size > 0), None)


def check_end_tokens(path: Path, values: dict[str, Any], vocabulary: int | None) -> None:
    """Raises CheckpointError for an eos_token_id that is not a token of the model. path: the file with these values."""
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
