"""Drafts: the text is the same with and without them, whatever is drafted, and with every kind of cache."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import EOS, write_tokenizer  # type: ignore[import-not-found]
from drafting import Telling  # type: ignore[import-not-found]  # found beside this file
from hypothesis import given
from hypothesis import strategies as st
from mixtures import make_mixture, open_streamed  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_logits_processors, make_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper
from slow_cases import others, slow  # type: ignore[import-not-found]
from test_streamed_layers import DENSE, WIDE  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.errors import BudgetError, UsageError
from mlx_flash.flash.stats import Counters
from mlx_flash.flash.trials import Trials
from mlx_flash.loading import layer_weights
from mlx_flash.loading.load import load, plan
from mlx_flash.text import ngrams
from mlx_flash.text.drafts import MODEL, NGRAM, Drafting, DraftModel
from mlx_flash.text.generation import stream_generate
from mlx_flash.text.ngrams import LONGEST, MOST_PLACES, SHORTEST, NgramIndex
from mlx_flash.text.prompt_cache import ReusedPromptCache
from mlx_flash.text.token_loop import Chooser, TokenLoop, cached_tokens
from mlx_flash.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_processor")

PROMPT = [5, 17, 80, 3, 44, 61, 9, 30, 72, 1, 55, 2, 21, 40, 33, 12]
TOKENS = 24
# Caches that trim, quantised ones, windows that rotate, and states of recurrences.
MODELS = ("none", "exact", "lowrank", "quantised cache", "qwen3_moe", "gpt_oss", "qwen3_next", "nemotron_h")


@pytest.fixture(scope="module")
def endless(store: Path) -> Any:
    """The tokenizer without a token that ends the text."""
    wrapper = TokenizerWrapper(load_tokenizer(store)._tokenizer)
    wrapper.eos_token_ids = [-1]
    return wrapper


@pytest.fixture(
    scope="module", params=others([*MODELS], ["exact", "quantised cache", "gpt_oss", "qwen3_next", "nemotron_h"])
)
def model(request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder, options = store, {"predictor": request.param}
    if request.param not in MODELS[:3]:
        changes, options = {}, {}
        if request.param == "quantised cache":
            changes, options = {"hidden_size": 128, "head_dim": 32}, {"kv_bits": 8}
        family = "qwen3_moe" if options else request.param
        folder = make_mixture(tmp_path_factory.mktemp("mixture") / "model", family, **changes)
        write_tokenizer(folder)
    made, _ = load(folder, memory="4GB", **options)
    yield made
    made.flash.close()


def tokens_of(responses: Iterator[Any]) -> list[int]:
    return [response.token for response in responses]


def drafts_of(response: Any) -> Any:
    """The DraftCounts of a generation that was set up for drafts, from its last response."""
    return response.statistics.drafts


def bytes_of(response: Any) -> int:
    """The bytes that decoding has read, from a response."""
    return response.statistics.decode.bytes  # type: ignore[no-any-return]


def told(model: Any, text: list[int], wrong: int = 10**9) -> None:
    """Makes the model draft from this text."""
    model.flash.drafting = Telling(NGRAM, model.flash.most_positions, text=text, wrong=wrong)


# -- the same text -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", [1, 3, 10**9, slow(2), slow(5)])
def test_the_text_and_the_cache_are_those_without_drafts(model: Any, endless: Any, wrong: int) -> None:
    model.flash.drafting = None
    caches = [make_prompt_cache(model) for _ in range(2)]
    expected = list(stream_generate(model, endless, PROMPT, TOKENS, prompt_cache=caches[0]))
    text = [*PROMPT, *(response.token for response in expected)]
    told(model, text, wrong)
    found = list(stream_generate(model, endless, PROMPT, TOKENS, prompt_cache=caches[1], num_draft_tokens=3))
    assert [r.token for r in found] == [r.token for r in expected]
    assert "".join(r.text for r in found) == "".join(r.text for r in expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert np.allclose(np.array(ours.logprobs), np.array(theirs.logprobs), rtol=0, atol=2e-3)
    counts = drafts_of(found[-1])
    assert counts.accepted == sum(r.from_draft for r in found)
    assert counts.passes + counts.accepted == TOKENS
    if wrong == 1:
        assert counts.accepted == 0 < counts.drafted
    elif wrong == 10**9:
        assert counts.accepted == counts.drafted and counts.passes == TOKENS // 4
    else:
        assert 0 < counts.accepted < counts.drafted
    # The next turn continues the same way.
    more = [text[-1], 8, 9, 10]
    model.flash.drafting = None
    turns = [tokens_of(stream_generate(model, endless, more, 6, prompt_cache=cache)) for cache in caches]
    assert turns[0] == turns[1]


@pytest.mark.parametrize("stop", others([*range(1, 9)], [1, 2, 4, 7]))
def test_a_text_that_is_left_anywhere_leaves_a_whole_cache(model: Any, endless: Any, stop: int) -> None:
    """Whether a client leaves, or the token that ends the text is inside a run of accepted drafts."""
    model.flash.drafting = None
    text = [*PROMPT, *tokens_of(stream_generate(model, endless, PROMPT, TOKENS))]
    expected = None
    for wrong in (None, 4, 10**9):
        cache = make_prompt_cache(model)
        if wrong is None:
            model.flash.drafting = None
        else:
            told(model, text, wrong)
        depth = None if wrong is None else 5
        with closing(
            stream_generate(model, endless, PROMPT, TOKENS, prompt_cache=cache, num_draft_tokens=depth)
        ) as responses:
            made = [next(responses).token for _ in range(stop)]
        assert made == text[len(PROMPT) :][:stop]
        if counted := cached_tokens(cache):  # recurrences count none
            assert counted == len(PROMPT) + stop - 1
        model.flash.drafting = None
        after = tokens_of(stream_generate(model, endless, [made[-1], 8, 9], 6, prompt_cache=cache))
        expected = expected or after
        assert after == expected


@pytest.mark.parametrize("stop", [1, 3, TOKENS, slow(2), slow(6)])
def test_the_next_turn_reuses_what_a_drafted_answer_left(model: Any, endless: Any, stop: int) -> None:
    model.flash.drafting = None
    text = [*PROMPT, *tokens_of(stream_generate(model, endless, PROMPT, TOKENS))]
    turns = [ReusedPromptCache(model) for _ in range(2)]
    answers = []
    for place, own in enumerate(turns):
        if place:
            told(model, text, 4)
        depth = 5 if place else None
        with closing(own.stream_generate(endless, PROMPT, TOKENS, num_draft_tokens=depth)) as responses:
            made = [next(responses).token for _ in range(stop)]
        assert own.tokens == [*PROMPT, *made[:-1]]
        model.flash.drafting = None
        following = [*PROMPT, *made, 8, 9, 10]
        answers.append(tokens_of(own.stream_generate(endless, following, 6)))
        assert own.reused == len(PROMPT) + stop - 1
    assert answers[0] == answers[1]


def test_the_end_of_a_text_inside_a_run(model: Any, endless: Any) -> None:
    model.flash.drafting = None
    said = tokens_of(stream_generate(model, endless, PROMPT, TOKENS))
    told(model, [*PROMPT, *said])
    for count in range(1, 7):
        *_, last = stream_generate(model, endless, PROMPT, count, num_draft_tokens=5)
        assert (last.generation_tokens, last.finish_reason, last.token) == (count, "length", said[count - 1])
    place = next(at for at, token in enumerate(said) if at > 1 and token not in said[:at])
    ending = TokenizerWrapper(endless._tokenizer)
    ending.eos_token_ids = [said[place]]
    found = list(stream_generate(model, ending, PROMPT, TOKENS, num_draft_tokens=5))
    assert [r.token for r in found] == said[: place + 1] and found[-1].finish_reason == "stop"


def test_the_context_ends_inside_a_run(store: Path, open_model: Callable[..., Any], endless: Any) -> None:
    model = open_model(store, slots=20, context=30)
    expected = tokens_of(stream_generate(model, endless, PROMPT, -1))
    told(model, [*PROMPT, *expected, 7, 7, 7, 7, 7])
    cache = make_prompt_cache(model)
    assert tokens_of(stream_generate(model, endless, PROMPT, -1, prompt_cache=cache, num_draft_tokens=7)) == expected
    assert len(expected) == 15 and cached_tokens(cache) == 30


def test_a_cache_stays_within_whole_steps(endless: Any, tmp_path: Path) -> None:
    """A pass across the end of a step must not begin a new step in its middle: the plan counts whole ones."""
    folder = make_mixture(tmp_path / "model", "mixtral")
    write_tokenizer(folder)
    prompt = [1 + at % 90 for at in range(250)]
    for drafting in ("target", "draft"):
        model, _ = load(folder, memory="2GB", draft_model=folder)
        with closing(model.flash):
            if drafting == "target":
                told(model, [*prompt, *[7] * 40], 1)
            turns = ReusedPromptCache(model)
            list(turns.stream_generate(endless, prompt, 12, num_draft_tokens=5))
            caches = [turns._last.cache]
            if drafting == "draft":
                caches.append(model.flash.drafting.model._kept[0].cache)
            assert {part.keys.shape[-2] for cache in caches for part in cache} == {512}


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "mamba2", "recurrent_gemma", "lfm2"])
def test_a_pass_over_streamed_layers_reads_the_same_bytes(
    endless: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, family: str
) -> None:
    """Every accepted draft saves the reading of all layers that are not in memory."""
    monkeypatch.setattr(layer_weights, "SHORTEST_TENSOR", 2048)
    model, streamer = open_streamed(make_mixture(tmp_path / "model", family, **WIDE, **DENSE[family]), 0, pinned=1)
    model.flash = SimpleNamespace(
        plan=SimpleNamespace(context=512),
        vocabulary=96,
        lock=threading.Lock(),
        streamer=streamer,
        evaluate_guarded=streamer.evaluate_guarded,
        trials=Trials(),
        answered=lambda *_: None,
        verify_unchanged=streamer.verify_unchanged,
        shared_reading=None,
        prefill_tokens=512,
        drafting=None,
        most_positions=16,
    )
    with closing(streamer):
        *before, last = stream_generate(model, endless, PROMPT, TOKENS)
        text = [*PROMPT, *(response.token for response in (*before, last))]
        each = bytes_of(last) // TOKENS
        assert bytes_of(last) == each * TOKENS > 0
        for wrong, depth in ((10**9, 7), (3, 3), (1, 2)):
            told(model, text, wrong)
            *before, last = stream_generate(model, endless, PROMPT, TOKENS, num_draft_tokens=depth)
            assert [*PROMPT, *(response.token for response in (*before, last))] == text
            counts = drafts_of(last)
            assert bytes_of(last) in (each * counts.passes, each * (counts.passes + 1))
            assert counts.passes + counts.accepted == TOKENS


@pytest.mark.parametrize(
    ("sampler", "processors"),
    [
        (make_sampler(0.9, top_p=0.95), []),
        (make_sampler(1.2, min_p=0.02, top_k=40), make_logits_processors(repetition_penalty=1.5)),
        (
            make_sampler(1.0, xtc_probability=0.5, xtc_threshold=0.02),
            make_logits_processors({7: 2.0}, presence_penalty=0.5, frequency_penalty=0.3),
        ),
        (None, make_logits_processors(repetition_penalty=1.4)),
    ],
)
def test_a_seed_gives_the_same_text(
    store: Path, open_model: Callable[..., Any], endless: Any, kept: Any, sampler: Any, processors: Any
) -> None:
    model = open_model(store, slots=20, predictor="exact")

    def said(**options: Any) -> list[Any]:
        mx.random.seed(11)
        return list(
            stream_generate(model, endless, PROMPT, TOKENS, sampler=sampler, logits_processors=processors, **options)
        )

    expected = [r.token for r in said()]
    for wrong in (1, 3, 10**9):
        told(model, [*PROMPT, *expected], wrong)
        found = said(num_draft_tokens=5)
        assert [r.token for r in found] == expected
        assert (drafts_of(found[-1]).accepted > 0) == (wrong > 1)
    model.flash.drafting = None
    # A draft model that is the model itself draws the same random numbers, so all of its drafts are right.
    if not processors:
        found = said(draft_model=kept, num_draft_tokens=3)
        counts = drafts_of(found[-1])
        assert [r.token for r in found] == expected and counts.accepted == counts.drafted > 0


def test_processors_see_the_text_token_by_token(store: Path, open_model: Callable[..., Any], endless: Any) -> None:
    """A processor that follows the text is never told of a draft that is not accepted."""
    model = open_model(store, slots=20)
    seen: list[Any] = []

    def process(tokens: mx.array, logits: mx.array) -> mx.array:
        seen.append(tokens.tolist())
        return logits

    expected = tokens_of(stream_generate(model, endless, PROMPT, 12))
    told(model, [*PROMPT, *expected], 3)
    assert tokens_of(stream_generate(model, endless, PROMPT, 12, logits_processors=[process])) == expected
    assert seen == [[*PROMPT, *expected[:count]] for count in range(12)]


# -- distributions -------------------------------------------------------------------------------------------

STATES = 5
DRAWS = 4000
MOST_CHI_SQUARED = 75.0  # 24 degrees of freedom exceed this once in a million; the seed is fixed


class Table(nn.Module):
    """A model whose next token depends on the last one only. It counts tokens in its cache."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.table = mx.array(np.random.default_rng(seed).standard_normal((STATES, STATES), np.float32))

    @property
    def layers(self) -> list[Any]:
        return [None]

    def make_cache(self) -> list[Any]:
        return [TokenCount()]

    def __call__(self, tokens: mx.array, cache: list[Any]) -> mx.array:
        cache[0].offset += tokens.shape[1]
        return self.table[tokens]


