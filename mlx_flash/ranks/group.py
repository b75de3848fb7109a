"""What layers and loading see of the ranks: `Group`, and the calls and questions that rank 0 sends to the others."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import FlashError


@dataclass(frozen=True)
class Call:
    """A call of a layer. ids: int32, in the shape that rank 0 gave. numbers: such as the layer and the tokens."""

    kind: str
    ids: np.ndarray
    numbers: dict[str, int]


class Group(Protocol):
    """The ranks that compute one model together.

    MLX's communications must be enqueued in the same order on all ranks. All methods that communicate enqueue
    at once, so the order of these calls is that order.
    """

    rank: int
    size: int

    def ask(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        """Rank 0: sends a question, as JSON with one key, to every other rank. Returns their answers in rank order.

        Raises FlashError with a rank's own sentence if its answer is {"error": sentence}.
        """

    def call(self, kind: str, ids: np.ndarray, **numbers: int) -> None:
        """Rank 0: sends a call to every other rank, and does not wait for it. ids: int32."""

    def calls(self) -> Iterator[Call]:
        """Other ranks: the calls, until rank 0 closes the group. Questions are answered between them."""

    def spread(self, x: mx.array) -> mx.array:
        """Rank 0: begins to send x to every other rank. Returns x."""

    def receive(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """Other ranks: the x of the matching `spread`. It is passed on to the next rank, and need not be used."""

    def gather(self, y: mx.array) -> mx.array:
        """y: (n, ...), of equal shape and dtype on every rank -> (size, n, ...), in rank order."""

    def send_next(self, x: mx.array) -> None:
        """Begins to send x to the next rank; after the last one comes rank 0."""

    def receive_previous(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array:
        """What the rank before sends with `send_next`."""

    def close(self) -> None:
        """Rank 0: ends the other ranks. No process is left. It may be called twice."""


@dataclass
class Handlers:
    """What another rank does with what rank 0 sends. Handlers may add handlers, as building a model does.

    questions: answers the value of a question's one key with an object for JSON; a FlashError becomes the answer
    {"error": sentence}. calls: computes a call of that kind.
    """

    questions: dict[str, Callable[[Any], dict[str, Any]]] = field(default_factory=dict)
    calls: dict[str, Callable[[Call], None]] = field(default_factory=dict)

    def answer(self, question: Any) -> dict[str, Any]:
        try:
            if not isinstance(question, dict) or len(question) != 1:
                raise FlashError("a question between ranks must have one key.")
            ((name, value),) = question.items()
            if name not in self.questions:
                raise FlashError(f"a question between ranks, {name!r}, is not known here.")
            return self.questions[name](value)
        except FlashError as error:
            return {"error": str(error)}
        except Exception as error:  # such as one of MLX: rank 0 prints it
            return {"error": f"unexpected error: {type(error).__name__}: {error}"}


def follow(group: Group, handlers: Handlers) -> None:
    """Other ranks: computes calls until rank 0 closes the group."""
    for call in group.calls():
        if call.kind not in handlers.calls:
            raise FlashError(f"a call between ranks, {call.kind!r}, is not known here.")
        handlers.calls[call.kind](call)
