"""Several answers at once: against a server of one answer at a time, and what ends, leaves and is kept."""

from __future__ import annotations

import functools
import itertools
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.sample_utils import greedy_sampler
from scripted import make_scripted  # type: ignore[import-not-found]  # found beside this file
from serving import Server, serving, until  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.errors import BudgetError, GrammarError, ReadError, UsageError
from mlx_flash.flash.swap import SwapCounters
from mlx_flash.loading.runtime import Runtime
from mlx_flash.server import parallel_answers, running_answer
from mlx_flash.server.parallel_answers import ParallelAnswers
from mlx_flash.text import token_loop
from mlx_flash.text.batch_generation import DecodeBatch
from mlx_flash.text.prompt_cache import ReusedPromptCache
from mlx_flash.text.token_loop import Chooser

ROWS, CHUNK = 3, 16
PROMPTS = ["Hello", "A longer prompt, of more than two chunks of tokens.", "Hm"]
FAILING = 77  # the seed of a request whose processor raises an error


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scripted(tmp_path_factory.mktemp("parallel"))


def load(folder: Path, parallel: int = ROWS) -> tuple[Any, Any]:
    return mlx_flash.load(folder, parallel=parallel, context=512, prompt_cache="64MB", prefill_chunk=CHUNK)


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(functools.partial(load, folder)) as running:
        yield running


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[Server]:
    with serving(functools.partial(load, folder, 1)) as running:
        yield running


class Steps:
    """Lets no answer step before `rows` have begun. read: answers that take a step while a prompt is read."""

    def __init__(self) -> None:
        self.rows, self.read = 0, 0


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    held, real = Steps(), ParallelAnswers.step

    def step(answers: ParallelAnswers) -> None:
        if len(answers.rows) >= held.rows:
            held.rows = 0
            held.read += len(answers.rows) * answers._loaded.turns._reading
            real(answers)
        else:
            time.sleep(0.002)

    monkeypatch.setattr(ParallelAnswers, "step", step)
    yield held
    held.rows = 0


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as threads:
        yield threads


def ask(server: Server, prompt: str, **options: Any) -> httpx.Response:
    return server.post("/v1/completions", {"prompt": prompt, "max_tokens": 12, "temperature": 0, **options})


def choice(answer: httpx.Response) -> dict[str, Any]:
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]  # type: ignore[no-any-return]


# -- answers ------------------------------------------------------------------------------------------------------


def test_answers_are_those_of_one_at_a_time(
    server: Server, alone: Server, steps: Steps, pool: ThreadPoolExecutor
) -> None:
    said = choice(ask(alone, PROMPTS[1]))["text"]
    options: list[dict[str, Any]] = [
        {"temperature": 1, "seed": 7, "logprobs": 2},
        {"stop": [said[4:6]]},
        {"max_tokens": 30, "frequency_penalty": 1.5, "echo": True},
    ]
    steps.rows = ROWS
    asked = [pool.submit(ask, server, prompt, **each) for prompt, each in zip(PROMPTS, options, strict=True)]
    until(lambda: server.get("/stats").json()["queue"]["running"] == ROWS or any(each.done() for each in asked))
    for prompt, each, future in zip(PROMPTS, options, asked, strict=True):
        found, expected = choice(future.result()), choice(ask(alone, prompt, **each))
        assert found["text"] == expected["text"] and found["finish_reason"] == expected["finish_reason"]
        if expected["logprobs"]:
            mine, other = (entry["logprobs"]["token_logprobs"] for entry in (found, expected))
            assert np.allclose(mine, other, atol=1e-3)
    assert said[4:6] not in choice(asked[1].result())["text"]
    stats = server.get("/stats").json()
    assert stats["queue"]["parallel"] == ROWS and stats["now"] is None and stats["last"]["generated_tokens"] > 0
    assert "mlx_flash_requests_parallel 3.0" in server.get("/metrics").text
    assert alone.engine._answers is None and alone.engine.parallel == 1


def test_a_prompt_is_read_while_others_speak(
    server: Server, alone: Server, steps: Steps, pool: ThreadPoolExecutor
) -> None:
    steps.rows = 2
    first = pool.submit(ask, server, PROMPTS[0], max_tokens=40)
    until(lambda: server.engine.running)
    second = pool.submit(ask, server, PROMPTS[2], max_tokens=40)
    until(lambda: len(server.engine.running) == 2 or first.done())
    long = PROMPTS[1] * 4
    third = ask(server, long)
    assert steps.read > 2  # while several chunks were read
    for prompt, answer, count in (
        (PROMPTS[0], first.result(), 40),
        (PROMPTS[2], second.result(), 40),
        (long, third, 12),
    ):
        assert choice(answer)["text"] == choice(ask(alone, prompt, max_tokens=count))["text"]


def test_more_requests_than_rows_wait(server: Server, alone: Server, pool: ThreadPoolExecutor) -> None:
    many = [f"{prompt}{number}" for number in range(3) for prompt in PROMPTS]
    asked = [pool.submit(ask, server, prompt, n=2) for prompt in many]
    for prompt, future in zip(many, asked, strict=True):
        texts = [each["text"] for each in future.result().json()["choices"]]
        assert texts == [choice(ask(alone, prompt))["text"]] * 2
    assert server.engine.running == [] and server.engine.waiting == 0


# -- ends ---------------------------------------------------------------------------------------------------------


def two(server: Server, steps: Steps, pool: ThreadPoolExecutor, **options: Any) -> list[Future[httpx.Response]]:
    """Two requests that have begun together, of which the second one has the options."""
    steps.rows = 2
    return [pool.submit(ask, server, PROMPTS[0]), pool.submit(ask, server, PROMPTS[1], **options)]