class TokenCount:
    def __init__(self) -> None:
        self.offset = 0
        self.state: list[Any] = []

    def is_trimmable(self) -> bool:
        return True

    def trim(self, count: int) -> int:
        self.offset -= count
        return count


@pytest.mark.parametrize("drafts", ["told", "model"])
def test_the_distribution_is_the_models_own(drafts: str) -> None:
    """Two tokens after a first one, by counts, where the drafts come from another distribution."""
    model, other = Table(1), Table(2)
    model.flash = SimpleNamespace(  # type: ignore[assignment]
        lock=threading.Lock(),
        streamer=SimpleNamespace(counters=Counters()),
        vocabulary=STATES,
        evaluate_guarded=lambda: None,
        trials=Trials(),
        answered=lambda *_: None,
        verify_unchanged=lambda: None,
    )
    sampler = make_sampler(0.8, top_p=0.95)
    pairs = list(product(range(STATES), repeat=2))
    probabilities = [allowed(model, 0)[a] * allowed(model, a)[b] for a, b in pairs]
    wrongly = [allowed(other, 0)[a] * allowed(other, a)[b] for a, b in pairs]
    mx.random.seed(5)
    counts, accepted = Counter[tuple[int, ...]](), 0
    drafting: Drafting = Drafting(MODEL, 4, DraftModel(other))
    for draw in range(DRAWS):
        if drafts == "told":
            drafting = Telling(NGRAM, 4, text=[0, draw % STATES, draw // STATES % STATES])
        loop = TokenLoop(model, make_prompt_cache(model))
        with closing(loop.drafted(0, Chooser([0], sampler, []), 3, [0], drafting, 2, sampler)) as tokens:
            counts[next(tokens).token, next(tokens).token] += 1
        accepted += loop.statistics().drafts.accepted  # type: ignore[union-attr]
    assert 0 < accepted < 2 * DRAWS
    assert chi_squared(counts, pairs, probabilities) < MOST_CHI_SQUARED
    assert chi_squared(counts, pairs, wrongly) > 10 * MOST_CHI_SQUARED  # The test can tell them apart.


def allowed(model: Table, token: int) -> np.ndarray:
    """The probabilities after a token at temperature 0.8, of the likeliest tokens that have 95 % together."""
    logits = np.array(model.table[token], np.float64)
    plain = np.exp(logits) / np.exp(logits).sum()
    order = np.argsort(-plain)
    above = np.cumsum(plain[order]) - plain[order]
    kept = np.exp(logits / 0.8)
    kept[order[above >= 0.95]] = 0
    return kept / kept.sum()


def chi_squared(counts: Counter[tuple[int, ...]], pairs: list[Any], probabilities: list[float]) -> float:
    expected = {pair: DRAWS * p for pair, p in zip(pairs, probabilities, strict=True)}
    if any(counts[pair] for pair, count in expected.items() if not count):
        return float("inf")
    return sum((counts[pair] - count) ** 2 / count for pair, count in expected.items() if count)


# -- n-grams -------------------------------------------------------------------------------------------------


def naive(text: list[int], count: int) -> list[int]:
    """The same as `NgramIndex.continuation`, by comparing all places."""
    ends = [at for at in range(SHORTEST, len(text)) if text[at - SHORTEST : at] == text[-SHORTEST:]][-MOST_PLACES:]

    def match(at: int) -> int:
        length = 0
        while length < min(LONGEST, at) and text[at - 1 - length] == text[-1 - length]:
            length += 1
        return length

    if not ends:
        return []
    best = max(ends, key=lambda at: (match(at), at))
    made = list(text)
    for at in range(best, best + count):
        made.append(made[at])
    return made[len(text) :]


@given(st.lists(st.integers(0, 3), max_size=90), st.integers(0, 9), st.data())
def test_ngrams_find_the_longest_match(text: list[int], count: int, data: st.DataObject) -> None:
    index = NgramIndex()
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=4)))
    for begin, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        index.extend(text[begin:end])
        assert index.tokens == text[:end] and index.continuation(count) == naive(text[:end], count)


