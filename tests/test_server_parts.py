"""Stop words, settings, prompts and residency without HTTP."""

from __future__ import annotations

import asyncio
import base64
import json
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from hypothesis import given
from hypothesis import strategies as st
from mixtures import make_mixture  # type: ignore[import-not-found]

from mlx_flash.flash.slot_cache import EventLog, SlotCache
from mlx_flash.loading.load import load
from mlx_flash.loading.options import LoadOptions
from mlx_flash.server import jobs
from mlx_flash.server.answering import Waiting
from mlx_flash.server.api_errors import ApiError
from mlx_flash.server.apis.answer_form import event
from mlx_flash.server.apis.openai_chat import ChatRequest
from mlx_flash.server.apis.openai_common import parse
from mlx_flash.server.apis.openai_completions import CompletionRequest
from mlx_flash.server.apis.question import Dialogue
from mlx_flash.server.cache_watch import MOST_BINS, CacheWatch, binned
from mlx_flash.server.engine import Engine
from mlx_flash.server.jobs import End, Job
from mlx_flash.server.loaded_model import LoadedModel
from mlx_flash.server.model_plans import ModelPlans
from mlx_flash.server.places import QueuePlace
from mlx_flash.server.prompts import encode_dialogue
from mlx_flash.source.installed import InstalledModel
from mlx_flash.text.generation import stream_generate
from mlx_flash.text.images import MOST_WAITING
from mlx_flash.text.sampling import PENALTY_TOKENS, Sampling, make_processors
from mlx_flash.text.stops import StopWords
from mlx_flash.text.tokenizer import load_tokenizer

TEXTS = st.text("ab ", max_size=30)
WORDS = st.lists(st.text("ab ", min_size=1, max_size=4), max_size=4)


def encode_chat(engine: Engine, request: ChatRequest) -> list[int]:
    """The token ids of a request's prompt."""
    dialogue = request.question(Sampling()).of
    assert isinstance(dialogue, Dialogue)
    return encode_dialogue(engine, dialogue)[0]


# -- stop words ----------------------------------------------------------------------------------------------


@given(TEXTS, WORDS, st.lists(st.integers(1, 5), min_size=30, max_size=30))
def test_stop_words_wherever_pieces_end(text: str, words: list[str], lengths: list[int]) -> None:
    stop = StopWords(words)
    shown, at = "", 0
    for length in lengths:
        shown += stop.feed(text[at : at + length])
        at += length
        assert text.startswith(shown) and not any(word in shown for word in words)
    shown += stop.finish()
    ends = [(text.find(word) + len(word), text.find(word)) for word in words if word in text]
    assert (stop.found is not None) == bool(ends)
    assert shown == (text[: min(ends)[1]] if ends else text)


def test_no_more_is_held_back_than_may_begin_a_word() -> None:
    stop = StopWords(["END", "\n\nUser"])
    assert stop.feed("The E") == "The " and stop.feed("N") == "" and stop.feed("T\n") == "ENT"
    assert stop.feed("\n") == "" and stop.feed("U") == "" and stop.feed("x") == "\n\nUx" and not stop.found


# -- settings ------------------------------------------------------------------------------------------------


def test_penalties_see_what_was_cached() -> None:
    logits = mx.zeros((1, 8))
    sampling = Sampling(presence_penalty=1.0)
    (processor,) = make_processors(sampling, lambda: [1, 2])
    assert processor(mx.array([3]), mx.array(logits)).tolist() == [[0, -1, -1, -1, 0, 0, 0, 0]]
    (processor,) = make_processors(sampling, lambda: [4] + [1] * PENALTY_TOKENS)
    assert processor(mx.array([3]), mx.array(logits)).tolist() == [[0, -1, 0, -1, 0, 0, 0, 0]]
    assert make_processors(Sampling(), lambda: [1, 2]) == []


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ([], None),
        (None, None),
        ({}, "messages"),
        ({"messages": "x"}, "messages"),
        ({"messages": [{"role": "user"}], "max_tokens": "5"}, "max_tokens"),
        ({"messages": [{"role": "user"}], "max_tokens": True}, "max_tokens"),
        ({"messages": [{"role": "nobody", "content": ""}]}, "messages"),
        ({"messages": [{"role": "user"}], "temperature": float("nan")}, "temperature"),
        ({"messages": [{"role": "user"}], "stream": "yes"}, "stream"),
        ({"messages": [{"role": "user"}], "stream_options": []}, "stream_options"),
    ],
)
def test_wrong_types_name_their_parameter(body: Any, param: str | None) -> None:
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, json.dumps(body).encode())
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, param, "invalid_value")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"messages=hello", b"\xff\xfe", b'{"model": "\\ud800"}', b"[" * 100000, b'{"a": 1} {}']
)
def test_no_json(body: bytes) -> None:
    with pytest.raises(ApiError, match="the body is not valid JSON") as caught:
        parse(ChatRequest, body)
    assert caught.value.status == 400 and caught.value.code == "invalid_json"