def test_swapping_meanwhile_is_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, told = itertools.count(), list[SwapCounters]()
    monkeypatch.setattr(token_loop, "swap_counters", lambda: SwapCounters(swapped_out=next(counts)))
    monkeypatch.setattr(parallel_answers, "swap_counters", lambda: SwapCounters(swapped_out=50))
    monkeypatch.setattr(Runtime, "answered", lambda _, swap=None: told.append(swap))
    choice(ask(server, "Hello"))
    assert told == [SwapCounters(swapped_out=50)]


def test_a_client_that_leaves(server: Server, alone: Server, steps: Steps, pool: ThreadPoolExecutor) -> None:
    steps.rows = 2
    body = {"prompt": PROMPTS[2], "max_tokens": 400, "temperature": 0, "stream": True, "logit_bias": {"257": -100}}
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        stays = pool.submit(ask, server, PROMPTS[1], max_tokens=200)
        next(line for line in answer.iter_lines() if line.startswith("data:"))
    assert choice(stays.result())["text"] == choice(ask(alone, PROMPTS[1], max_tokens=200))["text"]
    server.idle()


def test_an_error_of_one_answer(
    server: Server, alone: Server, steps: Steps, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = running_answer.make_processors

    def make_processors(sampling: Any, cached: Any) -> list[Any]:
        calls = []

        def fails(tokens: mx.array, logits: mx.array) -> mx.array:
            calls.append(tokens.size)
            if sampling.seed == FAILING and len(calls) == 3:
                raise GrammarError("too complex")
            return logits

        return [*real(sampling, cached), fails]

    monkeypatch.setattr(running_answer, "make_processors", make_processors)
    stays, fails = two(server, steps, pool, seed=FAILING)
    assert fails.result().status_code == 400 and "too complex" in fails.result().text
    assert choice(stays.result())["text"] == choice(ask(alone, PROMPTS[0]))["text"]


def test_a_read_error_ends_all(
    server: Server, steps: Steps, pool: ThreadPoolExecutor, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = DecodeBatch.step, threading.Event()

    def step(batch: DecodeBatch) -> Any:
        if len(batch) == 2 and not failed.is_set():
            failed.set()
            raise ReadError("the disk is gone")
        return real(batch)

    monkeypatch.setattr(DecodeBatch, "step", step)
    for answer in two(server, steps, pool):
        assert answer.result().status_code == 500 and "the disk is gone" in answer.result().text
    steps.rows = 0
    assert choice(ask(server, PROMPTS[0]))["text"]


def test_a_stop_ends_all(folder: Path, steps: Steps, pool: ThreadPoolExecutor) -> None:
    steps.rows = ROWS + 1
    with serving(functools.partial(load, folder)) as server:
        asked = [pool.submit(ask, server, prompt) for prompt in [*PROMPTS, "one that waits"]]
        until(lambda: len(server.engine.running) == ROWS and server.engine.waiting == 1)
        server.engine.stop()
        assert [each.result().status_code for each in asked] == [503] * 4


# -- what is kept -------------------------------------------------------------------------------------------------


def test_a_conversation_gives_the_bits_of_a_prompt_that_is_read_from_its_beginning(folder: Path) -> None:
    model, _ = load(folder)
    turns, batch, made = ReusedPromptCache(model), DecodeBatch(model), list[int]()
    prompts = [list(range(40, 77)), list(range(100, 120))]
    lent = []
    for prompt in prompts:
        context, _ = turns.read(prompt)
        lent.append(context)
        cache, context.cache = context.cache, []
        batch.join(cache, prompt[-1], Chooser(prompt, greedy_sampler, []))
    for _ in range(20):
        made.append(batch.step()[0].token)  # type: ignore[union-attr]
    turns.give_back(lent[0], batch.leave(0), [*prompts[0], *made[:-1]])
    assert turns.tokens == prompts[0][:-1]
    follow = [*prompts[0], *made, 9, 9, 9]
    found, _ = turns.read(follow)
    assert turns.reused == 2 * CHUNK
    expected, _ = ReusedPromptCache(model).read(follow)
    for mine, other in zip(found.cache, expected.cache, strict=True):
        assert all(mx.array_equal(a, b) for a, b in zip(mine.state[:2], other.state[:2], strict=True))
    turns.give_back(lent[1], None, [])
    turns.give_back(found, found.cache, follow[:-1])
    assert turns.tokens == follow[:-1] and turns._lent == ()
    model.flash.close()


# -- the plan -----------------------------------------------------------------------------------------------------


def test_the_plan_has_a_cache_for_each_answer(folder: Path) -> None:
    one, three = (mlx_flash.plan(folder, parallel=count, context=512) for count in (1, 3))
    assert three.demand.kv_cache == 3 * one.demand.kv_cache == 3 * three.demand.context_bytes
    assert "512 tokens for each of 3 answers" in three.describe()
    with pytest.raises(BudgetError) as raised:
        mlx_flash.plan(folder, parallel=3, context=512, memory="10MB")
    assert f"at least {raised.value.smallest_bytes // 10**6}MB" in str(raised.value)
    assert "or lower --parallel, which is 3" in str(raised.value)


@pytest.mark.parametrize(
    "options", [{"parallel": 0}, {"parallel": 9}, {"parallel": 2, "kv_bits": 8}, {"parallel": 2, "draft": "ngram"}]
)
def test_what_does_not_go_together_is_refused(folder: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="parallel is"):
        mlx_flash.plan(folder, **options)


def test_a_cache_without_batches_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_flash.text.batch_generation.can_batch", lambda cache: False)
    assert json.dumps(mlx_flash.plan(folder, context=64).as_dict())
    with pytest.raises(UsageError, match="one request at a time"):
        mlx_flash.plan(folder, parallel=2)
