"""Finds faults in a tokenizer's files. The libraries that load them report neither the file nor the field."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from ..source.model_kind import error_line

OBJECTS = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json"),
    *("chat_template.json", "config.json"),
)
TEXTS = ("chat_template.jinja", "merges.txt", "vocab.txt")
# A tokenizer with only these files has no vocabulary. The names of files with a vocabulary differ.
WITHOUT_VOCABULARY = {
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "config.json", "generation_config.json"),
    *("chat_template.json", "chat_template.jinja", "merges.txt"),
}
TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def fault_in(folder: Path) -> str | None:
    """The first fault in the files, as "NAME has X, expected Y"; None if none is found. Raises OSError."""
    for path in (*(folder / name for name in TEXTS), *sorted(folder.glob("additional_chat_templates/*.jinja"))):
        if path.is_file() and (fault := _text_fault(path)):
            return f"{path.relative_to(folder)} {fault}"
    for name in OBJECTS:
        if (folder / name).is_file() and (fault := _object_fault(folder / name)):
            return f"{name} {fault}"
    return None


def _text_fault(path: Path) -> str | None:
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return f"has the byte {error.object[error.start]:#x} at {error.start}, expected UTF-8 text"
    return None


def _object_fault(path: Path) -> str | None:
    if fault := _text_fault(path):
        return fault
    content = path.read_bytes()
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        return f"is not valid JSON ({error_line(error)})" if content else "is empty, expected JSON"
    if not isinstance(found, dict):
        return f"holds {_short(found)}, expected a JSON object"
    for field, value, expected in _wrong_fields(path.name, found):
        return f"has {field} {_short(value)}, expected {expected}"
    return _unusable(content) if path.name == "tokenizer.json" else None


def _unusable(content: bytes) -> str | None:
    """The error of the tokenizers library for a tokenizer.json; None if it loads."""
    from tokenizers import Tokenizer

    try:
        Tokenizer.from_str(content.decode())
    except Exception as error:
        return f"does not describe a tokenizer ({error_line(error)})"
    return None


def _wrong_fields(name: str, found: dict[str, Any]) -> Iterable[tuple[str, Any, str]]:
    """Yields (field, value, expected) for each unusable field."""

    def check(field: str, valid: Callable[[Any], bool], expected: str) -> Iterable[tuple[str, Any, str]]:
        if found.get(field) is not None and not valid(found[field]):
            yield field, found[field], expected

    if name == "tokenizer.json":
        for field, kind, expected in (("added_tokens", list, "a list"), ("model", dict, "an object")):
            if not isinstance(found.get(field), kind):
                yield field, found.get(field), expected
    if name == "tokenizer_config.json":
        for field in ("tokenizer_class", "tool_parser_type"):
            yield from check(field, _is_text, "a text")
        yield from check("added_tokens_decoder", _is_of_objects, "an object of objects")
        yield from check("chat_template_type", _is_template_type, "the name of one of mlx-lm's chat templates")
        yield from check("tool_parser_type", _is_parser_type, "the name of one of mlx-lm's tool parsers")
    if name in ("tokenizer_config.json", "special_tokens_map.json"):
        for field in TOKENS:
            yield from check(field, _is_token, "a text, or an object with a text as content")
    if name in ("tokenizer_config.json", "chat_template.json"):
        yield from check("chat_template", _is_template, "a text, or a list of objects with name and template")
    if name == "chat_template.json" and "chat_template" not in found:
        yield "chat_template", None, "a text"
    if name == "added_tokens.json":
        for field in found:
            yield from check(field, lambda value: type(value) is int and value >= 0, "a token id")


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_token(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, dict) and isinstance(value.get("content"), str))


def _is_of_objects(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())


def _is_template(value: Any) -> bool:
    if not isinstance(value, list):
        return isinstance(value, str)
    return all(isinstance(each, dict) and {"name", "template"} <= each.keys() for each in value)


def _is_template_type(value: Any) -> bool:
    return _is_module(f"mlx_lm.chat_templates.{value}")


def _is_parser_type(value: Any) -> bool:
    return _is_module(f"mlx_lm.tool_parsers.{value}")


def _is_module(name: str) -> bool:
    from importlib.util import find_spec

    try:
        return find_spec(name) is not None
    except (ImportError, ValueError):
        return False


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=True)
    return text if len(text) <= 60 else f"{text[:57]}..."