def test_prompts() -> None:
    for prompt, one in (("a", "a"), (["a"], "a"), ([1, 2], [1, 2]), ([[1, 2]], [1, 2]), ([], [])):
        assert parse(CompletionRequest, json.dumps({"prompt": prompt}).encode()).prompts() == [one]
    for several in (["a", "b"], [[1], [2]]):
        assert parse(CompletionRequest, json.dumps({"prompt": several}).encode()).prompts() == several
    for wrong in ([["a"]], [1, "a"], ["a", 1], ["a"] * 65):
        with pytest.raises(ApiError, match="prompt"):
            parse(CompletionRequest, json.dumps({"prompt": wrong}).encode()).prompts()


def test_an_event_is_one_line_whatever_its_text() -> None:
    text = "".join(map(chr, range(0x2030)))
    line, empty = event({"text": text}).splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text} and not empty


# -- residency -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", [1, 7, MOST_BINS, 100, 427])
def test_bins(units: int) -> None:
    bins = min(units, MOST_BINS)
    assert binned(np.ones(units, np.bool_)).tolist() == [255] * bins
    assert binned(np.zeros(units, np.bool_)).tolist() == [0] * bins
    for unit in range(units):
        mask = np.zeros(units, np.bool_)
        mask[unit] = True
        place = unit * bins // units
        members = sum(other * bins // units == place for other in range(units))
        assert binned(mask).tolist() == [-(-255 // members) if i == place else 0 for i in range(bins)]


def test_what_a_token_did(store: Path, open_model: Callable[..., Any], tokenizer: Any) -> None:
    """Compares with the engine's counters and with the changes of its slots."""
    model = open_model(store, slots=30, predictor="shadow")
    live = CacheWatch(model)
    counters = model.flash.streamer.counters
    responses = stream_generate(model, tokenizer, "so it goes", 6)
    next(responses)
    assert all(cache.event_log is None for cache in live.caches)  # no client watches
    live.watch(True)
    for _ in range(4):
        before = [cache.slot_of >= 0 for cache in live.caches]
        counted = counters.copy()
        next(responses)
        token = counters - counted
        masks = [live._masks(cache) for cache in live.caches]
        assert sum(int(hit.sum()) for _, hit, _ in masks) == token.hits
        assert sum(int(read.sum()) for _, _, read in masks) == token.misses + token.prefetched_unused
        for (resident, hit, read), had in zip(masks, before, strict=True):
            assert not (hit & ~had).any() and (resident <= (had | read)).all()
    next(responses)
    layers = live.layers()
    assert len(layers) == model.flash.plan.units.layers
    for kinds, cache in zip(layers, live.caches, strict=True):
        resident, hit, read = (np.frombuffer(base64.b64decode(kind), np.uint8) for kind in kinds)
        assert resident.tolist() == binned(cache.slot_of >= 0).tolist() and hit.any() and len(read) == MOST_BINS
    assert live.resident == [cache.resident for cache in live.caches] and live.slots == [30] * len(layers)
    live.watch(False)
    assert all(cache.event_log is None for cache in live.caches)


def test_recording_changes_nothing() -> None:
    rng = np.random.default_rng(1)
    plain, watched = SlotCache(50, 20), SlotCache(50, 20)
    watched.event_log = EventLog()
    for _ in range(100):
        units = np.sort(rng.choice(50, 12, replace=False))
        for cache in (plain, watched):
            cache.mark_used(units)
            cache.commit(*cache.reserve(units))
    assert (plain.slot_of == watched.slot_of).all() and len(watched.event_log.used) == 100


# -- prompts -------------------------------------------------------------------------------------------------


TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_a_chat_template_is_followed(store: Path, open_model: Callable[..., Any]) -> None:
    engine = Engine("some", "")
    engine.switch.loaded = LoadedModel(open_model(store), load_tokenizer(store))
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": None},
    ]
    request = parse(ChatRequest, json.dumps({"messages": messages}).encode())
    plain = engine.tokenizer.encode("be brief\n\nonetwo\n\n")
    assert encode_chat(engine, request) == plain
    engine.tokenizer._tokenizer.chat_template = TEMPLATE
    text = "<system>be brief<user>onetwo<assistant><assistant>"
    assert encode_chat(engine, request) == engine.tokenizer.encode(text, add_special_tokens=False)
    refused = parse(ChatRequest, b'{"messages": [{"role": "tool", "content": "x"}]}')
    with pytest.raises(ApiError, match="chat template refuses: no tools") as caught:
        encode_chat(engine, refused)
    assert caught.value.status == 400 and caught.value.param == "messages"


def test_experts_are_watched_as_neurons_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_flash.loading.fill_slots.fill", lambda *_: None)  # the slots are empty after the load
    folder = make_mixture(tmp_path, "qwen3_moe")
    write_tokenizer(folder)
    model, tokenizer = load(folder, memory="2GB")
    try:
        live = CacheWatch(model)
        live.watch(True)
        responses = stream_generate(model, tokenizer, [5, 17], 3)
        next(responses)
        masks = [live._masks(cache) for cache in live.caches]
        counters = model.flash.streamer.counters
        assert counters.misses == sum(int(read.sum()) for _, _, read in masks) > 0
        assert all((resident == read).all() and not (hit & read).any() for resident, hit, read in masks)
        assert [len(base64.b64decode(kinds[0])) for kinds in live.layers()] == [12] * len(live.caches)
    finally:
        model.flash.close()


@pytest.mark.parametrize("turns", range(5))
def test_a_client_that_leaves_as_an_item_comes(turns: int) -> None:
    """A cancellation at any time after the item ends the wait. Otherwise the engine would not be told."""

    async def leave() -> None:
        waiting = Waiting(lambda _: None, ids=[], max_tokens=1, sampling=jobs.Sampling())
        task = asyncio.ensure_future(waiting.next())
        await asyncio.sleep(0.01)
        waiting._items.put_nowait(End("length", 1, 0, 1))
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.cancel():
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(leave())


def test_few_prompts_with_images_wait_at_a_time() -> None:
    """Each holds an image's numbers, some 25 MB, and the queue has 64 places."""

    def job(seen: object = None, begun: bool = False) -> Job:
        return Job([1], 1, Sampling(), lambda _: None, seen=seen, begun=begun)

    engine = Engine("some", "")
    engine.places.set_model(engine.switch.current, loaded=True)

    def submit(job: Job) -> QueuePlace:
        place = QueuePlace(None)
        engine.places.take(place)
        engine.places.fill(place, job)
        return place

    waiting = [submit(job(seen="pixels")) for _ in range(MOST_WAITING)]
    with pytest.raises(ApiError, match=f"{MOST_WAITING} requests with images are waiting") as caught:
        submit(job(seen="pixels"))
    assert caught.value.status == 429
    submit(job())
    submit(job(seen="pixels", begun=True))
    for each in waiting:
        engine.places.leave(each)
    submit(job(seen="pixels"))


# -- planning other models -----------------------------------------------------------------------------------------


def test_what_a_model_s_class_prints_is_not_taken_for_its_plan() -> None:
    program = (
        "import os, mlx_flash.server.plan_worker as worker\n"
        "worker.planned = lambda model, _: print('[WARNING]') or os.write(1, b'{}') and {'reason': model}\n"
        "worker.main()"
    )
    asked = json.dumps({"options": {}, "models": ["a", "b"]})
    with subprocess.Popen(
        [sys.executable, "-c", program],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as worker:
        assert worker.stdin is not None and worker.stdout is not None
        worker.stdin.write(f"{asked}\n")
        worker.stdin.flush()
        assert [json.loads(worker.stdout.readline()) for _ in range(2)] == [{"reason": "a"}, {"reason": "b"}]
        worker.kill()


def test_requests_for_a_model_wait_for_one_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path))
    made: list[str] = []
    plan = {"smallest": 1, "everything": 2, "images": False, "reason": ""}

    class Plans(ModelPlans):
        def make(self, models: Any) -> None:
            made.extend(model.name for model in models)
            for model in models:
                asked.wait(60)
                self._keep(model, plan)

    plans, asked = Plans(LoadOptions), threading.Event()
    model = InstalledModel("a", "hub", "a", tmp_path, 1, "stamp")
    with ThreadPoolExecutor(8) as threads:
        answers = [threads.submit(plans.plan_of, model, 1.0) for _ in range(8)]
        while not made:
            pass
        asked.set()
        assert [answer.result() for answer in answers] == [plan] * 8
    assert made == ["a"]
