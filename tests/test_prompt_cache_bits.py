"""The bits of logits over several conversations, with models of every kind of cache, whatever was kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from interrupts import InterruptAt  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]
from mlx_lm.models.cache import KVCache, QuantizedKVCache, RotatingKVCache
from slow_cases import others, slow  # type: ignore[import-not-found]
from test_prompt_caches import SIZE, FakeModel, check_bytes  # type: ignore[import-not-found]

from mlx_flash.loading.load import load
from mlx_flash.text.cached_context import CachedContext
from mlx_flash.text.generation import stream_generate
from mlx_flash.text.prompt_cache import ReusedPromptCache

STEP = 8  # tokens per chunk
MANY = 1 << 30  # bytes
SYSTEM = [int(token) for token in np.random.default_rng(0).integers(1, 96, 19)]
FAMILIES = ("mixtral", "deepseek_v3", "qwen3_next", "nemotron_h", "gpt_oss")

Logits = list[np.ndarray]


@pytest.fixture(
    scope="module", params=others(["exact", *FAMILIES], ["lowrank", "deepseek_v3", "qwen3_next", "gpt_oss"])
)
def model(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder, options = store, {"predictor": request.param}
    if request.param in FAMILIES:
        folder, options = make_mixture(tmp_path_factory.mktemp("mixture") / "model", request.param), {}
        write_tokenizer(folder)
    made, _ = load(folder, memory="4GB", **options)
    yield made
    made.flash.close()


def prompt(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(1, 96, count)]


def ask(
    turns: ReusedPromptCache, endless: Any, ids: list[int], count: int = 3, **options: Any
) -> tuple[list[int], Logits]:
    options = {"prefill_step_size": STEP, "system_tokens": len(SYSTEM), **options}
    responses = list(turns.stream_generate(endless, ids, count, **options))
    check_bytes(turns)
    return [response.token for response in responses], [np.array(response.logprobs) for response in responses]


def alone(model: Any, endless: Any, ids: list[int], count: int = 3) -> Logits:
    responses = stream_generate(model, endless, ids, count, prefill_step_size=STEP)
    return [np.array(response.logprobs) for response in responses]


def same(a: Logits, b: Logits) -> bool:
    return len(a) == len(b) and all(x.tobytes() == y.tobytes() for x, y in zip(a, b, strict=True))


def caches_of(model: Any, planned: int) -> ReusedPromptCache:
    turns = ReusedPromptCache(model)
    turns.planned_bytes = planned
    return turns


def test_prompts_of_several_conversations_give_a_fresh_reading_s_bits(model: Any, endless: Any) -> None:
    """Nothing decoded is in common, so everything that is reused was read in the chunks of a whole prompt."""
    prompts = [
        SYSTEM + prompt(1, 9),
        SYSTEM + prompt(2, 12),
        prompt(3, 21),
        SYSTEM + prompt(1, 9)[:7] + prompt(4, 8),  # parts from the first within its question
        SYSTEM + prompt(2, 12)[:9] + prompt(5, 3),
        SYSTEM + prompt(2, 12)[:9] + prompt(5, 3),  # the same again
        prompt(3, 21)[:18] + prompt(6, 2),
        SYSTEM[:17],
    ]
    expected = [alone(model, endless, ids) for ids in prompts]
    caches = caches_of(model, MANY)
    ask(caches, endless, prompts[0])
    one = sum(part.nbytes for part in (*caches._last.cache,))
    reused: dict[int, list[int]] = {}
    for planned in (0, int(1.3 * one), int(2.5 * one), MANY):
        turns = caches_of(model, planned)
        reused[planned] = []
        for ids, right in zip(prompts, expected, strict=True):
            assert same(ask(turns, endless, ids)[1], right)
            assert turns.reused in (0, len(ids) - 1) or turns.reused % STEP == 0
            reused[planned].append(turns.reused)
    assert reused[MANY][1] == 16 and reused[MANY][3] == 24 and reused[MANY][5] >= 24 and reused[MANY][6] == 16
    assert sum(reused[0]) <= sum(reused[int(1.3 * one)]) <= sum(reused[MANY]) and len(turns._kept) == 6


def test_a_side_task_leaves_the_conversation_as_it_was(model: Any, endless: Any) -> None:
    """As Open WebUI asks for a title between two turns, with another system prompt or with the same history."""
    first = SYSTEM + prompt(1, 9)
    undisturbed = caches_of(model, MANY)
    made, right = ask(undisturbed, endless, first, 6)
    second = [*first, *made, *prompt(7, 5)]
    made_then, right_then = ask(undisturbed, endless, second, 6)
    third = [*second, *made_then, *prompt(8, 15)]
    right_last = ask(undisturbed, endless, third, 6)[1]
    for side_task in (prompt(9, 25), [*first, *prompt(9, 7)], [*first, *made[:3], *prompt(9, 4)]):
        turns = caches_of(model, MANY)
        assert same(ask(turns, endless, first, 6)[1], right)
        assert same(ask(turns, endless, side_task)[1], alone(model, endless, side_task))
        again, logits = ask(turns, endless, second, 6)
        assert turns.reused == len(first) + 5 and again == made_then and same(logits, right_then)
        ask(turns, endless, side_task)
        assert turns.reused == len(side_task) - 1 or turns.reused == len(side_task) // STEP * STEP
        assert same(ask(turns, endless, third, 6)[1], right_last) and turns.reused == len(second) + 5


def test_conversations_in_turn(model: Any, endless: Any) -> None:
    turns, first, second = caches_of(model, MANY), prompt(1, 20), prompt(2, 20)
    for _ in range(3):
        for ids in (first, second):
            before = len(ids)
            made, _ = ask(turns, endless, ids)
            assert turns.reused == (0 if before == 20 else before - 5)
            ids += [*made, *prompt(before, 4)]
    assert len(turns._kept) == 1


def test_a_seed_s_text_does_not_depend_on_what_was_decoded(model: Any, endless: Any) -> None:
    turns = caches_of(model, MANY)
    made, _ = ask(turns, endless, SYSTEM)
    longer = [*SYSTEM, *made, *prompt(1, 9)]
    other, _ = ask(turns, endless, prompt(2, 20))
    assert same(ask(turns, endless, longer, fresh=True)[1], alone(model, endless, longer)) and turns.reused == 16
    ask(turns, endless, [*prompt(2, 20), *other, 3])
    assert turns.reused == 22, "the other conversations stay"


def test_a_client_that_leaves_and_asks_again_continues(model: Any, endless: Any) -> None:
    def leave(done: int, total: int) -> None:
        if done >= 24 and done < total:
            raise InterruptedError

    long = prompt(1, 50)
    for planned in (0, MANY):
        turns = caches_of(model, planned)
        with suppress(InterruptedError):
            ask(turns, endless, long, prompt_progress_callback=leave)
        if planned:
            ask(turns, endless, prompt(2, 30))
        assert same(ask(turns, endless, long)[1], alone(model, endless, long)) and turns.reused == 24


def test_the_last_question_can_be_changed(model: Any, endless: Any) -> None:
    """Where the cache can be trimmed, what was decoded before the last question stays as it was."""
    turns, first = caches_of(model, MANY), SYSTEM + prompt(1, 9)
    made, _ = ask(turns, endless, first)
    second = [*first, *made]
    ask(turns, endless, [*second, *prompt(2, 3)])
    _, changed = ask(turns, endless, [*second, *prompt(3, 3)])
    trims = all(isinstance(part, KVCache) for part in turns._last.cache)
    assert turns.reused == (len(second) - 1 if trims else 24)
    straight = caches_of(model, MANY)
    ask(straight, endless, first)
    if trims:
        assert same(ask(straight, endless, [*second, *prompt(3, 3)])[1], changed)
    else:
        assert same(alone(model, endless, [*second, *prompt(3, 3)]), changed)


# -- with the fake model -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["trims", "recurrent"])
def test_the_least_recently_used_goes_first(kind: str, endless: Any) -> None:
    turns = ReusedPromptCache(FakeModel(kind, 2 * SIZE + 100))
    conversations = [prompt(seed, 20) for seed in range(4)]

    def reused(number: int) -> int:
        made, _ = ask(turns, endless, conversations[number], system_tokens=0)
        conversations[number] += [*made, 9, 9]
        return turns.reused

    assert [reused(number) for number in (0, 1, 2, 0, 3)] == [0, 0, 0, 22, 0]
    assert [len(context.tokens) for context in turns._kept] == [22, 27]
    assert reused(1) == 0, "it was the least recently used one"
    assert reused(0) == 27 and turns.statistics().contexts == 2


def test_a_context_that_is_too_large_costs_no_other(endless: Any) -> None:
    turns = ReusedPromptCache(FakeModel("trims", SIZE))
    made, _ = ask(turns, endless, prompt(1, 20))
    ask(turns, endless, prompt(2, 270))  # takes two steps
    ask(turns, endless, prompt(3, 20))
    ask(turns, endless, [*prompt(1, 20), *made, 5])
    assert turns.reused == 22


def test_quantised_caches_are_copied_and_cut() -> None:
    numbers = mx.random.normal((1, 2, 600, 64))
    cache = QuantizedKVCache(group_size=32, bits=4)
    cache.update_and_fetch(numbers[:, :, :560], numbers[:, :, :560])
    context = CachedContext([cache], STEP)
    context.read(list(range(560)), 240)
    context.read(list(range(560)), 560)
    branch = context.copy(240)
    assert branch.nbytes == branch.cache[0].nbytes == context.nbytes // 3 and branch.stops == [240]
    before = [np.array(array) for array in cache.keys_and_values()[0]]
    expected = QuantizedKVCache(group_size=32, bits=4)
    expected.update_and_fetch(numbers[:, :, :240], numbers[:, :, :240])
    branch.begin(STEP, 300)
    for each in (branch.cache[0], expected):
        each.update_and_fetch(numbers[:, :, 500:560], numbers[:, :, 500:560])
    pairs = zip(branch.cache[0].keys_and_values()[1], expected.keys_and_values()[1], strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs) and branch.cache[0].keys[0].shape[2] == 512
    assert all(np.array_equal(a, b) for a, b in zip(before, cache.keys_and_values()[0], strict=True))
    context.cut(512)
    context.drop_room()
    assert cache.offset == 512 and context.cache[0].keys[0].shape[2] == 512


def test_a_copied_window_is_its_own() -> None:
    cache = RotatingKVCache(4)
    numbers = mx.arange(7.0)[None, None, :, None]
    cache.update_and_fetch(numbers, numbers)
    context = CachedContext([cache], STEP)
    context.read(list(range(7)), 7)
    branch = context.copy(7)
    for _ in range(3):
        cache.update_and_fetch(numbers[:, :, :1], numbers[:, :, :1])
    assert np.array_equal(np.array(branch.cache[0].keys).ravel(), np.arange(7.0)) and branch.cache[0].offset == 7


@pytest.mark.parametrize("step", [23, slow(3)])
@pytest.mark.parametrize("kind", ["trims", "recurrent"])
def test_an_interrupt_at_any_line_loses_one_context_at_most(kind: str, step: int, endless: Any) -> None:
    model = FakeModel(kind, 2 * SIZE + 200)
    first, second = SYSTEM + prompt(1, 5), prompt(2, 12)
    branch = [*first[:20], *prompt(4, 3)]

    def scenario(turns: ReusedPromptCache) -> None:
        for ids in (first, second, branch, first):
            with closing(turns.stream_generate(endless, ids, 2, prefill_step_size=STEP)) as responses:
                list(responses)

    def watched(path: str) -> bool:
        return path.endswith(("prompt_cache.py", "cached_context.py"))

    expected = [alone(model, endless, ids) for ids in (first, second, branch)]
    with InterruptAt(0, watched) as whole:
        scenario(ReusedPromptCache(model))
    for line in range(1, whole.count + 1, step):
        turns = ReusedPromptCache(model)
        with InterruptAt(line, watched), suppress(KeyboardInterrupt):
            scenario(turns)
        for ids, right in zip((first, second, branch), expected, strict=True):
            assert same(ask(turns, endless, ids)[1], right), line
