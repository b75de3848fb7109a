"""A rank other than 0: it answers rank 0's questions, loads its share of a model, and computes what rank 0 wants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import mlx.core as mx

from ..errors import BudgetError, FlashError
from ..flash.random_state import kept_random_state
from ..ranks.group import Call, FollowingGroup, Handlers
from ..source.resolve import resolve_source
from .experts_of_rank import ExpertsOfRank
from .layers_of_rank import LayersOfRank
from .load import check_compiler, converted_before
from .neurons_of_rank import NeuronsOfRank
from .rank_questions import compare, options_in, tell_user
from .runtime import BUFFER_CACHE


class RankPart(Protocol):
    """A rank's part of a model."""

    kind: str  # of the calls that it computes
    questions: dict[str, Callable[[Any], dict[str, Any]]]  # that it answers once it is built

    bytes_read: int  # since it was built

    def offer(self) -> dict[str, Any]:
        """The answer to the question "plan"."""

    def build(self, share: dict[str, Any]) -> None:
        """Loads the share that rank 0 has divided, and fills its slots."""

    def __call__(self, call: Call) -> mx.array | None:
        """Computes a call of rank 0. None if rank 0 does not wait for a result."""

    def close(self) -> None: ...


PARTS: dict[str, Any] = {each.kind: each for each in (ExpertsOfRank, NeuronsOfRank, LayersOfRank)}


def register(
    group: FollowingGroup, handlers: Handlers, model: str | None = None, memory: str | int | None = None
) -> None:
    """Adds what loading needs to the handlers of a rank.

    model: a folder or a repository id on this machine; None for what the user calls it on rank 0's. memory: this rank's
    budget; None for rank 0's.
    """
    _OtherRank(group, handlers, model, memory)


class _OtherRank:
    """The arguments are those of `register`."""

    def __init__(self, group: FollowingGroup, handlers: Handlers, model: str | None, memory: str | int | None) -> None:
        self._group, self._handlers, self._model, self._memory = group, handlers, model, memory
        self._part: RankPart | None = None
        handlers.bytes_read = lambda: 0 if self._part is None else self._part.bytes_read
        handlers.questions.update(plan=self._plan, build=self._build, unload=self._unload)

    def _plan(self, asked: dict[str, Any]) -> dict[str, Any]:
        self._unload(None)
        if (kind := asked["kind"]) not in PARTS:
            raise FlashError(f"{kind} are not divided among ranks here; install the same version on all machines.")
        options = options_in(asked, self._memory)
        name = asked["model"] if self._model is None else self._model
        folder = resolve_source(name, options.revision if self._model is None else None, tell_user, fetch=False)
        if kind == NeuronsOfRank.kind:
            folder = converted_before(folder, name)
        compare(folder, asked["checksum"])
        check_compiler(tell_user)
        try:
            with kept_random_state():
                self._part = PARTS[kind](self._group, folder, options, asked)
        except BudgetError as error:
            if self._memory is None:
                raise
            raise FlashError(str(error).replace("--memory", '"memory" in the host file:')) from None
        return self._part.offer()

    def _build(self, share: dict[str, Any]) -> dict[str, Any]:
        if self._part is None:
            raise FlashError("rank 0 has not said which model it loads.")
        part, self._part = self._part, None  # An error leaves no part behind.
        with BUFFER_CACHE.limited(), kept_random_state():
            part.build(share)
        self._part = self._handlers.calls[part.kind] = part
        self._handlers.questions.update(part.questions)
        return {}

    def _unload(self, _: object) -> dict[str, Any]:
        if self._part is not None:
            self._handlers.calls.pop(self._part.kind, None)
            part, self._part = self._part, None
            for name in part.questions:
                self._handlers.questions.pop(name, None)
            part.close()
        return {}
