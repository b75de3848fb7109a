"""One request on its way through the engine, and what it is told."""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from ..text.sampling import Sampling


@dataclass(frozen=True)
class TokenLogprob:
    """Natural logarithms of probabilities, before temperature: of the chosen token, and of the likeliest ones.

    added: what the token adds to the text, in UTF-8; it may begin or end within a character.
    offset: of the character that it begins in, from the beginning of the answer.
    """

    token: int
    added: bytes
    logprob: float
    offset: int = 0
    top: tuple[TokenLogprob, ...] = ()

    @property
    def text(self) -> str:
        """As OpenAI writes it: "bytes:\\xf0\\x9f" for parts of characters."""
        try:
            return self.added.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in self.added)


@dataclass(frozen=True)
class Piece:
    """Text that may be shown, and the tokens that it came from if they were asked for."""

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class End:
    """Nothing more comes. finish_reason: "stop" or "length"."""

    finish_reason: str
    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int


Item = Piece | End | Exception


@dataclass
class Job:
    """A request: a prompt within the planned context, and where the answer goes.

    tell: called in the engine's thread with every Piece, then with End, or with the exception that ended it.
    """

    ids: list[int]
    max_tokens: int
    sampling: Sampling
    tell: Callable[[Item], None]
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None  # None: no probabilities are wanted; 0: the chosen token's only
    continues: bool = False  # the answer's text continues the prompt's, rather than to stand alone
    prefix: str = "cmpl"
    id: str = ""
    created: int = 0
    _left: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.id = self.id or f"{self.prefix}-{uuid.uuid4().hex}"
        self.created = self.created or int(time.time())

    def leave(self) -> None:
        """Nobody wants the answer any more."""
        self._left.set()

    @property
    def left(self) -> bool:
        return self._left.is_set()
