"""Text -> token ids, in pieces where it is long, and with every tokenizer's errors as ours."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..errors import TokenizerError, UsageError

PART_CHARACTERS = 1 << 15  # of a text that are encoded at once as long as it may be too long


class TooManyTokens(UsageError):
    """A text of more tokens than it may have; `at_least` are in it."""

    def __init__(self, at_least: int) -> None:
        super().__init__(f"the prompt has more than {at_least} tokens. Shorten it.")
        self.at_least = at_least


def too_long(flash: Any, found: str, enlarge: str) -> str:
    """What to say of a prompt that does not fit. found: "70 tokens". enlarge: how to plan for more."""
    context, positions = flash.plan.context, flash.positions
    remedy = "Shorten it: this model takes no more."
    if context < positions:
        remedy = f"Shorten it, or {enlarge}; this model takes up to {positions} tokens."
    return f"the prompt has {found}, and the plan makes room for {context}. {remedy}"


def encode(tokenizer: Any, text: str, *, special_tokens: bool, most: int | None = None) -> list[int]:
    """The token ids of a text. special_tokens: whether the tokenizer adds its own, such as one to begin with.

    A tokenizer takes some hundred bytes for every character, for all of a text at once, so a long text is first
    counted part by part: TooManyTokens is raised if it has more than `most` tokens (None: any number will do).
    Raises TokenizerError for what the tokenizer raises.
    """
    if most is not None and len(text) > PART_CHARACTERS:
        count = 0
        for begin in range(0, len(text), PART_CHARACTERS):
            with tokenizer_errors(tokenizer):
                part = tokenizer.encode(text[begin : begin + PART_CHARACTERS], add_special_tokens=False)
            count += len(part) - 1  # where the text is cut, one token may be two
            if count > most:
                raise TooManyTokens(count)
    with tokenizer_errors(tokenizer):
        return list(tokenizer.encode(text, add_special_tokens=special_tokens))


def is_from_library(error: BaseException) -> bool:
    """Whether this may be a tokenizer's error: the panics of Rust libraries are not Exceptions."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextlib.contextmanager
def tokenizer_errors(tokenizer: Any) -> Iterator[None]:
    """Whatever a tokenizer raises is raised as TokenizerError; its files may say anything."""
    try:
        yield
    except BaseException as error:
        if not is_from_library(error):
            raise
        where = f" in {folder}" if (folder := getattr(tokenizer, "name_or_path", "")) else ""
        said = " ".join(str(error).split())[:300].rstrip(".")
        raise TokenizerError(
            f"the tokenizer{where} cannot encode this text: {type(error).__name__}: {said}. "
            "If it encodes no other text either, download its files again."
        ) from None
