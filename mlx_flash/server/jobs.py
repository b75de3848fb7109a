"""A request in the engine, and the items that the engine sends back."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from ..text.sampling import Sampling


@dataclass(frozen=True)
class TokenLogprob:
    """The natural logarithm of the probability of a chosen token, and of the likeliest ones, before temperature.

    added: the token's part of the text, in UTF-8; it may begin or end inside a character.
    offset: index in the answer of the character that the token begins in.
    """

    token: int
    added: bytes
    logprob: float
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
class End:
    """The end of an answer. finish_reason: "stop" or "length"."""

    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


Item = Piece | End | Exception


@dataclass
class Job:
    """A request: a prompt that fits the planned context, and a callback for its answer.

    tell: called in the engine's thread with every Piece, then with End, or with the exception that ended the job.
    """

    ids: list[int]
    max_tokens: int
    sampling: Sampling
    tell: Callable[[Item], None]
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None  # None: no probabilities; 0: only that of the chosen token
    continues: bool = False  # whether the answer's text continues the prompt's
    prefix: str = "cmpl"
    id: str = ""
    created: int = 0
    _left: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.id = self.id or f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = self.created or int(time.time())

    def leave(self) -> None:
        """Says that the client has left, so that the answer is no longer needed."""
        self._left.set()

    @property
    def left(self) -> bool:
        return self._left.is_set()