def test_the_work_of_ngrams_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    class Counted(list[int]):
        read = 0

        def __getitem__(self, at: Any) -> Any:
            Counted.read += 1
            return super().__getitem__(at)

    index = NgramIndex()
    index.tokens = Counted()
    index.extend([1, 2, 3] + [at % 7 if at % 2 else 50 + at for at in range(20_000)] + [1, 2] * 5000 + [1, 2, 3, 4])
    Counted.read = 0
    for token in (2, 1, 2, 3, 1, 50, 3):
        index.extend([token])
        index.continuation(8)
    assert Counted.read < 7 * (2 * MOST_PLACES * LONGEST + 20)


def test_the_plan_counts_the_index_of_ngrams() -> None:
    import tracemalloc

    text = np.random.default_rng(1).integers(0, 150_000, 22_000).tolist()  # a size just after its dict has grown
    tracemalloc.start()
    index = NgramIndex()
    index.extend(text)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < ngrams.BYTES_PER_TOKEN * len(text)


# -- draft models --------------------------------------------------------------------------------------------


@pytest.fixture
def kept(store: Path) -> Iterator[Any]:
    """A draft model that is the streamed model itself."""
    made, _ = load(store, memory="2GB", predictor="none")
    yield made
    made.flash.close()


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "qwen3_next", "nemotron_h"])
def test_a_model_drafts_for_itself(endless: Any, family: str, tmp_path: Path) -> None:
    """Every draft is right, so the draft model's cache was led back rightly, whatever kind it is."""
    folder = make_mixture(tmp_path / "model", family)
    write_tokenizer(folder)
    model, _ = load(folder, memory="2GB", draft_model=folder)
    with closing(model.flash):
        turns = ReusedPromptCache(model)
        for prompt in (PROMPT, [*PROMPT, 4, 4], [*PROMPT[:9], 8, 8, 8]):
            expected = tokens_of(stream_generate(model, endless, prompt, TOKENS, num_draft_tokens=0))
            *before, last = turns.stream_generate(endless, prompt, TOKENS, num_draft_tokens=4)
            assert [r.token for r in (*before, last)] == expected
            counts = drafts_of(last)
            assert counts.kind == MODEL and counts.accepted == counts.drafted > 0
        assert model.flash.plan.demand.drafts > 4e5
        assert "drafts" in model.flash.plan.describe()


