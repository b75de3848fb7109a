"""The caches of several conversations: they keep within their bytes, and the bits do not depend on what was kept."""

from __future__ import annotations

import threading
import zlib
from collections.abc import Callable
from contextlib import closing, suppress
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import ArraysCache, CacheList, KVCache, RotatingKVCache

from mlx_flash.flash.stats import Counters
from mlx_flash.flash.trials import Trials
from mlx_flash.layers.cache_parts import parts_of
from mlx_flash.text.generation import stream_generate
from mlx_flash.text.prompt_cache import ReusedPromptCache

STEP = 4  # tokens per chunk
CONTEXT = 300  # tokens
VOCABULARY = 96
SIZE = 2 * 256 * 4  # bytes of one step of the fake model's KV cache
KINDS: dict[str, Callable[[], list[Any]]] = {
    "trims": lambda: [KVCache()],
    "recurrent": lambda: [KVCache(), ArraysCache(1)],
    "window": lambda: [CacheList(KVCache(), RotatingKVCache(6))],
}


class FakeModel:
    """Its logits are a checksum of all that is in the cache. That is how each token was fed: in a chunk of what size.

    kind: of the cache. planned: bytes of prompt caches.
    """

    def __init__(self, kind: str, planned: int) -> None:
        self.make_cache = KINDS[kind]
        plan = SimpleNamespace(context=CONTEXT, demand=SimpleNamespace(prompt_caches=planned))
        self.flash = SimpleNamespace(
            plan=plan,
            vocabulary=VOCABULARY,
            lock=threading.Lock(),
            streamer=SimpleNamespace(counters=Counters()),
            evaluate_guarded=lambda: None,
            trials=Trials(),
            answered=lambda *_: None,
            verify_unchanged=lambda: None,
            drafting=None,
            shared_reading=None,
            prefill_tokens=512,
            one_conversation=False,
        )

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        count = tokens.shape[1]
        fed = mx.array([count * 100 + place for place in range(count)], mx.float32)[None, None, :, None]
        read = tokens.astype(mx.float32)[:, None, :, None]
        seen = [np.array(array) for part in parts_of(cache) for array in self._update(part, fed, read)]
        chosen = zlib.crc32(b"".join(array.tobytes() for array in seen)) % VOCABULARY
        return (mx.arange(VOCABULARY) == chosen).astype(mx.float32)[None, None]

    def _update(self, part: Any, fed: mx.array, read: mx.array) -> tuple[mx.array, ...]:
        if not isinstance(part, ArraysCache):
            return tuple(part.update_and_fetch(fed, read))
        state = mx.zeros((1, 1)) if part[0] is None else part[0]
        part[0] = (state * 31 + mx.sum(fed * read) + fed.size) % 8191
        return (part[0],)


def check_bytes(turns: ReusedPromptCache) -> None:
    """Compares the bytes with mlx-lm's own count."""
    snapshots = {snapshot for context in (*turns._kept, turns._last) for snapshot in context.snapshots.values()}
    parts = [part for context in turns._kept for part in parts_of(context.cache)]
    parts += [part for snapshot in snapshots for part in snapshot.parts if part is not None]
    used = sum(part.nbytes for part in parts)
    assert turns.statistics().used_bytes == used <= turns.planned_bytes
    for context in (*turns._kept, turns._last):
        for part in parts_of(context.cache):
            if isinstance(part, KVCache):
                room = 0 if part.keys is None else part.keys.shape[2]
                assert part.offset == len(context.tokens) <= room or not context.tokens
                assert room <= 512 and (context is turns._last or room < part.offset + 256)


def fed_alone(context: Any) -> set[int]:
    """The tokens of a context that were fed alone, after a check that the others were read in a whole prompt's chunks.

    A chunk ends only at a multiple of STEP, or before or after a token that was fed alone.
    """
    (keys,) = (part.keys for part in parts_of(context.cache)[:1])
    sizes = [] if keys is None else np.array(keys)[0, 0, : len(context.tokens), 0].astype(int).tolist()
    alone = {place for place, size in enumerate(sizes) if size == 100}
    for place, size in enumerate(sizes):
        begin = place - size % 100
        end = begin + size // 100
        if place not in alone:
            assert begin % STEP == 0 or begin - 1 in alone
            assert end % STEP == 0 or end in alone or end == len(sizes)
    return alone


@settings(max_examples=40, phases=[Phase.generate])
@given(st.integers(0, 2**32), st.sampled_from(sorted(KINDS)), st.sampled_from([0, SIZE + 300, 3 * SIZE, 20 * SIZE]))
def test_any_sequence_of_conversations(endless: Any, seed: int, kind: str, planned: int) -> None:
    """The steps come from a seed, because Hypothesis prefers small numbers, with which little is reused."""
    choose = np.random.default_rng(seed)
    model = FakeModel(kind, planned)
    turns = ReusedPromptCache(model)
    common = int(choose.choice([0, 5, 9]))
    histories = [[7] * common + [20 + number] for number in range(3)]
    fed: list[tuple[int, list[int]]] = []  # of each request: the length of its prompt, and all tokens in the cache
    for _ in range(14):
        number, new, fresh = choose.integers(0, 3), choose.integers(1, 12), choose.random() < 0.2
        back = choose.choice([0, 0, 0, 2, 7, 13, 30])  # tokens that are taken back before new ones are added
        answer, left = choose.integers(1, 7), choose.choice([0, 0, 0, 4, 8])
        history = histories[number]
        prompt = history[: max(1, len(history) - back)] + choose.integers(40, 90, new).tolist()
        if choose.random() < 0.2 and fed:  # the same request again
            length, tokens = fed[-1]
            prompt = (tokens + prompt)[:length]

        def leave(done: int, _total: int, left: int = left) -> None:
            if left and done >= left:
                raise InterruptedError

        options: Any = {"prefill_step_size": STEP, "system_tokens": common, "fresh": fresh}
        responses = turns.stream_generate(endless, prompt, int(answer), prompt_progress_callback=leave, **options)
        made: list[int] = []
        assert turns.tokens == prompt[: turns.reused]
        with closing(responses), suppress(InterruptedError):
            made += [response.token for response in responses]
        check_bytes(turns)
        assert turns.tokens == (prompt + made[:-1] if made else prompt[: len(turns.tokens)])
        for context in (*turns._kept, turns._last):
            check_alone(fed_alone(context), context.tokens, [*fed, (len(prompt), turns.tokens)])
        if fresh and made:
            plain = stream_generate(model, endless, prompt, len(made), prefill_step_size=STEP)
            assert made == [response.token for response in plain]
        histories[number] = prompt + made
        fed.append((len(prompt), list(turns.tokens)))


def check_alone(alone: set[int], tokens: list[int], fed: list[tuple[int, list[int]]]) -> None:
    """Checks that tokens were fed alone in an answer to just these tokens, or as a chunk of one token."""
    for place in alone:
        begins = place % STEP == 0 or place - 1 in alone
        ends = (place + 1) % STEP == 0 or place + 1 in alone or place + 1 == len(tokens)
        so_far = tokens[: place + 1]
        assert (begins and ends) or any(length - 1 <= place and so_far == all_[: place + 1] for length, all_ in fed)
