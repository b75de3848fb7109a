"""Drafts of a checkpoint's own head: layers that guess the next tokens from the model's last hidden states.

mlx-vlm computes the head. It takes pairs of a hidden state and the token that followed, in the order of the text, and
has a KV cache of its own for them. That cache is short: when it is full, or when states are missing, the head begins
again with the newest states. Where there are none, it drafts nothing until a pass has made some.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from ..flash.host_arrays import to_numpy
from ..flash.random_state import kept_random_state
from .drafts import Sampler, chosen_by
from .token_loop import cached_tokens

MOST_TOKENS = 512  # that a head attends to


class HiddenStates:
    """The hidden states of the newest tokens of one prompt cache, as a model that was called with them returned them.

    A token's place is the number of tokens before it. most: the number of states that are kept. begin, end: the places
    of the states.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.forget()

    def forget(self) -> None:
        self.begin = self.end = 0
        self._states: mx.array | None = None  # (1, end - begin, ...)
        self._of: Any = lambda: None  # gives the first part of the cache, or None

    def note(self, cache: list[Any], place: int, states: Sequence[mx.array] | None) -> None:
        """Notes a call. place: that of its first token. states: (1, T, ...), the last of them; None if there are none.

        States of tokens from this place on, which the cache had to give back, are forgotten.
        """
        if not states:
            return self.forget()
        if self._of() is not cache[0] or not self.begin <= place <= self.end:
            self.forget()
            self.begin, self._of = place, weakref.ref(cache[0])
        made = [states[-1]]
        if self._states is not None:
            made.insert(0, self._states[:, : place - self.begin])
        self.end = place + states[-1].shape[1]
        begin = max(self.begin, self.end - self.most)
        joined = mx.concatenate(made, axis=1)[:, begin - self.begin :]
        self._states = mx.contiguous(joined)  # Otherwise it would keep the memory of all that it is a part of.
        self.begin = begin
        mx.eval(self._states)
        return None

    def place_for(self, cache: list[Any], end: int) -> int:
        """The first place from where all states up to `end` are here; `end` if there are none."""
        here = self._of() is cache[0] and self.begin <= end <= self.end
        return self.begin if here else end

    def between(self, begin: int, end: int) -> mx.array:
        """(1, end - begin, ...)"""
        assert self._states is not None
        return self._states[:, begin - self.begin : end - self.begin]


class DraftHead:
    """A head that is wholly in memory. One text at a time uses its cache.

    head: mlx-vlm's, whose weights must be evaluated. target: the model that verifies. It must note its hidden states in
    `states`.
    """

    def __init__(self, head: Any, target: Any) -> None:
        self.head, self.target = head, target
        self.most = most_tokens(head)
        self.states = HiddenStates(self.most // 2)
        self.user: object | None = None  # the drafter whose text the cache holds

    def begin(self, sampler: Sampler, vocabulary: int, cache: list[Any]) -> HeadDrafter:
        """The drafter of a new text. vocabulary: number of logits of the model that verifies, V."""
        return HeadDrafter(self, sampler, vocabulary, cache)


def most_tokens(head: Any) -> int:
    """The most tokens in the cache of a head. A cache with a window that has begun to rotate cannot be trimmed."""
    windows = [getattr(part, "max_size", None) for part in head.make_cache()]
    return min([MOST_TOKENS, *(window for window in windows if window)])


class HeadDrafter:
    """Proposes what a head chooses. The head's cache holds only tokens that are certain between two calls."""

    def __init__(self, source: DraftHead, sampler: Sampler, vocabulary: int, cache: list[Any]) -> None:
        self.source, self.sampler, self.vocabulary, self.cache = source, sampler, vocabulary, cache
        self._text: list[int] = []
        self._first = 0  # the place of the text's first token
        self._done = 0  # the place up to which the head has seen the hidden states
        self._length = 0  # tokens in the head's cache

    def add(self, tokens: Sequence[int]) -> None:
        self._text.extend(tokens)

    def read(self) -> None:
        """The cache of the model holds the text without its last token."""
        self._first = cached_tokens(self.cache) - (len(self._text) - 1)

    def propose(self, count: int) -> list[int]:
        source = self.source
        count = min(count, source.most // 2)
        if count < 1:
            return []
        continues, source.user = source.user is self, None  # An error may leave the cache in any state.
        with kept_random_state():  # The model that verifies draws the same numbers.
            states = self._catch_up(continues, count)
            if states is None:
                return []
            drafts = source.head.draft_block(self._text[-1], states, None, count + 1, self._choose)
            found = [int(token) for token in to_numpy(drafts[0])]
            source.head.accept_verified_tokens(states, drafts, 0, [], self._choose)  # takes the drafts back
            mx.eval(source.head.draft_eval_state())
        source.user = self
        return found

    def _catch_up(self, continues: bool, count: int) -> mx.array | None:
        """Shows the head the hidden states that are new, so that it has a guess for the next token.

        Returns the last one, (1, 1, ...); None if there are none. count: number of drafts that will follow.
        """
        source, text = self.source, self._text
        end = self._first + len(text) - 1  # The newest token has no state yet.
        begin = max(source.states.place_for(self.cache, end), self._first)
        if begin >= end:
            return None
        continues = continues and begin <= self._done < end
        if continues and self._length + (end - self._done) + count <= source.most:
            states = source.states.between(self._done, end)
            tokens = mx.array(text[self._done + 1 - self._first : -1], mx.int32)[None]
            source.head.accept_verified_tokens(states, tokens, tokens.shape[1], text[-1:], self._choose)
            self._length += end - self._done
        else:
            states = source.states.between(begin, end)
            source.head.reset(source.target)
            tokens = mx.array(text[begin - self._first : -1], mx.int32)[None]
            source.head.prefill_from_target_hidden(tokens, states, text[-1], self._choose)
            self._length = end - begin
        self._done = end
        mx.eval(source.head.draft_eval_state())  # by itself, as the plan counts it
        return states[:, -1:]

    def _choose(self, logits: mx.array) -> mx.array:
        """Logits (1, n, V of the head) -> the token that is chosen after the last one, (1, 1)."""
        return chosen_by(self.sampler, logits, self.vocabulary)[None]

    def end(self) -> None:
        if self.source.user is self:
            self.source.user = None
