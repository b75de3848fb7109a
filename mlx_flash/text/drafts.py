"""Drafts: cheap guesses of the next tokens, which one pass over the weights verifies together.

The text does not depend on the drafts. At every place the model's own token is chosen, from its own probabilities, by
the sampler and with the random numbers that it would have without drafts. A draft is accepted if it is that token. A
draft x that was made without chance is thus accepted with probability p(x), and otherwise replaced by a token that has
the distribution p without x: the usual rule of speculative sampling. A draft model samples with the random numbers that
the model itself is about to use, so the two choose the same token as often as their probabilities agree. Only rounding
may differ: a pass of several tokens may compute with other kernels than one of a single token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx

from ..defaults import PREFILL_TOKENS
from ..flash.host_arrays import to_numpy
from ..flash.random_state import kept_random_state
from ..flash.system import large_memory_given_back
from ..layers.cache_parts import parts_of
from .cached_context import forgets, make_room
from .draft_depth import FIRST_DEPTH, DraftDepth
from .encoding import common_prefix
from .ngrams import NgramIndex
from .rewinding import Rewinder

NGRAM, MODEL, HEAD = "ngram", "model", "mtp"  # ways of drafting

Sampler = Callable[[mx.array], mx.array]  # log-probabilities (1, V) -> token ids (1,)


class Drafter(Protocol):
    """Makes the drafts of one text. `end` must be called when the text has ended."""

    def add(self, tokens: Sequence[int]) -> None:
        """Continues the text with tokens that are certain."""

    def read(self) -> None:
        """Prepares for the first draft. May take long after a long prompt."""

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens that may follow."""

    def end(self) -> None: ...


class DraftSource(Protocol):
    """What is in memory to make drafts of any text."""

    def begin(self, sampler: Sampler, vocabulary: int, cache: list[Any]) -> Drafter: ...


class NgramDrafter:
    """Proposes what followed the longest end of the text where it occurred before."""

    def __init__(self) -> None:
        self._index = NgramIndex()

    def add(self, tokens: Sequence[int]) -> None:
        self._index.extend(tokens)

    def read(self) -> None: ...

    def propose(self, count: int) -> list[int]:
        return self._index.continuation(count)

    def end(self) -> None: ...


@dataclass
class _Fed:
    """A prompt cache of the draft model, and the tokens that it holds."""

    cache: list[Any]
    tokens: list[int] = field(default_factory=list)


class DraftModel:
    """A small model that is wholly in memory. It keeps the cache of its last text, which a later one may continue.

    model: in mlx-lm's form; its weights must be evaluated. positions: most tokens that it can attend to.
    """

    def __init__(self, model: Any, positions: int | None = None) -> None:
        self.model, self.positions = model, positions
        self._kept: list[_Fed] = []  # at most one; empty while a text uses it

    def begin(self, sampler: Sampler, vocabulary: int, _: list[Any]) -> ModelDrafter:
        """The drafter of a new text. vocabulary: number of logits of the model that verifies, V."""
        return ModelDrafter(self, sampler, vocabulary)

    def take(self, tokens: list[int]) -> _Fed:
        """A cache that holds nothing but the beginning of `tokens`, never the last one."""
        try:
            fed = self._kept.pop()
        except IndexError:
            return self._empty()
        place = common_prefix(fed.tokens, tokens[:-1])
        if surplus := len(fed.tokens) - place:
            if any(forgets(part) for part in parts_of(fed.cache)):
                return self._empty()
            for part in parts_of(fed.cache):
                part.trim(surplus)
            del fed.tokens[place:]
        return fed

    def keep(self, fed: _Fed) -> None:
        self._kept = [fed]

    def _empty(self) -> _Fed:
        from mlx_lm.models.cache import make_prompt_cache

        return _Fed(make_prompt_cache(self.model))


