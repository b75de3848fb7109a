"""Encodes texts to token ids: checks the length of long texts in parts, and turns tokenizers' errors into ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from ..errors import TokenizerError, UsageError

PART_CHARACTERS = 1 << 15  # characters per part while the length of a text is checked


class TooManyTokens(UsageError):
    """A text with too many tokens: at least `at_least`."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"the prompt has more than {at_least} tokens. Shorten it.")
        self.at_least = at_least


def too_long(flash: Any, found: str, enlarge: str) -> str:
    """The message for a prompt that does not fit. found: such as "70 tokens". enlarge: how to get a larger context."""
    context, positions = flash.plan.context, flash.positions
    remedy = "Shorten it: this model takes no more."
    if context < positions:
        remedy = f"Shorten it, or {enlarge}; this model takes up to {positions} tokens."
    return f"the prompt has {found}, and the plan makes room for {context}. {remedy}"


def encode(tokenizer: Any, text: str, *, special_tokens: bool, most: int | None = None) -> list[int]:
    """The token ids of a text. special_tokens: whether the tokenizer adds its own, such as one at the beginning.

    A tokenizer needs some hundred bytes of memory per character, for the whole text at once. So the tokens of a long
    text are first counted part by part. Raises TooManyTokens if there are more than `most` (None: no limit), and
    TokenizerError for errors of the tokenizer.
    """
    if most is not None and len(text) > PART_CHARACTERS:
        count = 0
        for begin in range(0, len(text), PART_CHARACTERS):
            with tokenizer_errors(tokenizer):
                part = tokenizer.encode(text[begin : begin + PART_CHARACTERS], add_special_tokens=False)
            count += len(part) - 1  # The cut may split one token into two.
            if count > most:
                raise TooManyTokens(count)
    with tokenizer_errors(tokenizer):
        return list(tokenizer.encode(text, add_special_tokens=special_tokens))


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens in the common prefix."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


def is_from_library(error: BaseException) -> bool:
    """Whether a tokenizer may have raised this error. The panics of Rust libraries are not Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextlib.contextmanager
def tokenizer_errors(tokenizer: Any) -> Iterator[None]:
    """Raises any error of a tokenizer as TokenizerError. Its files may hold anything, so any error is possible."""
    try:
        yield
    except BaseException as error:
        if not is_from_library(error):
            raise
        where = f" in {folder}" if (folder := getattr(tokenizer, "name_or_path", "")) else ""
        said = " ".join(str(error).split())[:300].rstrip(".")
        raise TokenizerError(
            f"the tokenizer{where} cannot encode this text: {type(error).__name__}: {said}. "
            "If it cannot encode any other text either, download its files again."
        ) from None
