"""A dense model whose layers are shared out over ranks in ranges, as a pipeline.

Every rank makes the same call of the same model with the same token ids. A layer of another rank returns its input, and
its cache only counts the tokens, so that masks and positions are right. Rank 0 has the first range, the embeddings and
the output head. It sends the result of its last layer to the next rank, that rank's result to the one after, and goes
on with what the last rank returns.

The numbers that a layer computes with, and the shapes of its arrays, are those of one rank, and so are the bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import FlashError, UsageError
from ..flash.host_arrays import to_numpy
from ..flash.stats import Counters
from ..ranks.group import Group
from .pipeline_text import (
    DIGEST_BYTES,
    count_tokens,
    counts_tokens,
    digests_of,
    marks_of,
    newest_digest,
    no_marks,
    trims,
)
from .rank_results import results_of
from .streamed_layers import WRAPS

LAYERS = "layers"  # the kind of a call: the digest of a text and the tokens that follow it
FOLLOW = "follow"  # of a question whether a rank can continue a text


class _Whole:
    """Stands between the layers until a rank is connected: nothing is sent."""

    def marks(self, x: mx.array) -> mx.array:
        return no_marks(x.shape[-2], x.shape[0])

    def enter(self, x: mx.array) -> mx.array:
        return x

    def leave(self, x: mx.array) -> mx.array:
        return x


def leave_out(layer: nn.Module) -> None:
    """Makes a layer return its first argument, while its cache counts the tokens."""
    _wrap(layer, _left_out)


def join(layer: nn.Module, first: bool, last: bool) -> None:
    """Makes a rank's own layer hand over what it takes and returns. first, last: of the rank's range."""
    _wrap(layer, _joined)
    object.__setattr__(layer, "_at", (first, last))


def connect(layers: Sequence[nn.Module], ends: _Whole) -> None:
    """Puts a rank's ends between layers that were left out or joined."""
    for layer in layers:
        object.__setattr__(layer, "_ends", ends)


def _wrap(layer: nn.Module, kind_of: Callable[[type[nn.Module]], type[nn.Module]]) -> None:
    object.__setattr__(layer, "_ends", _Whole())
    object.__setattr__(layer, "__class__", kind_of(type(layer)))


@functools.cache
def _left_out(kind: type[nn.Module]) -> type[nn.Module]:
    class LeftOut(kind):  # type: ignore[valid-type, misc]
        def __call__(self, x: mx.array, *arguments: Any, **named: Any) -> mx.array:
            for part in (*arguments, *named.values()):
                if counts_tokens(part):
                    count_tokens(part, self._ends.marks(x))
            return x

    return _named(LeftOut, kind)


@functools.cache
def _joined(kind: type[nn.Module]) -> type[nn.Module]:
    class Joined(kind):  # type: ignore[valid-type, misc]
        def __call__(self, x: mx.array, *arguments: Any, **named: Any) -> Any:
            first, last = self._at
            result = super().__call__(self._ends.enter(x) if first else x, *arguments, **named)
            return self._ends.leave(result) if last else result

    return _named(Joined, kind)


