"""Rows that are decoded together, over streamed models, against the resident model in the same batches, bit for bit."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Tiny  # type: ignore[import-not-found]
from mixtures import make_mixture, open_streamed  # type: ignore[import-not-found]
from mlx_lm.generate import BatchGenerator
from mlx_lm.models.cache import QuantizedKVCache, make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.utils import load_model

from mlx_flash.errors import GrammarError, UsageError
from mlx_flash.flash.stats import Counters
from mlx_flash.flash.trials import Trials
from mlx_flash.loading import layer_weights
from mlx_flash.text.batch_generation import DecodeBatch
from mlx_flash.text.token_loop import Chooser, Token

PROMPTS = [[5, 17, 80, 3, 44, 9, 12], [61, 9, 30, 72, 1, 55, 2, 21, 40, 33, 12, 8, 90], [7], [4, 4, 18]]
LAYERS = {"num_hidden_layers": 4, "intermediate_size": 128}
WINDOW = {"sliding_window": 8, "sliding_window_pattern": 2}
MODELS: dict[str, dict[str, Any]] = {  # dense, with windows; mixtures; states of recurrences beside attention
    "llama": LAYERS,
    "gemma3_text": {**LAYERS, **WINDOW},
    "qwen3_moe": {},
    "nemotron_h": {},
}


def with_flash(model: Any, streamer: Any = None) -> Any:
    """The model with as much of a Runtime as a batch uses."""
    streamer = streamer or SimpleNamespace(counters=Counters())
    nothing = lambda: None  # noqa: E731
    guarded = getattr(streamer, "evaluate_guarded", nothing)
    model.flash = SimpleNamespace(
        lock=threading.Lock(),
        streamer=streamer,
        verify_unchanged=nothing,
        evaluate_guarded=guarded,
        trials=Trials(),
        answered=lambda *_: None,
    )
    return model


def read(model: Any, prompt: list[int]) -> list[Any]:
    """A prompt cache with all tokens of a prompt but the last."""
    cache: list[Any] = make_prompt_cache(model)
    if len(prompt) > 1:
        model(mx.array([prompt[:-1]]), cache=cache)
        mx.eval([layer.state for layer in cache])
    return cache


def join(batch: DecodeBatch, model: Any, prompt: list[int], **options: Any) -> None:
    chooser = Chooser(prompt, options.pop("sampler", greedy_sampler), options.pop("processors", []))
    batch.join(read(model, prompt), prompt[-1], chooser, **options)


def tokens_of(batch: DecodeBatch) -> list[Token]:
    """A step without errors."""
    made = batch.step()
    assert all(isinstance(each, Token) for each in made), made
    return made  # type: ignore[return-value]


def everything(model: Any) -> list[np.ndarray]:
    """The log-probabilities of rows that join and leave, then of a row that left and continues alone."""
    batch, found = DecodeBatch(model), list[np.ndarray]()

    def steps(count: int) -> list[int]:
        for _ in range(count):
            made = tokens_of(batch)
            found.extend(np.array(each.logprobs.astype(mx.float32)) for each in made)
        return [each.token for each in made]

    join(batch, model, PROMPTS[0])
    steps(2)
    for prompt in PROMPTS[1:3]:
        join(batch, model, prompt)
    newest = steps(3)
    token, cache = newest[1], batch.leave(1)
    join(batch, model, PROMPTS[3])
    steps(5)  # a window of 8 has moved on
    while len(batch):
        batch.leave(0)
    batch.join(cache, token, Chooser([], greedy_sampler, []))
    steps(2)
    return found


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def stream(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    monkeypatch.setattr(layer_weights, "SHORTEST_TENSOR", 2048)
    with contextlib.ExitStack() as stack:

        def open_one(folder: Path, **options: Any) -> Any:
            model, streamer = open_streamed(folder, **options)
            stack.callback(streamer.close)
            return with_flash(model, streamer)

        yield open_one


@pytest.mark.parametrize("family", MODELS)
def test_a_batch_has_the_bits_of_the_resident_model(tmp_path: Path, stream: Callable[..., Any], family: str) -> None:
    folder = make_mixture(tmp_path, family, **MODELS[family])
    expected = everything(with_flash(load_model(folder)[0]))
    for pinned, slots in ((0, 1), (None, 2)):
        model = stream(folder, slots=slots, pinned=pinned)
        assert same(everything(model), expected)
        assert model.flash.streamer.counters.bytes > 0 or family in ("llama", "gemma3_text")


def test_neurons_are_chosen_for_each_row(tiny: Tiny, store: Path, open_model: Callable[..., Any]) -> None:
    """A predictor of which neurons are active loses nothing, so the tokens are those of all neurons."""
    few, many = (everything(open_model(store, slots=slots, predictor="exact")) for slots in (3, None))
    assert same(few, many)
    dense = everything(with_flash(tiny.dense))
    assert [row.argmax() for row in few] == [row.argmax() for row in dense]


@pytest.mark.parametrize("family", MODELS)
def test_mlx_lm_batches_the_same(tmp_path: Path, stream: Callable[..., Any], family: str) -> None:
    """mlx-lm's own batches run over a streamed model, and are like these."""
    folder = make_mixture(tmp_path, family, **MODELS[family])
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[3]]
    answers = []
    for model in (load_model(folder)[0], stream(folder, slots=1, pinned=0)):
        generator = BatchGenerator(model, max_tokens=6)
        caches = [read(model, prompt) for prompt in prompts]
        numbers = generator.insert([prompt[-1:] for prompt in prompts], caches=caches)
        made: dict[int, list[int]] = {number: [] for number in numbers}
        while responses := generator.next_generated():
            for response in responses:
                made[response.uid].append(response.token)
        generator.close()
        answers.append(list(made.values()))
    batch = DecodeBatch(model)
    for prompt in prompts:
        join(batch, model, prompt)
    steps = [[each.token for each in tokens_of(batch)] for _ in range(6)]
    assert answers == [[list(row) for row in zip(*steps, strict=True)]] * 2


