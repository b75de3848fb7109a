"""What layers and loading see of the ranks: both sides of a group, and the calls and questions between them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from ..errors import FlashError


@dataclass(frozen=True)
class Call:
    """A call of a layer. ids: int32, in the shape that rank 0 gave. arrays: what the layer computes with, evaluated.
    numbers: such as the layer and the tokens."""

    kind: str
    ids: np.ndarray
    arrays: list[mx.array]
    numbers: dict[str, int]


class Group(Protocol):
    """Rank 0's side of the ranks that compute one model together: it asks and calls, and the others answer."""

    size: int
    names: Sequence[str]  # of all ranks' machines, as the user calls them

    @property
    def bytes_read(self) -> int:
        """What the others have read from their disks, as far as their results tell."""

    def ask(self, question: dict[str, Any]) -> list[dict[str, Any]]:
        """Sends a question, as JSON with one key, to every other rank. Returns their answers in rank order.

        Raises FlashError with a rank's own sentence if its answer is {"error": sentence}.
        """

    def call(
        self,
        kind: str,
        ids: np.ndarray,
        arrays: Sequence[mx.array] = (),
        ranks: Sequence[int] | None = None,
        **numbers: int,
    ) -> None:
        """Sends a call and does not wait for it. ids: int32. ranks: to which it goes, ascending; None for all
        others.

        The arrays are evaluated. Raises UnsupportedModelError for one of a type that is not sent.
        """

    def tell(self, kind: str, ids: np.ndarray, **numbers: int) -> None:
        """Sends a call that returns nothing to every other rank. ids: int32."""

    def results(self, shapes: Sequence[Sequence[int | None]], dtype: mx.Dtype | None = None) -> list[mx.array]:
        """What the ranks return for the last `call`, evaluated, in rank order. What they return for an earlier
        one that was not waited for, such as after Ctrl-C, is dropped.

        shapes: of the results; None for a side of any length. dtype: of all results; None for any.

        Raises FlashError with a rank's own sentence if it has failed, or with what it has returned if that is not what
        the arguments say.
        """

    def close(self) -> None:
        """Ends the other ranks. No process is left. It may be called twice."""


class FollowingGroup(Protocol):
    """Another rank's side: it answers rank 0 alone."""

    rank: int
    size: int

    def calls(self) -> Iterator[Call]:
        """The calls, until rank 0 closes the group. Questions are answered between them."""

    def reply(self, result: mx.array | str) -> None:
        """Answers the call, with an array that is evaluated or with a sentence about what failed."""


@dataclass
class Handlers:
    """What another rank does with what rank 0 sends. Handlers may add handlers, as building a model does.

    questions: answers the value of a question's one key with an object for JSON. calls: computes a call of that kind;
    None for one that was told. Both may raise FlashError, whose sentence rank 0 raises then. bytes_read: what this rank
    has read from its disk until now.
    """

    questions: dict[str, Callable[[Any], dict[str, Any]]] = field(default_factory=dict)
    calls: dict[str, Callable[[Call], mx.array | None]] = field(default_factory=dict)
    bytes_read: Callable[[], int] = lambda: 0

    def answer(self, question: Any) -> dict[str, Any]:
        """The answer to a question, or {"error": sentence}."""
        try:
            if not isinstance(question, dict) or len(question) != 1:
                raise FlashError("a question between ranks must have one key.")
            ((name, value),) = question.items()
            if name not in self.questions:
                raise FlashError(f"a question between ranks, {name!r}, is not known here.")
            return self.questions[name](value)
        except Exception as error:
            return {"error": _sentence(error)}

    def result(self, call: Call) -> mx.array | str | None:
        """What a call returns, evaluated, or a sentence about what failed."""
        try:
            if call.kind not in self.calls:
                raise FlashError(f"a call between ranks, {call.kind!r}, is not known here.")
            result = self.calls[call.kind](call)
            if result is not None:
                mx.eval(result)
            return result
        except Exception as error:
            return _sentence(error)


def follow(group: FollowingGroup, handlers: Handlers) -> None:
    """Other ranks: computes calls until rank 0 closes the group."""
    for call in group.calls():
        if (result := handlers.result(call)) is not None:
            group.reply(result)


def _sentence(error: Exception) -> str:
    """For rank 0, which prints it."""
    return str(error) if isinstance(error, FlashError) else f"unexpected error: {type(error).__name__}: {error}"
