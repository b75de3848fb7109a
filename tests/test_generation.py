"""stream_generate and generate against mlx-lm's own functions over the same model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import EOS, PREDICTORS, Tiny  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

import mlx_flash
from mlx_flash.errors import ReadError, UsageError
from mlx_flash.flash.stats import Counters
from mlx_flash.loading.load import load
from mlx_flash.text.generation import FlashResponse, generate, stream_generate

CONTEXT = 64
PROMPT = "Once upon a time there was"  # 27 tokens
PROMPTS = [[5, 17, 80, 3, 44], [61, 9, 9, 30, 72, 1, 55, 2, 21, 40, 33, 12], [7]]


@pytest.fixture
def model(store: Any, open_model: Callable[..., Any]) -> Any:
    return open_model(store, slots=20)


@pytest.fixture
def endless(tokenizer: Any) -> Any:
    """The tokenizer without a token that ends the text."""
    wrapper = TokenizerWrapper(tokenizer._tokenizer, type(tokenizer.detokenizer))
    wrapper._eos_token_ids = {-1}
    return wrapper


class Counted:
    """Wraps a model and records the lengths of its calls."""

    def __init__(self, model: Any) -> None:
        self.model, self.calls = model, list[int]()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        self.calls.append(tokens.shape[1])
        return self.model(tokens, cache=cache)


def tokens_of(responses: Iterator[Any]) -> list[int]:
    return [response.token for response in responses]


# -- the same as mlx-lm --------------------------------------------------------------------------------------


# A prompt at once, and in steps that take the prefill path and the decode path. "none" has only one path.
@pytest.mark.parametrize(
    ("step", "predictor"),
    [*((step, predictor) for step in (512, 3) for predictor in PREDICTORS), (10, "none"), (10, "shadow")],
)
def test_mlx_lm_generates_the_same(
    store: Any, open_model: Callable[..., Any], endless: Any, predictor: str, step: int
) -> None:
    model = open_model(store, slots=20, predictor=predictor)
    ours = list(stream_generate(model, endless, PROMPT, 12, prefill_step_size=step))
    theirs = list(mlx_lm.stream_generate(model, endless, PROMPT, 12, prefill_step_size=step))
    assert [r.token for r in ours] == [r.token for r in theirs]
    assert "".join(r.text for r in ours) == "".join(r.text for r in theirs)
    assert np.array_equal(np.array(ours[-1].logprobs), np.array(theirs[-1].logprobs))
    for name in ("prompt_tokens", "generation_tokens", "finish_reason", "from_draft"):
        assert getattr(ours[-1], name) == getattr(theirs[-1], name), name
    assert len({r.token for r in ours}) > 5


def test_mlx_lm_samples_the_same(model: Any, endless: Any) -> None:
    options: dict[str, Any] = {
        "sampler": make_sampler(0.9, top_p=0.95),
        "logits_processors": make_logits_processors(repetition_penalty=1.5),
    }
    results = []
    for function in (stream_generate, mlx_lm.stream_generate):
        mx.random.seed(7)
        results.append(tokens_of(function(model, endless, PROMPT, 30, **options)))
    assert results[0] == results[1]
    assert results[0] != tokens_of(stream_generate(model, endless, PROMPT, 30))


@pytest.mark.parametrize("predictor", ["none", "exact"])
def test_a_batch_generates_what_single_runs_do(
    store: Any, open_model: Callable[..., Any], endless: Any, predictor: str
) -> None:
    model = open_model(store, slots=20, predictor=predictor)
    batch = mlx_lm.batch_generate(model, endless, PROMPTS, max_tokens=20, return_token_ids=True)
    assert batch.token_ids == [tokens_of(stream_generate(model, endless, prompt, 20)) for prompt in PROMPTS]


def test_mlx_lm_reads_the_same_text(tiny: Tiny, store: Any, open_model: Callable[..., Any], endless: Any) -> None:
    """The dense model also gives the same text through mlx-lm alone."""
    model = open_model(store, slots=3, predictor="exact")
    assert generate(model, endless, PROMPT, max_tokens=25) == mlx_lm.generate(
        tiny.dense, endless, PROMPT, max_tokens=25
    )


@pytest.mark.parametrize(
    ("predictor", "first", "second"),
    [
        ("exact", stream_generate, stream_generate),
        ("exact", stream_generate, mlx_lm.stream_generate),
        ("exact", mlx_lm.stream_generate, stream_generate),
        ("exact", mlx_lm.stream_generate, mlx_lm.stream_generate),
        ("none", stream_generate, stream_generate),
        ("none", mlx_lm.stream_generate, mlx_lm.stream_generate),
    ],
)
def test_a_second_turn_goes_on_from_the_first(
    store: Any, open_model: Callable[..., Any], endless: Any, predictor: str, first: Any, second: Any
) -> None:
    model = open_model(store, slots=20, predictor=predictor)
    cache = make_prompt_cache(model)
    said = tokens_of(first(model, endless, PROMPTS[1], 8, prompt_cache=cache))
    # Ours never feeds the last token back; mlx-lm's does.
    fed = cache[0].offset - len(PROMPTS[1])
    assert fed == (7 if first is stream_generate else 8)
    answer = tokens_of(second(model, endless, [*said[fed:], *PROMPTS[0]], 8, prompt_cache=cache))
    whole = tokens_of(stream_generate(model, endless, [*PROMPTS[1], *said, *PROMPTS[0]], 8))
    assert answer == whole != tokens_of(stream_generate(model, endless, PROMPTS[0], 8))


# -- ends ----------------------------------------------------------------------------------------------------


def last(responses: Iterator[FlashResponse]) -> FlashResponse:
    *before, response = responses
    assert all(r.finish_reason is None for r in before)
    assert response.generation_tokens == len(before) + 1
    return response


@pytest.mark.parametrize(
    ("prompt", "max_tokens"),
    [
        ("x", CONTEXT),
        *((PROMPT, count) for count in (-1, CONTEXT + 100)),
        *((list(range(1, CONTEXT)), count) for count in (-1, CONTEXT + 100, CONTEXT)),
        *((list(range(1, CONTEXT + 1)), count) for count in (-1, CONTEXT + 100, CONTEXT)),
    ],
)
def test_the_context_ends_the_text(model: Any, endless: Any, prompt: Any, max_tokens: int) -> None:
    cache = make_prompt_cache(model)
    response = last(stream_generate(model, endless, prompt, max_tokens, prompt_cache=cache))
    assert response.finish_reason == "length"
    assert response.prompt_tokens + response.generation_tokens == CONTEXT + 1
    assert cache[0].offset == CONTEXT
    with pytest.raises(UsageError, match="the prompt has 65 tokens, and the plan makes room for 64"):
        stream_generate(model, endless, [1], prompt_cache=cache)


def test_a_planned_context_below_the_models(store: Any, open_model: Callable[..., Any], endless: Any) -> None:
    model = open_model(store, context=30)
    assert last(stream_generate(model, endless, PROMPT, -1)).generation_tokens == 30 - 27 + 1
    with pytest.raises(
        UsageError, match=r"31 tokens, and the plan makes room for 30. Shorten it, or load .* up to 64 tokens."
    ):
        stream_generate(model, endless, [1] * 31)


def test_a_number_of_tokens_ends_the_text(model: Any, endless: Any) -> None:
    for count in (1, 2, 9):
        response = last(stream_generate(model, endless, PROMPT, count))
        assert (response.generation_tokens, response.finish_reason) == (count, "length")


def test_a_stop_token_ends_the_text_and_is_not_shown(model: Any, endless: Any) -> None:
    tokens = tokens_of(stream_generate(model, endless, PROMPT, 30))
    place = next(i for i, token in enumerate(tokens) if i > 3 and token not in tokens[:i] and token != EOS)
    endless._eos_token_ids = {tokens[place]}
    responses = list(stream_generate(model, endless, PROMPT, 30))
    assert [r.token for r in responses] == tokens[: place + 1]
    assert [r.finish_reason for r in responses] == [None] * place + ["stop"]
    assert "".join(r.text for r in responses) == endless.decode(tokens[:place])


@pytest.mark.parametrize("prompt", ["", [], mx.array([], mx.int32)])
def test_empty_prompts_are_refused(model: Any, endless: Any, prompt: Any) -> None:
    if prompt == "":
        endless._tokenizer = type("Bare", (), {"bos_token": None, "encode": lambda *_, **__: []})()
    with pytest.raises(UsageError, match="the prompt is empty"):
        stream_generate(model, endless, prompt)


@pytest.mark.parametrize("max_tokens", [0, -2])
def test_senseless_numbers_of_tokens_are_refused(model: Any, endless: Any, max_tokens: int) -> None:
    with pytest.raises(UsageError, match=f"max_tokens is {max_tokens}, expected a positive number, or -1"):
        stream_generate(model, endless, PROMPT, max_tokens)


def test_prompts_may_be_text_ids_or_an_array(model: Any, endless: Any) -> None:
    ids = endless.encode(PROMPT)
    assert ids[0] == EOS and len(ids) == 27
    expected = generate(model, endless, PROMPT, max_tokens=5)
    for prompt in (ids, mx.array(ids), f"</s>{PROMPT}"):
        assert generate(model, endless, prompt, max_tokens=5) == expected
    assert generate(model, endless._tokenizer, PROMPT, max_tokens=5) == expected  # the tokenizer is not wrapped


# -- order and figures ---------------------------------------------------------------------------------------


def test_a_token_is_shown_before_the_next_is_computed(model: Any, endless: Any) -> None:
    counted = Counted(model)
    prompt = list(range(1, 31))
    responses = stream_generate(counted, endless, prompt, 3, prefill_step_size=12)
    assert counted.calls == []
    expected = [12, 12, 5, 1]
    for count, response in enumerate(responses, 1):
        assert counted.calls == expected
        assert (response.generation_tokens, response.finish_reason) == (count, "length" if count == 3 else None)
        expected.append(1)
    assert len(counted.calls) == 6


def test_progress_is_reported(model: Any, endless: Any) -> None:
    seen: list[tuple[int, int]] = []
    responses = stream_generate(
        model, endless, [3] * 20, 2, prefill_step_size=8, prompt_progress_callback=lambda *now: seen.append(now)
    )
    next(responses)
    assert seen == [(0, 20), (8, 20), (16, 20), (19, 20), (20, 20)]


def test_a_generation_closed_early_leaves_the_model_usable(model: Any, endless: Any) -> None:
    expected = tokens_of(stream_generate(model, endless, PROMPT, 12))
    for count in (0, 1, 3):
        responses: Any = stream_generate(model, endless, PROMPT, 12)
        assert [next(responses).token for _ in range(count)] == expected[:count]
        responses.close()
        assert not model.flash.streamer.reader.outstanding
    assert tokens_of(stream_generate(model, endless, PROMPT, 12)) == expected


def test_two_generations_may_take_turns(model: Any, endless: Any) -> None:
    prompts = (PROMPT, PROMPTS[1])
    expected = [tokens_of(stream_generate(model, endless, prompt, 10)) for prompt in prompts]
    pairs = zip(*(stream_generate(model, endless, prompt, 10) for prompt in prompts), strict=True)
    assert [list(tokens) for tokens in zip(*((a.token, b.token) for a, b in pairs), strict=True)] == expected


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_the_statistics_add_up(store: Any, open_model: Callable[..., Any], endless: Any, predictor: str) -> None:
    model = open_model(store, slots=20, predictor=predictor)
    counters, layout = model.flash.streamer.counters, model.flash.manifest.layout
    before = counters.copy()
    responses: list[Any] = list(stream_generate(model, endless, PROMPT, 20))
    used = counters - before
    statistics = responses[-1].statistics
    prompt, decode = statistics.prompt, statistics.decode
    for name in ("hits", "misses", "reads", "bytes", "read_s", "wait_s", "manage_s"):
        assert getattr(prompt, name) + getattr(decode, name) == pytest.approx(getattr(used, name)), name
    assert statistics.decoded_tokens == 20
    assert prompt.hits + prompt.misses == layout.layers * layout.blocks  # one pass over every layer
    assert statistics.hit_rate == decode.hits / (decode.hits + decode.misses)
    slot_bytes = model.flash.plan.slot_bytes
    if predictor != "exact":  # with resident up rows, reads are not aligned
        assert used.bytes == used.misses * slot_bytes
    if predictor == "none":
        assert decode.hits + decode.misses == 20 * layout.layers * layout.blocks
    else:
        pieces = -(-layout.neurons // layout.piece_neurons)  # a block on the border of two pieces counts for both
        most = 20 * layout.layers * (layout.blocks + pieces - 1)
        assert 20 * layout.layers < decode.hits + decode.misses <= most
    each = statistics.per_token()
    assert each["bytes_per_token"] * 20 == decode.bytes and each["reads_per_token"] * 20 == decode.reads
    assert decode.wait_s + decode.manage_s < decode.total_s
    assert each["wait_s"] + each["manage_s"] + each["compute_s"] == pytest.approx(decode.total_s / 20)
    assert statistics.first_token_s > 0 and responses[0].statistics.first_token_s == statistics.first_token_s
    assert statistics.bytes_per_second == pytest.approx(decode.bytes / decode.read_s)
    assert responses[-1].prompt_tps == pytest.approx(27 / statistics.first_token_s)
    assert responses[-1].generation_tps > 0 == responses[0].generation_tps
    assert 0.05 < responses[-1].peak_memory < 20  # GB
    # Each response has the figures of its own time.
    assert [r.statistics.decoded_tokens for r in responses] == list(range(1, 21))
    assert responses[0].statistics.decode.misses < decode.misses


def test_no_reads_no_rates(store: Any, open_model: Callable[..., Any], endless: Any) -> None:
    model = open_model(store)
    for _ in range(2):
        *_, response = stream_generate(model, endless, PROMPT, 5)
    statistics = response.statistics
    assert statistics is not None
    assert statistics.decode.bytes == 0 and statistics.hit_rate == 1 and statistics.bytes_per_second is None


# -- faults --------------------------------------------------------------------------------------------------


def test_a_store_that_changed_is_refused(own_store: Any, open_model: Callable[..., Any], endless: Any) -> None:
    model = open_model(own_store, slots=5)
    generate(model, endless, PROMPT, max_tokens=2)
    with (own_store / "neurons.bin").open("r+b") as file:
        file.write(b"\0")
    with pytest.raises(ReadError, match="changed while it was in use"):
        generate(model, endless, PROMPT, max_tokens=2)


def test_the_package_exports_what_it_says() -> None:
    package: Any = mlx_flash  # mypy sees the file generate.py
    assert package.generate is generate and package.stream_generate is stream_generate and package.load is load
    assert set(mlx_flash.__all__) <= set(dir(mlx_flash))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = package.nothing


def test_threads_may_generate_at_once(tiny: Tiny, endless: Any, open_model: Callable[..., Any]) -> None:
    model = open_model(tiny.store, slots=6, predictor="exact")
    expected = generate(model, endless, [5, 17, 80, 3], max_tokens=12)
    texts: list[object] = []

    def work() -> None:
        try:
            texts.append(generate(model, endless, [5, 17, 80, 3], max_tokens=12))
        except Exception as error:
            texts.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert texts == [expected] * 4


def test_generations_at_once_count_their_own(model: Any, endless: Any) -> None:
    """The generations alternate in one thread, as two threads might."""
    before = model.flash.streamer.counters.copy()
    both = [stream_generate(model, endless, prompt, 5) for prompt in PROMPTS[:2]]
    for _ in range(5):
        last = [next(responses).statistics for responses in both]
    counted = model.flash.streamer.counters - before
    together = sum((each.prompt + each.decode for each in last if each is not None), Counters())
    for name in ("hits", "misses", "reads", "bytes"):
        assert getattr(together, name) == getattr(counted, name)
    assert all(each is not None and each.decode.hits + each.decode.misses for each in last)


def test_after_a_sampler_s_error_another_thread_may_generate(
    tiny: Tiny, endless: Any, open_model: Callable[..., Any]
) -> None:
    """The failed token's unevaluated outputs belong to the thread that began them."""
    model = open_model(tiny.store, slots=20, predictor="lowrank")
    expected = tokens_of(stream_generate(model, endless, PROMPT, max_tokens=3))

    def fails(logprobs: mx.array) -> mx.array:
        raise ValueError("the sampler's own")

    with pytest.raises(ValueError, match="the sampler's own"):
        list(stream_generate(model, endless, PROMPT, max_tokens=3, sampler=fails))
    found: list[Any] = []

    def work() -> None:
        try:
            found.append(tokens_of(stream_generate(model, endless, PROMPT, max_tokens=3)))
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [expected]
