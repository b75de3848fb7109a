"""The loop that makes tokens: reads the prompt, feeds the newest token, verifies drafts, counts and times it all."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import mlx.core as mx

from ..flash.host_arrays import to_numpy
from ..flash.stats import Counters, DraftCounts, Statistics
from ..flash.swap import swap_counters
from ..flash.system import large_memory_given_back
from ..layers.cache_parts import parts_of
from .cached_context import make_room
from .draft_depth import Pass
from .drafts import Drafter, Drafting, Sampler
from .rewinding import Rewinder


class Token(NamedTuple):
    """A token, the log-probabilities that it was chosen from, (V,), and whether it is an accepted draft."""

    token: int
    logprobs: mx.array
    from_draft: bool


class Chooser:
    """Chooses tokens from logits. The processors see all tokens so far, so the tokens must be told one by one."""

    def __init__(
        self, seen: list[int], sampler: Sampler, processors: Sequence[Callable[[mx.array, mx.array], mx.array]]
    ) -> None:
        self._sampler, self._processors = sampler, processors
        self._seen = mx.array(seen)

    def __call__(self, logits: mx.array) -> tuple[mx.array, mx.array]:
        """Logits (1, V) -> the token that is chosen, (1,), and its log-probabilities, (V,)."""
        for processor in self._processors:
            logits = processor(self._seen, logits)
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return self._sampler(logprobs), logprobs.squeeze(0)

    def took(self, token: int) -> None:
        if self._processors:
            self._seen = mx.concatenate([self._seen, mx.array([token])])


def cached_tokens(cache: list[Any]) -> int:
    """The number of tokens in a prompt cache. Some models have layers, or parts of layers, that do not count them."""
    return max((int(part.offset) for part in parts_of(cache) if hasattr(part, "offset")), default=0)


def must_be_read_at_once(cache: list[Any]) -> bool:
    """Whether a prompt cache is for a prompt with images in which earlier tokens attend to later ones."""
    sight = getattr(cache[0], "sight", None) if cache else None
    return sight is not None and sight.whole


class TokenLoop:
    """Calls and times the model. Prompt and decoded tokens are counted separately, without other generations'."""

    def __init__(self, model: Any, cache: list[Any]) -> None:
        self.model, self.cache = model, cache
        self.counted = {"prompt": Counters(), "decode": Counters()}
        self.began = time.perf_counter()
        self.swap = swap_counters()
        self.first_token_s = 0.0
        self.decoded = 0
        self.drafts: DraftCounts | None = None
        self._unread: list[int] = []  # tokens of the prompt that are read with its last one

    def prefill(
        self,
        ids: list[int],
        step: int,
        progress: Callable[[int, int], None],
        logits: Callable[[mx.array], None] | None = None,
    ) -> None:
        """Feeds all tokens but the last, in chunks. `plain` and `drafted` feed the last one, as in mlx-lm.

        They feed all of a prompt with images that must be read at once.

        Chunks end at multiples of `step` tokens of the whole context, so that they are those of a prompt read from its
        beginning even if some of it is in the cache.

        logits: gets those of every chunk, (T, V); None if they are not needed.
        """
        done, total, begin = 0, len(ids), cached_tokens(self.cache)
        progress(0, total)
        if must_be_read_at_once(self.cache):
            self._unread = ids[:-1]
            return
        while total - done > 1:
            pieces: list[list[int]] = []
            while total - done > 1 and len(pieces) < self._pieces_at_once(logits):
                pieces.append(ids[done : min(done + step - (begin + done) % step, total - 1)])
                done += len(pieces[-1])
            with large_memory_given_back():
                with self._counting("prompt"):
                    self._read(pieces, logits)
                mx.clear_cache()
            progress(done, total)

    def _pieces_at_once(self, logits: Callable[[mx.array], None] | None) -> int:
        """The number of chunks that may be read together. A snapshot of a cache may be wanted after each of them."""
        reading = self.model.flash.shared_reading
        trims = all(part.is_trimmable() for part in parts_of(self.cache))
        return reading.most if reading is not None and logits is None and trims else 1

    def _read(self, pieces: list[list[int]], logits: Callable[[mx.array], None] | None) -> None:
        reading = self.model.flash.shared_reading
        if len(pieces) > 1 and reading.feed(self.model, pieces, self.cache):
            return
        for piece in pieces:
            found = self.model(mx.array(piece)[None], cache=self.cache)[0]
            if logits is not None:
                logits(found)
            mx.eval([c.state for c in self.cache])
            self.model.flash.evaluate_guarded()

    def plain(self, token: int, choose: Chooser) -> Generator[Token]:
        """Yields the tokens that follow `token`, without end. The newest one has not been fed."""
        fed = [*self._unread, token]
        while True:
            token, logprobs, _ = self._decode(fed, 0, choose)
            yield Token(token, logprobs, False)
            fed = [token]

    def drafted(
        self, token: int, choose: Chooser, limit: int, text: list[int], drafting: Drafting, depth: int, sampler: Sampler
    ) -> Generator[Token]:
        """Like `plain`, with up to `depth` drafts per pass.

        While the iterator is in use, the cache may hold tokens that were not yielded, or lack some that were. Once it
        is closed, which may take a pass, it holds all but the newest.

        limit: most tokens that will be taken. text: all tokens up to `token`, those that were in the cache before
        included.
        """
        self.drafts = DraftCounts(drafting.kind, depth)
        drafter = drafting.begin(sampler, self.model.flash.vocabulary, self.cache)
        run = _Runs(self, choose, drafter, self.drafts, self._unread)
        passes: list[Pass] = []
        made = 0
        try:
            if depth:
                drafter.add(text)
                with self.model.flash.lock:
                    drafter.read()
            while True:
                room = drafting.most_positions - 1 - len(run.pending)
                if len(run.pending) > drafting.most_positions // 2:
                    room = 0  # This pass brings the cache up to date.
                left = limit - made - 1
                for each in run.next(token, min(depth, left, room)):
                    token, made = each.token, made + 1
                    yield each
                if left >= depth and not self._unread:  # otherwise the pass had to be short, or it read the prompt
                    passes.append(run.last)
                self._unread = []
        except GeneratorExit:
            run.settle()
            if drafting.depth is not None:
                drafting.depth.record(depth, passes)
            raise
        finally:
            drafter.end()

    def decode_run(self, fed: list[int], drafts: int, choose: Chooser) -> tuple[int, mx.array, mx.array]:
        """Feeds tokens, of which the last `drafts` are drafts.

        Returns the token that follows the others, its log-probabilities (V,), and the logits after each token from
        there on, (1, drafts + 1, V).
        """
        make_room(self.cache, cached_tokens(self.cache) + len(fed))
        return self._decode(fed, drafts, choose)

    def follow(self, logits: mx.array, choose: Chooser) -> tuple[int, mx.array]:
        """Chooses from logits (1, V) of a pass that has ended. Returns the token and its log-probabilities (V,)."""
        began = time.perf_counter()
        chosen, logprobs = choose(logits)
        mx.eval(chosen, logprobs)
        self.counted["decode"].total_s += time.perf_counter() - began
        return self._took(chosen, choose), logprobs

    def feed(self, tokens: list[int]) -> None:
        """Feeds tokens without choosing one."""
        with self._timed(len(tokens)):
            mx.eval(self.model(mx.array(tokens)[None], cache=self.cache)[:, -1])
            mx.eval([layer.state for layer in self.cache])

    def draft(self, drafter: Drafter, count: int) -> tuple[list[int], float]:
        """The drafts, and the seconds that they took."""
        began = time.perf_counter()
        with self.model.flash.lock:
            drafts = drafter.propose(count)
        seconds = time.perf_counter() - began
        self.counted["decode"].total_s += seconds
        return drafts, seconds

    def _decode(self, fed: list[int], drafts: int, choose: Chooser) -> tuple[int, mx.array, mx.array]:
        with self._counting("prompt") if self._unread and not self.decoded else self._timed(len(fed)):
            logits = self.model(mx.array(fed)[None], cache=self.cache)[:, -1 - drafts :, :]
            chosen, logprobs = choose(logits[:, 0, :])
            mx.eval(chosen, logprobs, logits if drafts else ())
        self.model.flash.verify_unchanged()  # The files must not have changed while this token was computed.
        if not self.decoded:
            self.first_token_s = time.perf_counter() - self.began
        return self._took(chosen, choose), logprobs, logits

    def _took(self, chosen: mx.array, choose: Chooser) -> int:
        token = int(to_numpy(chosen).item())
        choose.took(token)
        self.decoded += 1
        return token

    @contextlib.contextmanager
    def _timed(self, positions: int) -> Iterator[None]:
        """Wraps a pass over the weights with so many tokens."""
        with self._counting("decode") as (counters, before):
            began = time.perf_counter()
            yield
            seconds = time.perf_counter() - began
            counters.total_s += seconds
            took = counters - before
            self.model.flash.trials.took(1, positions, seconds, took.misses, took.resized)

    @contextlib.contextmanager
    def _counting(self, kind: str) -> Iterator[tuple[Counters, Counters]]:
        """Locks the model for this generation, and adds the counts inside the context to this generation's.

        Yields the model's counters, and a copy of what they were.
        """
        counters: Counters = self.model.flash.streamer.counters
        with self.model.flash.lock:
            before = counters.copy()
            if kind == "prompt":
                self.model.flash.trials.interrupted()
            try:
                yield counters, before
            except BaseException:
                # Only this thread can evaluate what it began, and the next generation may come from another one.
                with contextlib.suppress(Exception):
                    self.model.flash.evaluate_guarded()
                raise
            self.counted[kind] += counters - before

    def statistics(self, last: bool = False) -> Statistics:
        """The statistics so far. last: whether the generation has ended, and the system is asked what it swapped."""
        return Statistics(
            prompt=self.counted["prompt"],
            decode=self.counted["decode"],
            decoded_tokens=self.decoded,
            first_token_s=self.first_token_s,
            drafts=None if self.drafts is None else replace(self.drafts),
            swap=swap_counters() - self.swap if last else None,
        )


