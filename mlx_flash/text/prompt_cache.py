"""The KV caches of several conversations, kept so that only the new part of a prompt is read.

The last conversation has the planned KV cache. Earlier ones are kept within the plan's prompt caches, and the least
recently used one goes first. The longest usable prefix wins.

The text of an answer must not depend on which conversations memory had room for. A prompt is read in chunks that end
at multiples of a fixed number of tokens (512). Its last chunk ends one token before its end, and the last token is fed
alone, as decoded tokens are. Other chunks may change the last bits of a result. So a context is reused only at places
where it is what another way to the same prompt would have made:

1. A context that is wholly a prefix of the prompt is continued at its end, if it ends with a token that was fed alone,
   or with a whole chunk. Decoded tokens stay as they were decoded.
2. Otherwise a context is cut back: to the end of a whole chunk; to the end of an earlier turn, where rule 1 would have
   continued it; or to one token before the prompt's end, if the reading of the same prompt ended there.

What follows is read in the chunks of a prompt that is read from its beginning. So the logits depend on the prompt, and
on which of its tokens were decoded in an earlier turn rather than read, and on nothing else that was kept or not. A
context in which nothing was decoded gives the bits of a prompt that is read from its beginning; with `fresh`, only such
contexts are used.

A cut needs a cache that can be trimmed. Of parts that cannot (states of recurrent layers, windows that have moved on),
copies are kept at the last whole chunk of the system prompt and of the newest turns' prompts, and rule 2 applies there.

Tokens that were decoded beside other answers have the bits of that batch, so no prompt may continue them. A context
that `read` lends for this comes back cut to the prompt that was read, or to a snapshot before its end. So the next turn
reads the answer again, in the chunks of a prompt.

With `files`, a context that memory has no room for is written to the disk, and the same rules decide what is reused of
it. A context that is read from the disk takes the place of the last conversation's.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from ..flash.system import large_memory_given_back
from .cached_context import CachedContext
from .conversation_files import ConversationFiles, DiskStatistics
from .generation import FlashResponse, chunk_of, stream_generate
from .image_prompts import ImagePrompt, see
from .token_loop import TokenLoop
from .written_context import WrittenContext

LEAST_REUSED = 16  # tokens; reusing fewer saves nothing, and would read the rest in other chunks
MOST_SNAPSHOTS = 4  # of a context: the first one, which may be the system prompt's, and the newest ones


@dataclass(frozen=True)
class PromptCacheStatistics:
    """What is kept of earlier conversations. contexts, tokens: without those of the last conversation."""

    contexts: int
    tokens: int
    used_bytes: int  # with the snapshots of the last conversation
    planned_bytes: int
    on_disk: DiskStatistics | None = None  # None if nothing is kept there


class ReusedPromptCache:
    """`stream_generate` for whole prompts, which does not read again what is in the cache of a conversation.

    The rule at the top of this file decides what is reused. A prompt that leaves a conversation's context before its
    end gets a copy of the common part if the original can be kept. If the same prompt comes again, its new answer takes
    the place of the old one.

    files: where contexts go that memory has no room for, and all of them at `close`; None for nowhere.

    For one thread at a time. `statistics` may be called from any thread.
    """

    def __init__(self, model: Any, files: ConversationFiles | None = None) -> None:
        self.model, self._files = model, None if model.flash.one_conversation else files
        self.reused = 0  # number of the last prompt's tokens that were in a cache already
        self.planned_bytes: int = model.flash.plan.demand.prompt_caches  # may be lowered at any time
        self._last = self._empty()  # the last conversation's
        self._kept: tuple[CachedContext, ...] = ()  # earlier ones, the least recently used one first
        self._lent: tuple[CachedContext, ...] = ()  # those that are decoded elsewhere
        self._reading = False  # whether `read` uses the last one

    @property
    def tokens(self) -> list[int]:
        """The tokens in the cache of the last conversation."""
        return self._last.tokens

    def forget(self) -> None:
        """Empties all caches and frees their memory. What is on the disk stays."""
        self._kept = self._lent = ()
        self._forget_last()

    def close(self) -> None:
        """Writes all contexts to the disk, the last one first, as far as time allows, and frees their memory."""
        if self._files is not None:
            contexts = (self._last, *reversed(self._kept))
            self._files.close(context for context in contexts if context.whole and context.tokens)
        self.forget()

    def statistics(self) -> PromptCacheStatistics:
        last, kept = self._last, self._kept
        return PromptCacheStatistics(
            len(kept),
            sum(len(context.tokens) for context in kept),
            self._used(kept, last),
            self.planned_bytes,
            None if self._files is None else self._files.statistics(),
        )

    def stream_generate(
        self,
        tokenizer: Any,
        prompt: list[int],
        max_tokens: int = 256,
        *,
        system_tokens: int = 0,
        fresh: bool = False,
        prefill_step_size: int | None = None,
        prompt_progress_callback: Callable[[int, int], None] | None = None,
        seen: ImagePrompt | None = None,
        **options: Any,
    ) -> Generator[FlashResponse, None, None]:
        """Like `mlx_flash.stream_generate`, with the same errors; `prompt_tokens` in the responses counts the new ones.

        system_tokens: how many of the prompt's first tokens other conversations are likely to begin with, such as those
        of the system prompt. fresh: give the text of a prompt that is read from its beginning, whatever was decoded
        before. seen: the same prompt with its images. It is read from its beginning, and its context is not kept: equal
        tokens may stand for other images. With a `prompt_logits_callback`, all of the prompt is read.

        The iterator may be closed, and the callback may raise: the next call then uses what the cache holds by then.
        After any other error the cache of this conversation is empty; the others stay.
        """
        step = prefill_step_size or chunk_of(self.model)
        if seen is not None:
            self._lose(self._last)
            self._forget_last()
            self.reused = 0
            progress_of: dict[str, Any] = {
                "prefill_step_size": step,
                "prompt_progress_callback": prompt_progress_callback,
            }
            cache = see(self.model, seen)
            return stream_generate(
                self.model, tokenizer, prompt, max_tokens, prompt_cache=cache, **progress_of, **options
            )  # type: ignore[return-value]
        self.reused = self._begin(prompt, step, fresh, options.get("prompt_logits_callback") is not None)
        context = self._last
        rest = prompt[self.reused :]
        progress = self._noting(context, prompt, system_tokens, prompt_progress_callback)
        responses = stream_generate(
            self.model,
            tokenizer,
            rest,
            max_tokens,
            prompt_cache=context.cache,
            prefill_step_size=step,
            prompt_progress_callback=progress,
            cached=prompt[: self.reused],
            **options,
        )

        def stream() -> Generator[FlashResponse, None, None]:
            made: list[int] = []
            try:
                for response in responses:
                    context.decode([*prompt, *made])  # The newest token is not in the cache yet.
                    made.append(response.token)
                    # With drafts, the cache may hold more, or less, until the generation is closed.
                    context.whole = response.statistics is None or response.statistics.drafts is None
                    yield response
                    context.whole = False
                context.whole = True
            except GeneratorExit:
                responses.close()
                context.whole = True
                raise
            finally:
                if not context.whole:
                    self._spoil(context)

        return stream()

    def read(
        self,
        prompt: list[int],
        *,
        system_tokens: int = 0,
        fresh: bool = False,
        prefill_step_size: int | None = None,
        prompt_progress_callback: Callable[[int, int], None] | None = None,
        prompt_logits_callback: Callable[[mx.array], None] | None = None,
    ) -> tuple[CachedContext, TokenLoop]:
        """Reads all of a prompt but its last token, to be decoded beside others. Arguments and errors: as above.

        Returns the context and the loop that read it. They are lent until `give_back`, which the callback may call for
        other contexts.
        """
        step = prefill_step_size or chunk_of(self.model)
        self.reused = self._begin(prompt, step, fresh, prompt_logits_callback is not None)
        context, rest = self._last, prompt[self.reused :]
        loop = TokenLoop(self.model, context.cache)
        progress = self._noting(context, prompt, system_tokens, prompt_progress_callback)
        self._reading = True
        try:
            loop.prefill(rest, step, progress, prompt_logits_callback)
            context.whole = True
        finally:
            self._reading = False
            if not context.whole:
                self._spoil(context)
        self._lent, self._last = (*self._lent, context), self._empty(step)
        return context, loop

    def give_back(self, context: CachedContext, cache: list[Any] | None, tokens: list[int]) -> None:
        """Takes back a context that `read` lent, as it was when it had been read.

        cache: holds exactly `tokens`, of which those after the context's were decoded; None if it is lost.
        """
        self._lent = tuple(each for each in self._lent if each is not context)
        if cache is None:
            return
        read, context.cache = len(context.tokens), cache
        context.decode(tokens)
        place = read if context.can_cut(read) else max(context.snapshots, default=0)
        if not place:
            return
        context.cut(place)
        self._kept = tuple(each for each in self._kept if each.tokens != context.tokens)
        if self._reading:
            self._keep(context, self._last)
            return
        last, self._last = self._last, context
        if last.tokens and last.whole and last.tokens != context.tokens:
            self._keep(last, context)

    def _noting(
        self,
        context: CachedContext,
        prompt: list[int],
        system_tokens: int,
        callback: Callable[[int, int], None] | None,
    ) -> Callable[[int, int], None]:
        """A callback for the progress of a prompt that notes it in the context, and takes snapshots."""
        step = context.step
        snapshots = {min(size, len(prompt) - 1) // step * step for size in (system_tokens, len(prompt))} - {0}

        def progress(done: int, total: int) -> None:
            if done < total:
                context.read(prompt, len(prompt) - total + done)
                if len(context.tokens) in snapshots:
                    self._take_snapshot(context)
            else:
                context.decode(prompt)
            if callback is not None:
                context.whole = True
                callback(done, total)
            context.whole = False

        return progress

    def _spoil(self, context: CachedContext) -> None:
        """Forgets the last context, after an error that may have left it half changed."""
        if self._last is context:
            if self._files is not None:
                self._files.distrust(context)
            self._forget_last()

    # -- which context a prompt continues ----------------------------------------------------------------------

    def _begin(self, prompt: list[int], step: int, fresh: bool, anew: bool) -> int:
        """Makes the context that the prompt continues the last one. Returns the number of tokens that it holds.

        anew: continue none.
        """
        if not self._last.whole:
            self._forget_last()
        self._keep_fitting(lambda kept: self._used(kept, self._last))  # The plan may have been lowered.
        source, place = (None, 0) if anew else self._longest(prompt, step, fresh)
        with large_memory_given_back():
            while self._files is not None and not anew and (found := self._files.longest(prompt, step, fresh, place)):
                if self._read(*found, prompt, step):
                    source, place = self._last, len(self._last.tokens)
                    break
                source, place = self._longest(prompt, step, fresh)
            if source is not self._last or place < len(source.tokens):
                self._switch(source, place, prompt, step)
            context, self._last = self._last, self._empty(step)
            context.begin(step, min(len(prompt), self.model.flash.plan.context))
            self._last = context
        return place

    def _longest(self, prompt: list[int], step: int, fresh: bool) -> tuple[CachedContext | None, int]:
        """The context with the longest usable prefix of a prompt, and its length."""
        best, best_place = None, 0
        for context in (self._last, *reversed(self._kept)):
            place = context.place_for(prompt, step, fresh)
            if place < min(step, LEAST_REUSED):
                continue
            # Among equals, one that ends there serves without a copy.
            if best is None or place > best_place or place == best_place == len(context.tokens) < len(best.tokens):
                best, best_place = context, place
        return best, best_place

    def _read(self, written: WrittenContext, place: int, prompt: list[int], step: int) -> bool:
        """Keeps the last context, and reads the first `place` tokens of a file in its place. False if that fails."""
        assert self._files is not None
        if (file := self._files.opened(written)) is None:
            return False
        with file:  # It is open before others are written, because their room may be this one's.
            self._switch(None, 0, prompt, step)
            room = self.planned_bytes - self._used(self._kept, None)
            made = self._files.read(written, file, prompt, place, room)
        self._last = made or self._last
        return made is not None

    def _switch(self, source: CachedContext | None, place: int, prompt: list[int], step: int) -> None:
        """Keeps the last context, and puts the first `place` tokens of `source` (None: an empty one) in its place.

        A context that is being changed is in none of the attributes, so an interrupt or error loses only that one.
        MLX counts an array whose evaluation failed as evaluated, so such a context must not be used.
        """
        last, self._last = self._last, self._empty(step)
        replaced = last if source is None and last.answered(prompt) else None
        if source is not None and (source.answered(prompt) or place == len(source.tokens)):
            replaced = source
        self._kept = tuple(context for context in self._kept if context is not replaced)
        if last.tokens and last is not replaced:
            self._keep(last, source)
        del last
        mx.clear_cache()
        if source is None:
            return
        if source in self._kept:
            made = source.copy(place)
        else:  # It is not kept, or memory has no room for it beside the others.
            made = source
            made.cut(place)
        self._last = made

    def _keep(self, context: CachedContext, following: CachedContext | None) -> None:
        """Keeps a context, unless it alone is too large. following: the context that will be the last one."""
        context.drop_room()
        if self._used((context,), following) <= self.planned_bytes:
            self._keep_fitting(lambda kept: self._used((*kept, context), following))
            self._kept = (*self._kept, context)
        else:
            self._lose(context)

    def _keep_fitting(self, used: Callable[[tuple[CachedContext, ...]], int]) -> None:
        """Loses the least recently used of the kept contexts until the bytes that are `used` are within the plan."""
        before, self._kept = self._kept, self._fitting(self._kept, used)
        for context in before[: len(before) - len(self._kept)]:
            self._lose(context)

    def _lose(self, context: CachedContext) -> None:
        """Writes a context that memory has no room for."""
        if self._files is not None and context.whole and context.tokens:
            self._files.write(context)

    def _fitting(
        self, kept: tuple[CachedContext, ...], used: Callable[[tuple[CachedContext, ...]], int]
    ) -> tuple[CachedContext, ...]:
        """The most recently used of `kept` with which the bytes that are `used` are within the plan."""
        while kept and used(kept) > self.planned_bytes:
            kept = kept[1:]
        return kept

    def _take_snapshot(self, context: CachedContext) -> None:
        """Copies what cannot be trimmed of the context in use, if the plan has room for it without other contexts."""
        more = context.snapshot_bytes()
        if not more or len(context.tokens) in context.snapshots or more > self.planned_bytes:
            return
        while len(context.snapshots) >= MOST_SNAPSHOTS or self._used((), context) + more > self.planned_bytes:
            del context.snapshots[sorted(context.snapshots)[:2][-1]]
        before = self._kept
        self._keep_fitting(lambda kept: self._used(kept, context) + more)
        if self._kept != before:
            del before
            mx.clear_cache()
        context.snapshot()

    def _empty(self, step: int | None = None) -> CachedContext:
        return CachedContext(make_prompt_cache(self.model), step or chunk_of(self.model))

    def _forget_last(self) -> None:
        self._last = self._empty()
        mx.clear_cache()

    def _used(self, kept: tuple[CachedContext, ...], last: CachedContext | None) -> int:
        """Bytes of contexts with their snapshots, some of which they share, and of the snapshots of those in use."""
        every = (*kept, *self._lent) if last is None else (*kept, *self._lent, last)
        snapshots = {snapshot for context in every for snapshot in list(context.snapshots.values())}
        return sum(context.nbytes for context in kept) + sum(snapshot.nbytes for snapshot in snapshots)