def test_a_draft_model_reads_only_what_is_new(
    store: Path, open_model: Callable[..., Any], endless: Any, kept: Any
) -> None:
    model = open_model(store, slots=20, predictor="none")
    calls: list[int] = []

    class Watched:
        def __getattr__(self, name: str) -> Any:
            return getattr(kept, name)

        def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
            calls.append(tokens.shape[1])
            return kept(tokens, cache=cache)

    model.flash.drafting = Drafting(MODEL, model.flash.most_positions, DraftModel(Watched()))
    turns = ReusedPromptCache(model)
    first = list(turns.stream_generate(endless, PROMPT, 8, num_draft_tokens=3))
    # All of the prompt but its last token; then, for each pass, what is certain and two drafts.
    assert calls == [len(PROMPT) - 1, 1, 1, 1, 4, 1, 1]
    assert drafts_of(first[-1]).accepted == 6
    calls.clear()
    said = [r.token for r in first]
    second = list(turns.stream_generate(endless, [*PROMPT, *said, 7, 7], 4, num_draft_tokens=3))
    assert calls[0] < 10 and drafts_of(second[-1]).accepted == 3
    calls.clear()
    list(turns.stream_generate(endless, [9, 9, 9, 9, 9], 4, num_draft_tokens=3))
    assert calls[0] == 4