class ModelDrafter:
    """Proposes what a draft model chooses. Its cache holds only tokens that are certain between two calls."""

    def __init__(self, source: DraftModel, sampler: Sampler, vocabulary: int) -> None:
        self.source, self.sampler, self.vocabulary = source, sampler, vocabulary
        self._text: list[int] = []
        self._fed: _Fed | None = None

    def add(self, tokens: Sequence[int]) -> None:
        self._text.extend(tokens)

    def read(self) -> None:
        if self._fed is None:
            self._fed = self.source.take(self._text)
        fed = self._fed
        with self._forgotten_after_errors():
            while rest := self._text[len(fed.tokens) : len(self._text) - 1]:
                with large_memory_given_back():
                    self._feed(rest[:PREFILL_TOKENS])
                    mx.eval([layer.state for layer in fed.cache])
                    mx.clear_cache()

    def propose(self, count: int) -> list[int]:
        positions = self.source.positions
        if count < 1 or (positions is not None and len(self._text) + count > positions):
            return []
        if self._fed is None or len(self._text) - len(self._fed.tokens) > PREFILL_TOKENS:
            self.read()
        fed = self._fed
        assert fed is not None
        with self._forgotten_after_errors(), kept_random_state():  # The model that verifies draws the same numbers.
            drafts = [self._chosen(self._feed(self._text[len(fed.tokens) :]))]
            mx.eval(drafts, [layer.state for layer in fed.cache])
            rewinder = Rewinder(fed.cache)
            rewinder.mark()
            while len(drafts) < count:
                make_room(fed.cache, len(self._text) + len(drafts))
                drafts.append(self._chosen(self.source.model(drafts[-1][None], cache=fed.cache)))
                mx.async_eval(drafts[-1])
            found = [int(token) for token in to_numpy(mx.concatenate(drafts))]
            rewinder.rewind(count - 1, 0)
        return found

    @contextmanager
    def _forgotten_after_errors(self) -> Iterator[None]:
        """Drops the cache after an error or an interrupt, which may leave it in any state."""
        try:
            yield
        except BaseException:
            self._fed = None
            raise

    def end(self) -> None:
        if self._fed is not None:
            self.source.keep(self._fed)
            self._fed = None

    def _feed(self, tokens: list[int]) -> mx.array:
        """Tokens that are certain -> logits (1, n, V of the draft model)."""
        assert self._fed is not None
        make_room(self._fed.cache, len(self._text))
        logits: mx.array = self.source.model(mx.array(tokens)[None], cache=self._fed.cache)
        self._fed.tokens.extend(tokens)
        return logits

    def _chosen(self, logits: mx.array) -> mx.array:
        return chosen_by(self.sampler, logits, self.vocabulary)


def chosen_by(sampler: Sampler, logits: mx.array, vocabulary: int) -> mx.array:
    """Logits (1, n, V of what drafts) -> the token that is chosen after the last one, (1,).

    vocabulary: number of logits of the model that verifies.
    """
    last = logits[:, -1, :vocabulary].astype(mx.float32)
    if (missing := vocabulary - last.shape[-1]) > 0:  # The random numbers depend on the shape.
        last = mx.concatenate([last, mx.full((1, missing), -mx.inf)], axis=-1)
    return sampler(last - mx.logsumexp(last, keepdims=True))


@dataclass
class Drafting:
    """How a model's drafts are made, and how many.

    kind: NGRAM, MODEL or HEAD. most_positions: most tokens of a pass, so that it takes the path of decoded tokens.
    model: the draft model for MODEL, the head for HEAD. depth: chooses the number of drafts for each request; None for
    FIRST_DEPTH.
    """

    kind: str
    most_positions: int
    model: DraftSource | None = None
    depth: DraftDepth | None = None

    def choose_depth(self) -> int:
        """The most drafts per pass for the next text."""
        return min(FIRST_DEPTH, self.most_positions - 1) if self.depth is None else self.depth.choose()

    def begin(self, sampler: Sampler, vocabulary: int, cache: list[Any]) -> Drafter:
        """The drafter of a new text. cache: the prompt cache of the model that verifies."""
        return NgramDrafter() if self.model is None else self.model.begin(sampler, vocabulary, cache)