@pytest.fixture
def llama(tmp_path: Path) -> Any:
    return with_flash(load_model(make_mixture(tmp_path, "llama"))[0])


def test_random_numbers_belong_to_a_row(llama: Any) -> None:
    def sampler(logprobs: mx.array) -> mx.array:
        return mx.random.categorical(mx.zeros_like(logprobs))

    def answers(rows: list[tuple[list[int], int]]) -> list[list[int]]:
        batch = DecodeBatch(llama)
        for prompt, seed in rows:
            join(batch, llama, prompt, sampler=sampler, seed=seed)
        return [list(row) for row in zip(*[[each.token for each in tokens_of(batch)] for _ in range(6)], strict=True)]

    mx.random.seed(3)
    state: Any = mx.random.state
    before = np.array(state[0])
    (alone,) = answers([(PROMPTS[0], 7)])
    other, among = answers([(PROMPTS[1], 8), (PROMPTS[0], 7)])
    assert alone == among != other
    assert np.array_equal(before, np.array(state[0]))


def test_an_error_of_one_row_leaves_the_others(llama: Any) -> None:
    calls: list[int] = []

    def fails(tokens: mx.array, logits: mx.array) -> mx.array:
        calls.append(len(tokens))
        if len(calls) == 2:
            raise GrammarError("too complex")
        return logits

    batch = DecodeBatch(llama)
    join(batch, llama, PROMPTS[0], processors=[fails])
    join(batch, llama, PROMPTS[1])
    batch.step()
    first, second = batch.step()
    assert isinstance(first, GrammarError) and not isinstance(second, Exception)
    assert calls == [len(PROMPTS[0]), len(PROMPTS[0]) + 1]
    assert batch.leave(0)[0].offset == len(PROMPTS[0]) + 1
    assert len(batch) == 1 and not isinstance(batch.step()[0], Exception)


def test_a_quantised_cache_is_refused(llama: Any) -> None:
    batch = DecodeBatch(llama)
    with pytest.raises(UsageError, match="one request at a time"):
        batch.join([QuantizedKVCache()], 1, Chooser([1], greedy_sampler, []))
    assert len(batch) == 0
