"""Ctrl-C at any line of a drafted answer: later answers are right, whatever the interrupt left in the caches."""

from __future__ import annotations

from contextlib import closing, nullcontext, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from drafting import Telling  # type: ignore[import-not-found]  # found beside this file
from interrupts import InterruptAt  # type: ignore[import-not-found]
from mlx_lm.models.cache import ArraysCache, KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper
from slow_cases import slow  # type: ignore[import-not-found]

from mlx_flash.flash.stats import Counters
from mlx_flash.flash.trials import Trials
from mlx_flash.text.drafts import MODEL, NGRAM, Drafting, DraftModel
from mlx_flash.text.generation import stream_generate
from mlx_flash.text.prompt_cache import ReusedPromptCache
from mlx_flash.text.tokenizer import load_tokenizer

VOCABULARY = 96
PROMPTS = ([5, 17, 80, 3, 44, 61, 9, 30], [5, 17, 80, 3, 7], [72, 1, 55, 2, 21, 40])
TOKENS = 9


class Checksum:
    """A model whose next token is a checksum of all tokens in its cache, however they were fed."""

    def __init__(self, recurrent: bool) -> None:
        self.recurrent = recurrent
        self.flash = SimpleNamespace(
            plan=SimpleNamespace(context=100, demand=SimpleNamespace(prompt_caches=0)),
            vocabulary=VOCABULARY,
            lock=nullcontext(),  # A tracer may interrupt between a body and the release of its lock; signals do not.
            streamer=SimpleNamespace(counters=Counters()),
            evaluate_guarded=lambda: None,
            trials=Trials(),
            answered=lambda *_: None,
            verify_unchanged=lambda: None,
            drafting=None,
            shared_reading=None,
            prefill_tokens=512,
            one_conversation=False,
            most_positions=8,
        )

    def make_cache(self) -> list[Any]:
        return [KVCache(), ArraysCache(1)] if self.recurrent else [KVCache()]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        given = tokens.astype(mx.float32)[:, None, :, None]
        kept, _ = cache[0].update_and_fetch(given, given)
        text = [int(token) for token in np.array(kept).ravel()]
        states = [0 if not self.recurrent or cache[1][0] is None else int(cache[1][0].item())]
        chosen = []
        for place in range(len(text) - tokens.shape[1], len(text)):
            states.append((states[-1] * 31 + text[place]) % 8191)
            weighed = sum((at + 1) * token for at, token in enumerate(text[: place + 1]))
            chosen.append((weighed + 7 * states[-1] * self.recurrent) % (VOCABULARY - 1))
        if self.recurrent:
            cache[1][0] = mx.array([[states[-1]]])
        return (mx.arange(VOCABULARY) == mx.array(chosen)[:, None]).astype(mx.float32)[None]


@pytest.fixture(scope="module")
def endless(store: Path) -> Any:
    wrapper = TokenizerWrapper(load_tokenizer(store)._tokenizer)
    wrapper.eos_token_ids = [-1]
    return wrapper


@pytest.mark.parametrize("step", [29, slow(5)])
@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("drafts", [NGRAM, MODEL])
def test_an_interrupt_at_any_line_spoils_no_later_answer(endless: Any, recurrent: bool, drafts: str, step: int) -> None:
    model = Checksum(recurrent)

    def alone(ids: list[int]) -> list[int]:
        return [response.token for response in stream_generate(model, endless, ids, TOKENS)]

    expected = [alone(ids) for ids in PROMPTS]
    text = [*PROMPTS[0], *expected[0]]

    def drafting() -> Drafting:
        if drafts == NGRAM:
            return Telling(NGRAM, 8, text=text, wrong=4)
        return Drafting(MODEL, 8, DraftModel(Checksum(recurrent)))

    def scenario(turns: ReusedPromptCache, stop: int | None) -> None:
        with closing(turns.stream_generate(endless, PROMPTS[0], TOKENS, num_draft_tokens=3)) as responses:
            for count, _ in enumerate(responses, 1):
                if count == stop:
                    break

    def watched(path: str) -> bool:
        return path.endswith(("token_loop.py", "rewinding.py", "prompt_cache.py", "text/drafts.py", "generation.py"))

    for stop in (3, None):
        model.flash.drafting = drafting()
        with InterruptAt(0, watched) as whole:
            scenario(ReusedPromptCache(model), stop)
        assert whole.count > 100
        for line in range(1, whole.count + 1, step):
            turns, model.flash.drafting = ReusedPromptCache(model), drafting()
            with InterruptAt(line, watched), suppress(KeyboardInterrupt):
                scenario(turns, stop)
            for ids, right in zip(PROMPTS, expected, strict=True):
                found = [r.token for r in turns.stream_generate(endless, ids, TOKENS, num_draft_tokens=3)]
                assert found == right, line
                assert turns.tokens == [*ids, *right[:-1]]