def test_a_draft_model_with_a_short_context_stops_drafting(
    store: Path, open_model: Callable[..., Any], endless: Any, kept: Any
) -> None:
    model = open_model(store, slots=20, predictor="none")
    expected = tokens_of(stream_generate(model, endless, PROMPT, TOKENS))
    model.flash.drafting = Drafting(MODEL, model.flash.most_positions, DraftModel(kept, positions=len(PROMPT) + 8))
    *before, last = stream_generate(model, endless, PROMPT, TOKENS, num_draft_tokens=3)
    assert [r.token for r in (*before, last)] == expected and drafts_of(last).drafted == 6


class Cut(nn.Module):
    """A model with other numbers of logits than the one that it drafts for, as padded vocabularies have."""

    def __init__(self, inner: Any, size: int) -> None:
        super().__init__()
        self.inner, self.size = inner, size

    def make_cache(self) -> Any:
        return make_prompt_cache(self.inner)

    def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
        logits = self.inner(tokens, cache=cache)
        if self.size <= logits.shape[-1]:
            return logits[..., : self.size]
        return mx.concatenate([logits, mx.full((*logits.shape[:2], self.size - logits.shape[-1]), 1e3)], axis=-1)


@pytest.mark.parametrize("size", [90, 130])
def test_another_number_of_logits(
    store: Path, open_model: Callable[..., Any], endless: Any, kept: Any, size: int
) -> None:
    model = open_model(store, slots=20, predictor="none")
    sampler = make_sampler(0.9)
    mx.random.seed(3)
    expected = tokens_of(stream_generate(model, endless, PROMPT, TOKENS, sampler=sampler))
    mx.random.seed(3)
    *before, last = stream_generate(model, endless, PROMPT, TOKENS, sampler=sampler, draft_model=Cut(kept, size))
    assert [r.token for r in (*before, last)] == expected
    counts = drafts_of(last)
    assert counts.depth == 3 and counts.accepted > counts.drafted / 2


