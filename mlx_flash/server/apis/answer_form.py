"""The form of one API's answers, and the pieces that several of them share."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ...text.answer_parts import Thought, ToolCall
from ..api_errors import ApiError
from ..jobs import End, Piece, Progress, TokenLogprob

LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}  # Some clients split lines at these.


@dataclass(frozen=True)
class Answered:
    """One whole answer."""

    items: Sequence[Thought | Piece | ToolCall]
    end: End

    @property
    def text(self) -> str:
        return "".join(item.text for item in self.items if isinstance(item, Piece))

    @property
    def thoughts(self) -> str:
        return "".join(item.text for item in self.items if isinstance(item, Thought))

    @property
    def calls(self) -> list[ToolCall]:
        return [item for item in self.items if isinstance(item, ToolCall)]

    @property
    def logprobs(self) -> list[TokenLogprob]:
        return [entry for item in self.items if isinstance(item, Piece) for entry in item.logprobs]


class AnswerForm(ABC):
    """Builds the answer to one request, which may have several choices, made one after the other.

    A stream is `begin`, then for each choice its `item`s and its `end`, then `finish`; `failed` may end it anywhere.
    Each returns what is sent, which may be nothing. id: of the answer. prompt_tokens: of the (first) prompt; it is set
    before `begin`.
    """

    media_type = "text/event-stream"
    id: str
    prompt_tokens = 0

    @abstractmethod
    def whole(self, answers: list[Answered]) -> dict[str, Any]:
        """The answer in one piece. answers: none if the request asks for nothing but that the model is loaded."""

    @abstractmethod
    def begin(self) -> str: ...

    @abstractmethod
    def item(self, index: int, item: Thought | Piece | ToolCall) -> str: ...

    @abstractmethod
    def end(self, index: int, end: End) -> str: ...

    @abstractmethod
    def finish(self) -> str: ...

    @abstractmethod
    def failed(self, error: ApiError) -> str: ...

    def waiting(self, progress: Progress | None) -> str:
        """Sent while there is nothing to say, so that nobody closes the connection. progress: None while queued."""
        return ": waiting\n\n" if progress is None else f": prompt {progress.done}/{progress.total}\n\n"

    def loading(self) -> str:
        """Sent before `begin`, while the model is loaded that is to answer."""
        return self.waiting(None)

    def only_loaded(self) -> str:
        """The whole stream of a request that asks for nothing but that the model is loaded."""
        return one_line(self.whole([])) + "\n"


def event(value: dict[str, Any], name: str | None = None) -> str:
    """A server-sent event with JSON data, in one line."""
    first = "" if name is None else f"event: {name}\n"
    return f"{first}data: {one_line(value)}\n\n"


def one_line(value: Any) -> str:
    """JSON in one line, for any client's idea of a line."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False).translate(LINE_ENDS)