def _named(made: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    made.__name__, made.__qualname__ = kind.__name__, kind.__qualname__
    setattr(made, WRAPS, True)
    return made


@dataclass
class _Pass:
    """A call of the model. start: tokens and digest of the text before it. ids: int32 (T,). marks: of its tokens.

    passed: whether the other ranks have computed it.
    """

    start: tuple[int, bytes]
    ids: np.ndarray
    marks: mx.array
    passed: bool = False


class FirstRank(_Whole):
    """Rank 0's end: it tells the other ranks what they must compute, and receives what they have computed.

    One conversation at a time: the other ranks hold the text of the last call, or the beginning of it.
    """

    def __init__(self, group: Group, counting: int, counters: Counters) -> None:
        """counting: the number, in a prompt cache, of a layer of another rank. counters: the model's."""
        self._group, self._counting, self._counters = group, counting, counters
        self._end: tuple[int, bytes] | None = (0, b"")  # tokens and digest of the text that the others hold, if known
        self._pass: _Pass | None = None

    @contextmanager
    def passing(self, inputs: mx.array, cache: list[Any] | None) -> Iterator[None]:
        """Wraps a call of the model. inputs: ids (1, T). cache: its prompt cache.

        Raises UsageError for a call that several ranks cannot follow, FlashError if the others hold another text.
        """
        if cache is None:
            raise UsageError("a model whose layers are shared out over ranks needs a prompt cache.")
        if inputs.ndim != 2 or inputs.shape[0] != 1 or inputs.shape[1] == 0:
            raise UsageError("a model whose layers are shared out over ranks reads one text at a time.")
        part = cache[self._counting]
        if not counts_tokens(part):
            raise UsageError(f"layers that are shared out over ranks cannot use a {type(part).__name__}.")
        ids = to_numpy(inputs[0]).astype(np.int32)
        start = (int(part.offset), newest_digest(part) if part.offset else b"")
        if start[0] and start != self._end:
            self._group.ask({FOLLOW: {"tokens": start[0], "digest": start[1].hex()}})
        digests = digests_of(start[1], ids.tolist())
        self._pass = running = _Pass(start, ids, marks_of(digests))
        try:
            yield
            if not running.passed:
                raise FlashError("the model did not call its layers one after the other.")
            self._end = (start[0] + len(ids), digests[-1])
        finally:
            self._pass = None

    def _running(self) -> _Pass:
        if self._pass is None:
            raise FlashError("the model's layers were called in another way than by calling the model.")
        return self._pass

    def marks(self, x: mx.array) -> mx.array:
        return self._running().marks

    def leave(self, x: mx.array) -> mx.array:
        running = self._running()
        mx.eval(x)
        before = np.frombuffer(running.start[1].ljust(DIGEST_BYTES, b"\0"), np.int32)
        self._end = None
        for rank in range(1, self._group.size):
            ids = np.concatenate((before, running.ids))
            self._group.call(LAYERS, ids, [x], [rank], tokens=running.start[0])
            (x,) = results_of(self._group, self._counters, [x.shape])
        running.passed = True
        return x


def lead(model: Any, first: FirstRank) -> None:
    """Makes every call of the model pass all ranks."""
    kind = type(model)

    class Leading(kind):  # type: ignore[valid-type, misc]
        def __call__(self, inputs: mx.array, cache: Any = None, *arguments: Any, **named: Any) -> Any:
            if any(value is not None for value in (*arguments, *named.values())):
                raise UsageError("a model whose layers are shared out over ranks is called with token ids alone.")
            with first.passing(inputs, cache):
                return super().__call__(inputs, cache=cache)

    Leading.__name__, Leading.__qualname__ = kind.__name__, kind.__qualname__
    object.__setattr__(model, "__class__", Leading)


class OtherRank(_Whole):
    """Another rank's end, with the conversation that its range of layers is in."""

    def __init__(
        self,
        model: Any,
        new_cache: Callable[[], list[Any]],
        unchanged: Callable[[], None],
        make_room: Callable[[list[Any], int], None],
    ) -> None:
        """new_cache: makes an empty prompt cache of the whole model. unchanged: raises ReadError if a file that was
        read for this pass was changed meanwhile. make_room: grows a cache in use to hold so many tokens."""
        self._model = model
        self._new_cache, self._unchanged, self._make_room = new_cache, unchanged, make_room
        self._cache: list[Any] = []
        self._digests: list[bytes] = []  # of the text after each of its tokens
        self._given: mx.array | None = None
        self._result: mx.array | None = None

    def can_follow(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Answers the question FOLLOW. Raises FlashError if this rank cannot continue the text."""
        self._require(int(asked["tokens"]), bytes.fromhex(asked["digest"]))
        return {}

    def compute(self, x: mx.array, ids: np.ndarray, tokens: int, digest: bytes) -> mx.array:
        """The result of this rank's layers for the next tokens of a text: (1, T, D).

        x: the result of the rank before, (1, T, D). ids: int32 (T,). tokens: of the text before them, and its digest.
        Raises FlashError as `can_follow` does, and ReadError. The conversation is dropped if anything fails.
        """
        self._require(tokens, digest)
        try:
            if tokens == 0:
                self._cache, self._digests = self._new_cache(), []
            if surplus := len(self._digests) - tokens:
                for part in self._cache:
                    part.trim(surplus)
                del self._digests[tokens:]
            self._make_room(self._cache, tokens + len(ids))
            self._digests += digests_of(digest if tokens else b"", ids.tolist())
            self._given = x
            self._model(mx.array(ids)[None], cache=self._cache)
            result = self._result
            assert result is not None
            mx.eval(result, [part.state for part in self._cache])
            self._unchanged()
            return result
        except BaseException:
            self._cache, self._digests = [], []
            raise
        finally:
            self._given = self._result = None

    def _require(self, tokens: int, digest: bytes) -> None:
        if tokens == 0:
            return
        held = len(self._digests)
        if held < tokens or self._digests[tokens - 1] != digest or (held > tokens and not trims(self._cache)):
            raise FlashError(
                f"its layers do not hold the first {tokens} tokens of this conversation any more. Begin it anew: "
                "where layers are shared out over ranks, each rank holds one conversation."
            )

    def marks(self, x: mx.array) -> mx.array:
        return no_marks(x.shape[-2])

    def enter(self, x: mx.array) -> mx.array:
        assert self._given is not None
        return self._given

    def leave(self, x: mx.array) -> mx.array:
        self._result = x
        return x
