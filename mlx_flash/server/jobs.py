"""A request in the engine, and the items that the engine sends back."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..text.answer_parts import Thought, ToolCall
from ..text.sampling import Sampling


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of the probability of a chosen token, and of the likeliest ones, before temperature.

    added: the token's part of the text, in UTF-8; it may begin or end inside a character.
    offset: index in the answer of the character that the token begins in.
    """

    token: int
    added: bytes
    logprob: float | None  # None for the first token of a prompt
    offset: int = 0
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """The text in OpenAI's form: "bytes:\\xf0\\x9f" for parts of characters."""
        try:
            return self.added.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.added)


@dataclass(frozen=True)
class Piece:
    """Text that may be shown, and the probabilities of its tokens if they were asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Progress:
    """How many tokens of the prompt have been read, the cached ones included."""

    done: int
    total: int


@dataclass(frozen=True)
class End:
    """The end of an answer.

    finish_reason: "stop", "length" or "tool_calls". stop_word: the one that ended the text. thought_tokens: how many of
    the generated tokens belong to thoughts. prompt_seconds: until the first token. answer_seconds: from there on.
    """

    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    thought_tokens: int = 0
    stop_word: str | None = None
    prompt_seconds: float = 0.0
    answer_seconds: float = 0.0


Item = Thought | Piece | ToolCall | Progress | End | Exception


class Ended(Exception):
    """The rest of the answer is not wanted: the client has left, or the server stops."""


@dataclass(frozen=True)
class Steering:
    """How a chat's answer is divided and steered.

    tools: those that may be called, in OpenAI's form. one_call: whether the answer ends after one call. grammar and the
    following: see text/guide.py.
    """

    tools: list[dict[str, Any]] | None = None
    one_call: bool = False
    thinking_tokens: int | None = None
    grammar: Any = None
    call_grammar: Any = None
    may_think: bool = True
    may_call: bool = False
    headers: tuple[Any, Any] | None = None


@dataclass
class Job:
    """A request: a prompt that fits the planned context, and a callback for its answer.

    tell: called in the engine's thread with every item, the last of which is End, or the exception that ended the job.
    """

    ids: list[int]
    max_tokens: int
    sampling: Sampling
    tell: Callable[[Item], None]
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None  # None: no probabilities; 0: only that of the chosen token
    continues: bool = False  # whether the answer's text continues the prompt's
    steering: Steering | None = None  # None: the answer is one text
    echo: bool = False  # whether the answer begins with the prompt, and max_tokens may be 0
    system_tokens: int = 0  # how many of the first tokens belong to the system prompt
    seen: Any = None  # the prompt with its images (ImagePrompt), if it has any
    begun: bool = False  # whether other jobs of the same request have been served
    id: str = ""
    _left: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.id = self.id or new_id("job")

    def leave(self) -> None:
        """Says that the client has left, so that the answer is no longer needed."""
        self._left.set()

    @property
    def left(self) -> bool:
        return self._left.is_set()


def new_id(prefix: str) -> str:
    return f"{prefix}-{uuid.uuid4().hex}"
