"""Decodes several sequences together, one token each per step, so that they share what the step reads.

Rows join and leave a batch between two steps. A prompt is read alone, into a prompt cache of its own, which then joins
the others in mlx-lm's batch caches, and comes out of them again when its row leaves. A step has the bits of the
resident model in the same batch, which need not be those of a row alone.

mlx-lm's own `BatchGenerator` begins the next step before it hands out the tokens of this one. Here a step waits for its
reads anyway, and a grammar must see a token before it restricts the next one.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ..defaults import KV_STEP_TOKENS
from ..errors import UsageError
from ..flash.host_arrays import to_numpy
from ..flash.random_state import kept_random_state
from ..flash.stats import Counters
from ..layers.cache_parts import parts_of
from .cached_context import grows, make_room
from .token_loop import Chooser, Token

NO_BATCHES = "mlx-lm has no batches for the KV cache of this model. Serve one request at a time."


def can_batch(cache: list[Any]) -> bool:
    """Whether mlx-lm has batches for every part of a prompt cache. It has none for quantised and chunked ones."""
    return all(hasattr(part, "merge") for part in parts_of(cache))


def require_batches(model: Any) -> None:
    """Raises UsageError if mlx-lm cannot batch the prompt caches of a model."""
    from mlx_lm.models.cache import make_prompt_cache

    if not can_batch(make_prompt_cache(model)):
        raise UsageError(NO_BATCHES)


@dataclass
class _Row:
    """A sequence. fed: the token that it feeds next. seed: where the random numbers of its own sampler go on."""

    fed: int
    choose: Chooser
    seed: int


class DecodeBatch:
    """The rows that are decoded now. For one thread at a time.

    counted: sums over all steps, and over all rows of a step. last: those of the last step.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._cache: list[Any] = []  # mlx-lm's batch cache of every layer
        self._rows: list[_Row] = []
        self._feeds = 0  # number of tokens that the caches have room for; 0 if it is not known
        self.counted, self.last = Counters(), Counters()

    def __len__(self) -> int:
        return len(self._rows)

    def join(self, cache: list[Any], token: int, choose: Chooser, seed: int = 0) -> None:
        """Adds a row at the end.

        cache: holds all tokens of the row but the last, which is `token`. The list is emptied, so that only one
        layer's cache exists twice. seed: of the random numbers for the row's sampler, which are its own. Raises
        UsageError if mlx-lm cannot batch such a cache.
        """
        if not can_batch(cache):
            raise UsageError(NO_BATCHES)
        layers, self._feeds = cache[::-1], 0
        cache.clear()
        for number in range(len(layers)):
            joined = layers[-1].merge([layers.pop()])
            if self._rows:
                self._cache[number].extend(joined)
            else:
                self._cache.append(joined)
            mx.eval(self._cache[number].state)
        self._rows.append(_Row(token, choose, seed))

    def step(self) -> list[Token | Exception]:
        """Feeds the newest token of every row.

        Returns the token that follows in each row, or the error of its sampler or processors. A row with an error must
        leave before the next step. If this raises, for instance ReadError, no row can be used any more.
        """
        fed = mx.array([row.fed for row in self._rows])
        self._make_room()
        flash = self._model.flash
        with flash.lock:
            before, began = flash.streamer.counters.copy(), time.perf_counter()
            try:
                logits = self._model(fed[:, None], cache=self._cache)[:, -1, :]  # (B, V)
                with kept_random_state():
                    found = [_choose(row, logits[at : at + 1]) for at, row in enumerate(self._rows)]
                mx.eval(logits, [pair for pair in found if not isinstance(pair, Exception)])
            except BaseException:
                # Only this thread can evaluate what it began, and the next generation may come from another one.
                with contextlib.suppress(Exception):
                    flash.evaluate_guarded()
                raise
            seconds = time.perf_counter() - began
            flash.streamer.counters.total_s += seconds
            self.last = flash.streamer.counters - before
            flash.trials.took(len(self._rows), 1, seconds, self.last.misses, self.last.resized)
            self.counted += self.last
        flash.verify_unchanged()  # The files must not have changed while these tokens were computed.
        return [_took(row, pair) for row, pair in zip(self._rows, found, strict=True)]

    def _make_room(self) -> None:
        """Grows the caches by whole steps, as the plan counts them. mlx-lm would begin a new step at any place."""
        if self._feeds <= 0:
            longest = max((part._idx for part in parts_of(self._cache) if grows(part)), default=-1)
            if longest >= 0:
                make_room(self._cache, longest + 1)
                self._feeds = KV_STEP_TOKENS - longest % KV_STEP_TOKENS
        self._feeds -= 1

    def leave(self, row: int) -> list[Any]:
        """Takes out row number `row`; the later ones move up. Returns its prompt cache, which holds what was fed."""
        found = []
        self._feeds = 0
        keep = [other for other in range(len(self)) if other != row]
        for layer in self._cache:
            found.append(layer.extract(row))
            mx.eval(found[-1].state)
            if keep:
                layer.filter(keep)
                mx.eval(layer.state)
        if not keep:
            self._cache = []
        del self._rows[row]
        return found


def _choose(row: _Row, logits: mx.array) -> tuple[mx.array, mx.array] | Exception:
    """The token that a row chooses from logits (1, V), and its log-probabilities (V,). They are not evaluated."""
    mx.random.seed(row.seed)
    try:
        return row.choose(logits)
    except Exception as error:
        return error
    finally:
        state: Any = mx.random.state
        high, low = state[0].tolist()  # the key is the two halves of a seed
        row.seed = high << 32 | low


def _took(row: _Row, pair: tuple[mx.array, mx.array] | Exception) -> Token | Exception:
    if isinstance(pair, Exception):
        return pair
    chosen, logprobs = pair
    row.fed = int(to_numpy(chosen).item())
    row.choose.took(row.fed)
    return Token(row.fed, logprobs, False)