def test_after_an_error_of_the_draft_model(
    store: Path, open_model: Callable[..., Any], endless: Any, kept: Any
) -> None:
    model = open_model(store, slots=20, predictor="none")
    expected = tokens_of(stream_generate(model, endless, PROMPT, TOKENS))
    fails_at = 6

    class Failing:
        calls = 0

        def __getattr__(self, name: str) -> Any:
            return getattr(kept, name)

        def __call__(self, tokens: mx.array, cache: Any) -> mx.array:
            self.calls += 1
            if self.calls == fails_at:
                raise KeyboardInterrupt
            return kept(tokens, cache=cache)

    model.flash.drafting = Drafting(MODEL, model.flash.most_positions, DraftModel(Failing()))
    turns = ReusedPromptCache(model)
    with pytest.raises(KeyboardInterrupt):
        list(turns.stream_generate(endless, PROMPT, TOKENS, num_draft_tokens=3))
    assert turns.tokens == []
    *before, last = turns.stream_generate(endless, PROMPT, TOKENS, num_draft_tokens=3)
    assert [r.token for r in (*before, last)] == expected
    assert drafts_of(last).accepted == drafts_of(last).drafted > 0


# -- errors, and what may not be asked for -------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [1, 2, 5, slow(3), slow(4)])
def test_an_error_in_the_middle_empties_the_cache(
    model: Any, endless: Any, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    model.flash.drafting = None
    expected = tokens_of(stream_generate(model, endless, PROMPT, 12))
    told(model, [*PROMPT, *expected], 3)
    turns, real, calls = ReusedPromptCache(model), TokenLoop.decode_run, 0

    def decode_run(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        result = real(*arguments)
        if calls == fails_at:
            raise OSError("the disk")
        return result

    monkeypatch.setattr(TokenLoop, "decode_run", decode_run)
    with pytest.raises(OSError, match="the disk"):
        list(turns.stream_generate(endless, PROMPT, 12, num_draft_tokens=3))
    assert turns.tokens == []
    assert tokens_of(turns.stream_generate(endless, PROMPT, 12, num_draft_tokens=3)) == expected


def test_an_interrupt_while_the_cache_is_put_right(
    endless: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = make_mixture(tmp_path / "model", "qwen3_next")
    write_tokenizer(folder)
    model, _ = load(folder, memory="2GB")
    with closing(model.flash):
        expected = tokens_of(stream_generate(model, endless, PROMPT, 12))
        told(model, [*PROMPT, *expected])
        turns, real = ReusedPromptCache(model), TokenLoop.feed

        def feed(*_: Any) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(TokenLoop, "feed", feed)
        with (
            pytest.raises(KeyboardInterrupt),
            closing(turns.stream_generate(endless, PROMPT, 12, num_draft_tokens=3)) as responses,
        ):
            next(responses)
        assert turns.tokens == []
        monkeypatch.setattr(TokenLoop, "feed", real)
        assert tokens_of(turns.stream_generate(endless, PROMPT, 12, num_draft_tokens=3)) == expected


def test_senseless_numbers_of_drafts_are_refused(store: Path, open_model: Callable[..., Any], endless: Any) -> None:
    model = open_model(store, slots=20)
    with pytest.raises(UsageError, match="num_draft_tokens is given without drafts"):
        stream_generate(model, endless, PROMPT, num_draft_tokens=2)
    model.flash.drafting = Drafting(NGRAM, model.flash.most_positions)
    for count in (-1, 8):
        with pytest.raises(UsageError, match=f"num_draft_tokens is {count}, expected 0 to 7 for this model."):
            stream_generate(model, endless, PROMPT, num_draft_tokens=count)


def test_options_that_are_refused(store: Path, tmp_path: Path) -> None:
    for options, message in (
        ({"draft": "oracle"}, "draft is 'oracle', expected one of none, ngram."),
        ({"draft_model": 3}, "draft_model is 3, expected a folder or a repository id."),
        ({"draft": "ngram", "draft_model": "x"}, "draft is 'ngram' and a draft model is given as well."),
        ({"draft_model": "./nowhere"}, "nowhere is neither a folder nor a Hugging Face repository id"),
        ({"draft_model": store}, "is a store, but a draft model is read from its checkpoint"),
    ):
        with pytest.raises(UsageError, match=message):
            load(store, memory="2GB", **options)


def test_another_vocabulary_is_refused(store: Path, tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "model", "mixtral")
    write_tokenizer(folder, 80)
    with pytest.raises(UsageError, match="token 80 is unknown there and ';' here"):
        load(store, memory="2GB", draft_model=folder)


@pytest.mark.parametrize("quantisation", ["plain", "4 bits"])
def test_a_dense_model_of_a_type_of_ours_drafts(endless: Any, tmp_path: Path, quantisation: str) -> None:
    """This package has a Llama of its own, for ReLU. With SiLU it is the zoo's."""
    folder = make_mixture(tmp_path / "model", "llama", quantisation, **WIDE)
    write_tokenizer(folder)
    model, _ = load(folder, memory="2GB", draft_model=folder, context=64)
    with closing(model.flash):
        *_, last = stream_generate(model, endless, PROMPT, 12, num_draft_tokens=3)
        assert last.statistics.drafts.accepted > 0  # type: ignore[union-attr]


def test_the_plan_has_a_row_for_drafts(store: Path, tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "model", "mixtral")
    write_tokenizer(folder)
    plain, ngram, model = (
        plan(store, memory="1GB", **options) for options in ({}, {"draft": "ngram"}, {"draft_model": folder})
    )
    assert plain.demand.drafts == 0 and "drafts" not in plain.describe()
    assert "index of n-grams" in ngram.describe() and 0 < ngram.demand.drafts < 1e6
    weights = (folder / "model.safetensors").stat().st_size
    assert "draft" in model.describe() and model.demand.drafts > weights
    assert model.smallest - plain.smallest == pytest.approx(model.demand.drafts, abs=2e6)
    with pytest.raises(BudgetError, match=r"MB KV cache, \d+ MB drafts, "):
        plan(store, memory="1MB", draft_model=folder)


def test_the_package_takes_the_options(store: Path, tiny_of: Callable[[str], Any], endless: Any) -> None:
    tiny = tiny_of("float32")
    expected = None
    for options in ({}, {"draft": "ngram"}, {"draft_model": tiny.checkpoint}):
        model, _ = mlx_flash.load(store, memory="1GB", predictor="none", **options)
        with closing(model.flash):
            *before, last = mlx_flash.stream_generate(model, endless, PROMPT, TOKENS)
            found = [r.token for r in (*before, last)]
        expected = expected or found
        assert found == expected
        assert (drafts_of(last) is None) == (not options)
    assert drafts_of(last).accepted == drafts_of(last).drafted > 0
    assert expected is not None and EOS not in expected
