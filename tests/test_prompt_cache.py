"""The prompt cache over turns: the tokens that it keeps, and the same text as from the whole prompt at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mixtures import make_mixture  # type: ignore[import-not-found]
from mlx_lm.models.cache import KVCache, RotatingKVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from mlx_flash.errors import UsageError
from mlx_flash.loading.load import load
from mlx_flash.text.cached_context import make_room
from mlx_flash.text.encoding import common_prefix
from mlx_flash.text.generation import stream_generate
from mlx_flash.text.prompt_cache import ReusedPromptCache
from mlx_flash.text.token_loop import cached_tokens

PROMPT = [5, 17, 80, 3, 44, 61, 9, 9, 30, 72, 1, 55, 8, 90, 31]


@pytest.fixture
def model(store: Any, open_model: Callable[..., Any]) -> Any:
    return open_model(store, slots=20, predictor="exact")


@pytest.fixture
def endless(tokenizer: Any) -> Any:
    wrapper = TokenizerWrapper(tokenizer._tokenizer, type(tokenizer.detokenizer))
    wrapper._eos_token_ids = {-1}
    return wrapper


def whole(turns: ReusedPromptCache) -> bool:
    return turns._last.whole and cached_tokens(turns._last.cache) == len(turns.tokens)


def run(turns: ReusedPromptCache, endless: Any, prompt: list[int], count: int = 6, **options: Any) -> list[int]:
    made = [r.token for r in turns.stream_generate(endless, prompt, count, **options)]
    assert turns.tokens == prompt + made[:-1] and whole(turns)
    return made


def test_a_prompt_that_goes_on_is_read_from_there(model: Any, endless: Any) -> None:
    turns = ReusedPromptCache(model)
    first = run(turns, endless, PROMPT)
    assert first == [r.token for r in stream_generate(model, endless, PROMPT, 6)] and turns.reused == 0
    longer = [*PROMPT, *first, 12, 40, 33]
    second = list(turns.stream_generate(endless, longer, 6))
    assert turns.reused == len(PROMPT) + 5 and {r.prompt_tokens for r in second} == {4}
    assert [r.token for r in second] == [r.token for r in stream_generate(model, endless, longer, 6)]


def test_a_prompt_that_parts_is_trimmed_to_a_chunk(model: Any, endless: Any) -> None:
    turns = ReusedPromptCache(model)
    run(turns, endless, PROMPT, prefill_step_size=4)
    for prompt, reused in (
        ([*PROMPT[:10], 4, 4, 4], 8),
        ([*PROMPT[:10], 4, 4, 4], 12),  # the same prompt again: its last token goes through the model
        (PROMPT[:6], 4),
        ([7, *PROMPT], 0),
    ):
        fresh = [r.token for r in stream_generate(model, endless, prompt, 6, prefill_step_size=4)]
        assert run(turns, endless, prompt, prefill_step_size=4) == fresh
        assert turns.reused == reused


def test_a_cache_that_cannot_be_trimmed_serves_what_goes_on_only(
    model: Any, endless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KVCache, "is_trimmable", lambda _: False)
    turns = ReusedPromptCache(model)
    first = run(turns, endless, PROMPT)
    run(turns, endless, [*PROMPT, *first, 2])
    assert turns.reused == len(PROMPT) + 5
    expected = [r.token for r in stream_generate(model, endless, PROMPT, 6)]
    assert run(turns, endless, PROMPT) == expected and turns.reused == 0


def test_a_window_that_has_moved_on_begins_anew(endless: Any, tmp_path: Any) -> None:
    """gpt-oss's sliding layers forget everything outside of their window."""
    from conftest import write_tokenizer  # type: ignore[import-not-found]

    folder = make_mixture(tmp_path / "mixture", "gpt_oss", "plain", 1)
    write_tokenizer(folder)
    model, tokenizer = load(folder, memory="4GB")
    tokenizer._eos_token_ids = {-1}
    turns = ReusedPromptCache(model)
    window = min(c.max_size for c in turns._last.cache if isinstance(c, RotatingKVCache))
    prompt = (PROMPT * window)[: window + 3]
    run(turns, tokenizer, prompt)
    other = [*prompt[:-1], 2]
    expected = [r.token for r in stream_generate(model, tokenizer, other, 6)]
    assert run(turns, tokenizer, other) == expected and turns.reused == 0
    model.flash.close()


def test_what_was_read_by_an_interruption_is_kept(model: Any, endless: Any) -> None:
    class Stop(Exception):
        pass

    def stop(done: int, _total: int) -> None:
        if done >= 8:
            raise Stop

    turns = ReusedPromptCache(model)
    with pytest.raises(Stop):
        list(turns.stream_generate(endless, PROMPT, 6, prefill_step_size=4, prompt_progress_callback=stop))
    assert turns.tokens == PROMPT[:8] and whole(turns)
    expected = [r.token for r in stream_generate(model, endless, PROMPT, 6)]
    responses: Any = turns.stream_generate(endless, PROMPT, 6, prefill_step_size=4)
    made = [next(responses).token for _ in range(3)]
    responses.close()
    assert turns.reused == 8 and turns.tokens == PROMPT + made[:2] and whole(turns)
    unused: Any = turns.stream_generate(endless, PROMPT, 6, prefill_step_size=4)
    unused.close()  # closed before it began
    assert whole(turns) and run(turns, endless, PROMPT) == expected


def test_after_an_error_amid_the_model_the_cache_is_empty(
    model: Any, endless: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = ReusedPromptCache(model)
    expected = run(turns, endless, PROMPT)
    with monkeypatch.context() as patch:
        patch.setattr(model.flash.streamer, "verify_unchanged", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            list(turns.stream_generate(endless, [*PROMPT, 3, 3], 6))
    assert turns.tokens == [] and whole(turns)
    assert run(turns, endless, PROMPT) == expected


def test_what_cannot_be_used_is_refused_before_anything_is_read(model: Any, endless: Any) -> None:
    turns = ReusedPromptCache(model)
    expected = run(turns, endless, PROMPT)
    for prompt, message in (
        ([], "the prompt is empty"),
        ([*PROMPT, 96], "token ids from 1 to 96"),
        (PROMPT * 5, "the prompt has 75 tokens, and the plan makes room for 64"),
    ):
        with pytest.raises(UsageError, match=message):
            turns.stream_generate(endless, prompt)
        assert whole(turns)
    assert run(turns, endless, PROMPT) == expected


@pytest.mark.parametrize("kept", [1, 200, 255, 256, 300, 512])
@pytest.mark.parametrize("more", [1, 56, 57, 300, 600])
def test_a_cache_grows_in_whole_steps(kept: int, more: int) -> None:
    def feed(cache: KVCache, keys: np.ndarray) -> np.ndarray:
        return np.array(cache.update_and_fetch(mx.array(keys), mx.array(keys + 1))[0])

    numbers = np.random.default_rng(0).standard_normal((1, 2, 1200, 8), np.float32)
    cache = KVCache()
    feed(cache, numbers[:, :, : kept + 30])
    cache.trim(30)
    make_room([cache], kept + more)
    assert np.array_equal(feed(cache, numbers[:, :, kept : kept + more]), numbers[:, :, : kept + more])
    assert cache.keys is not None and cache.values is not None
    assert cache.keys.shape[2] == cache.values.shape[2] == -(-max(kept + 30, kept + more) // 256) * 256


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix(a: list[int], b: list[int]) -> None:
    n = common_prefix(a, b)
    assert a[:n] == b[:n] and (n in (len(a), len(b)) or a[n] != b[n])
