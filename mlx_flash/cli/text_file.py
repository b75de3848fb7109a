"""A text file that goes with a question."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from ..errors import ReadError, UsageError
from ..flash.plain_files import reading
from ..text.encoding import TooManyTokens, encode
from .printable import printable

MOST_CHARACTERS = 32  # of a file, per token of the context
PLAIN = ("txt", "text", "log")  # endings of files that are in no language


def path_of(text: str) -> Path:
    """The path that somebody typed: with ~, and with spaces as they are, in quotes or behind backslashes.

    Terminals write it with quotes or backslashes if a file is dropped on them.
    """
    path = _expanded(text)
    if not path.exists():
        try:
            words = shlex.split(text)
        except ValueError:
            return path
        if len(words) == 1 and words[0] != text:
            return _expanded(words[0])
    return path


def _expanded(text: str) -> Path:
    try:
        return Path(text).expanduser()
    except RuntimeError:  # There is no such user.
        return Path(text)


def begin_of(path: Path, most: int) -> bytes:
    """The first bytes of a file, at most `most`. Raises UsageError if it cannot be read."""
    if path.exists() and not path.is_file():
        raise UsageError(f"{path} is not a file.")
    try:
        with reading(path), path.open("rb") as file:
            return file.read(most)
    except ReadError as error:
        raise UsageError(str(error)) from None


def fenced(path: Path, tokenizer: Any, context: int) -> tuple[str, int]:
    """(the file's name and text in a fence, its number of tokens).

    Raises UsageError for a file that cannot be read, that is not text, or that has more than `context` tokens.
    """
    most = MOST_CHARACTERS * context
    content = begin_of(path, 4 * most + 1)
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if len(content) <= 4 * most:
            raise UsageError(f"{path} is not a text file: byte {error.start} is not UTF-8.") from None
        text = content[:most].decode(errors="replace")
    if not text.strip():
        raise UsageError(f"{path} is empty.")
    if "\0" in text:
        raise UsageError(f"{path} is not a text file: it has zero bytes.")
    try:
        if len(content) > 4 * most:
            raise TooManyTokens(context)
        count = len(encode(tokenizer, text, special_tokens=False, most=context))
    except TooManyTokens:
        count = context + 1
    if count > context:
        raise UsageError(
            f"{path} has more tokens than the context's {context}. Take a part of it, or start with a larger --context."
        )
    return in_fence(path.name, text), count


def in_fence(name: str, text: str) -> str:
    """A file's name, and its text in a fence that the text cannot close."""
    fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", text)), default=0))
    suffix = Path(name).suffix[1:].lower()
    language = suffix if suffix.isalnum() and suffix not in PLAIN else ""
    body = text if text.endswith("\n") else f"{text}\n"
    return f"{printable(name)}:\n{fence}{language}\n{body}{fence}"