class _Runs:
    """Passes with drafts over one cache, and the tokens that each yields in a row.

    pending: certain tokens that the cache had to give back with the drafts behind them. They are fed again with the
    next pass. last: figures of the last pass.
    """

    def __init__(
        self, loop: TokenLoop, choose: Chooser, drafter: Drafter, counts: DraftCounts, pending: list[int]
    ) -> None:
        self._loop, self._choose, self._drafter, self._counts = loop, choose, drafter, counts
        self._rewinder = Rewinder(loop.cache)
        self.pending = pending
        self._fed: list[int] = []  # the tokens of the pass that is running
        self._sure = 0  # how many of them are certain
        self.last = Pass(0, 0, 0.0, 0.0)

    def next(self, token: int, most: int) -> Iterator[Token]:
        """Feeds `token` with at most `most` drafts. Yields the tokens that follow, one more than drafts are accepted.

        Each is chosen after the one before was taken, so that processors that follow the text need not go back.
        """
        loop, counts = self._loop, self._counts
        drafts, draft_seconds = loop.draft(self._drafter, most) if most > 0 else ([], 0.0)
        before = loop.counted["decode"].total_s
        self._fed = [*self.pending, token, *drafts]
        self._sure = len(self.pending) + 1
        if drafts:
            self._rewinder.mark()
        token, logprobs, logits = loop.decode_run(self._fed, len(drafts), self._choose)
        counts.passes += 1
        counts.drafted += len(drafts)
        accepted = 0
        while accepted < len(drafts) and token == drafts[accepted]:
            self._drafter.add([token])
            counts.accepted += 1
            yield Token(token, logprobs, True)
            accepted += 1
            self._sure += 1
            token, logprobs = loop.follow(logits[:, accepted, :], self._choose)
        self._rewind()
        self.last = Pass(len(drafts), accepted, loop.counted["decode"].total_s - before, draft_seconds)
        self._drafter.add([token])
        yield Token(token, logprobs, False)

    def settle(self) -> None:
        """Makes the cache hold the certain tokens, and nothing else."""
        self._rewind()
        if self.pending:
            self._loop.feed(self.pending)
            self.pending = []

    def _rewind(self) -> None:
        fed, self._fed = self._fed, []
        if not fed:
            return
        kept = self._sure
        if len(fed) > self._sure:
            kept = self._rewinder.rewind(len(fed), self._sure)
        self.pending = fed[kept : self._sure]
