"""Drafts of a checkpoint's own head: the same text, whatever the head says; the right states; the memory."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import make_sampler
from own_heads import HEADS, make_with_head  # type: ignore[import-not-found]  # found beside this file
from test_ranked_loading import group_of  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.errors import BudgetError
from mlx_flash.loading import in_place_loading, layer_weights
from mlx_flash.loading.plan import ENDLESS, RUN_TO_RUN_BYTES
from mlx_flash.text.draft_head import DraftHead, HeadDrafter
from mlx_flash.text.drafts import HEAD, Drafting
from mlx_flash.text.rewinding import Rewinder

pytestmark = [
    pytest.mark.vlm,
    pytest.mark.usefixtures("one_processor"),
    pytest.mark.filterwarnings("ignore"),  # other people's
]
pytest.importorskip("mlx_vlm")

PROMPT = [5, 17, 80, 3, 44, 61, 9, 30, 72, 1, 55, 2, 21, 40, 33, 12]
TOKENS = 20
CONTEXT = 600


@pytest.fixture(scope="module")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    @functools.cache
    def make(model_type: str, quantisation: str = "plain", **options: Any) -> Path:
        return make_with_head(tmp_path_factory.mktemp(model_type), model_type, quantisation, **options)

    return make


@pytest.fixture(autouse=True)
def small_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a budget decides how much of a tiny model is in memory."""
    monkeypatch.setattr(in_place_loading, "process_bytes", lambda: 1_000_000)
    monkeypatch.setattr(layer_weights, "SHORTEST_TENSOR", 2048)


@contextmanager
def loaded(folder: Path, **options: Any) -> Iterator[tuple[Any, Any]]:
    model, tokenizer = mlx_flash.load(folder, context=CONTEXT, **options)
    tokenizer.eos_token_ids = [-1]
    try:
        yield model, tokenizer
    finally:
        model.flash.close()


def said(model: Any, tokenizer: Any, prompt: list[int] = PROMPT, **options: Any) -> tuple[list[int], Any]:
    """The tokens, and the last response's statistics."""
    mx.random.seed(11)
    responses = list(mlx_flash.stream_generate(model, tokenizer, prompt, max_tokens=TOKENS, **options))
    return [response.token for response in responses], responses[-1].statistics


def smallest_budget(folder: Path) -> int:
    """The smallest budget with the head, to 30 kB."""
    enough = mlx_flash.plan(folder, context=CONTEXT, memory=ENDLESS, draft="mtp").smallest - RUN_TO_RUN_BYTES
    too_little = enough - 10**6
    while enough - too_little > 30_000:
        middle = (enough + too_little) // 2
        try:
            mlx_flash.plan(folder, context=CONTEXT, memory=middle, draft="mtp")
            enough = middle
        except BudgetError:
            too_little = middle
    return enough


@pytest.mark.parametrize("quantisation", ["plain", "4 bits"])
@pytest.mark.parametrize("model_type", HEADS)
def test_the_text_is_that_without_drafts(
    checkpoint_of: Callable[..., Path], model_type: str, quantisation: str
) -> None:
    """Greedy and sampled, with few units in memory and with all of them."""
    folder, sampler = checkpoint_of(model_type, quantisation), make_sampler(0.9, top_p=0.95)
    read = []
    for memory in (smallest_budget(folder), 4 * 10**9):
        with loaded(folder, memory=memory, draft="mtp") as (model, tokenizer):
            assert model.flash.most_positions <= 8  # DeepSeek V4 computes other numbers for more tokens at once
            greedy, statistics = said(model, tokenizer, num_draft_tokens=0)
            read.append(statistics.decode.bytes)
            sampled = said(model, tokenizer, num_draft_tokens=0, sampler=sampler)[0]
            for depth in (1, 4):
                found, statistics = said(model, tokenizer, num_draft_tokens=depth)
                assert found == greedy and statistics.drafts.kind == "mtp" and statistics.drafts.drafted > 0
            assert said(model, tokenizer, num_draft_tokens=3, sampler=sampler)[0] == sampled
    assert read[0] > read[1]
    with loaded(folder) as (model, tokenizer):
        assert said(model, tokenizer)[0] == greedy


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_5_moe"])
def test_a_checkpoint_as_it_is_published(checkpoint_of: Callable[..., Path], model_type: str) -> None:
    folder = checkpoint_of(model_type, published=True)
    with loaded(folder) as (model, tokenizer):  # by mlx-lm
        expected = said(model, tokenizer)[0]
    with loaded(folder, memory=smallest_budget(folder), draft="mtp") as (model, tokenizer):
        found, statistics = said(model, tokenizer, num_draft_tokens=3)
        assert found == expected and statistics.drafts.drafted > 0 and statistics.decode.bytes > 0


@pytest.mark.parametrize("model_type", ["deepseek_v4", "qwen3_5_moe", "qwen4_exp"])
def test_the_text_is_the_same_over_ranks(checkpoint_of: Callable[..., Path], model_type: str) -> None:
    """Rank 0 has the head."""
    folder, found = checkpoint_of(model_type), []
    with group_of([None], [None]) as group:
        for ranks in (None, group):
            with loaded(folder, memory=4 * 10**9, draft="mtp", group=ranks) as (model, tokenizer):
                tokens, statistics = said(model, tokenizer, num_draft_tokens=3)
                found.append(tokens)
                assert statistics.drafts.drafted > 0
        assert group.calls_made
    assert found[0] == found[1]


class Knowing:
    """A head that knows the text. It has no weights, and counts the pairs that it is shown."""

    def __init__(self, text: list[int], cache: Callable[[], list[Any]]) -> None:
        self.text, self.make_cache, self.seen = text, cache, 0

    def reset(self, target: Any) -> list[Any]:
        self.seen = 0
        return self.make_cache()

    def prefill_from_target_hidden(self, tokens: mx.array, states: mx.array, token: int, choose: Any) -> None:
        assert tokens.shape[1] == states.shape[1]
        self._see([*np.array(tokens[0])[1:].tolist(), token])

    def accept_verified_tokens(
        self, states: mx.array, tokens: mx.array, accepted: int, new: list[int], choose: Any
    ) -> None:
        if new:
            assert states.shape[1] == accepted + 1 == tokens.shape[1] + 1
            self._see([*np.array(tokens[0]).tolist(), *new])

    def _see(self, tokens: list[int]) -> None:
        assert self.text[self.seen + 1 :][: len(tokens)] == tokens
        self.seen += len(tokens)

    def draft_block(self, token: int, states: mx.array, cache: None, size: int, choose: Any) -> mx.array:
        return mx.array([self.text[self.seen + 1 :][: size - 1]])

    def draft_eval_state(self) -> list[Any]:
        return []


@pytest.mark.parametrize("model_type", HEADS)
def test_drafts_that_are_right_are_accepted(checkpoint_of: Callable[..., Path], model_type: str) -> None:
    folder = checkpoint_of(model_type)
    with loaded(folder, memory="4GB", draft="mtp") as (model, tokenizer):
        expected = said(model, tokenizer, num_draft_tokens=0)[0]
        head = DraftHead(Knowing([*PROMPT, *expected], lambda: []), model)
        model.states = head.states
        model.flash.drafting = Drafting(HEAD, model.flash.most_positions, head)
        for depth in (1, 3, 7):
            found, statistics = said(model, tokenizer, num_draft_tokens=depth)
            assert found == expected and statistics.drafts.accepted == statistics.drafts.drafted > TOKENS // 3


@pytest.mark.parametrize("model_type", [name for name in HEADS if name != "deepseek_v4"])  # whose window is short
def test_the_head_drafts_as_if_it_had_seen_the_text_at_once(
    checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    """Whatever was accepted, taken back, or fed again between two drafts."""
    propose, compared = HeadDrafter.propose, []

    def proposing(drafter: HeadDrafter, count: int) -> list[int]:
        found = propose(drafter, count)
        other = HeadDrafter(drafter.source, drafter.sampler, drafter.vocabulary, drafter.cache)
        other.add(drafter._text)
        other._first = drafter._first
        drafter.source.user, head = None, drafter.source.head
        begun, drafter.source.head = head, copy.copy(head)
        assert propose(other, count) == found
        drafter.source.user, drafter.source.head = drafter, begun
        compared.append(found)
        return found

    with loaded(checkpoint_of(model_type), memory="4GB", draft="mtp") as (model, tokenizer):
        expected = said(model, tokenizer, num_draft_tokens=0)[0]
        monkeypatch.setattr(HeadDrafter, "propose", proposing)
        assert said(model, tokenizer, num_draft_tokens=3)[0] == expected
    assert len(compared) > TOKENS // 3 and all(compared)
    assert len({tuple(drafts) for drafts in compared}) > 3


def test_a_prompt_in_the_cache_and_an_answer_in_between(checkpoint_of: Callable[..., Path]) -> None:
    """The states of another cache are not taken for those of this one."""
    with loaded(checkpoint_of("qwen3_5_moe"), memory="4GB", draft="mtp") as (model, tokenizer):
        cache = make_prompt_cache(model)
        first = said(model, tokenizer, prompt_cache=cache, num_draft_tokens=3)[0]
        said(model, tokenizer, [9, 8, 7, 6], num_draft_tokens=3)
        again, statistics = said(model, tokenizer, [first[-1]], prompt_cache=cache, num_draft_tokens=3)
        assert statistics.drafts.drafted > 0
        whole = make_prompt_cache(model)
        assert said(model, tokenizer, prompt_cache=whole, num_draft_tokens=0)[0] == first
        assert said(model, tokenizer, [first[-1]], prompt_cache=whole, num_draft_tokens=0)[0] == again


@pytest.mark.parametrize("model_type", HEADS)
def test_the_head_begins_again_when_its_cache_is_full(
    checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    monkeypatch.setattr("mlx_flash.text.draft_head.MOST_TOKENS", 12)
    with loaded(checkpoint_of(model_type), memory="4GB", draft="mtp") as (model, tokenizer):
        source = model.flash.drafting.model
        resets, reset = [], source.head.reset

        def counted(target: Any) -> Any:
            resets.append(target)
            return reset(target)

        source.head.reset = counted
        expected = said(model, tokenizer, num_draft_tokens=0)[0]
        found, statistics = said(model, tokenizer, num_draft_tokens=2)
        assert found == expected and len(resets) > 2 and statistics.drafts.drafted > TOKENS // 2


@pytest.mark.parametrize("quantisation", ["plain", "4 bits"])
@pytest.mark.parametrize("model_type", HEADS)
def test_the_plan_counts_the_head(
    checkpoint_of: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, model_type: str, quantisation: str
) -> None:
    """Its weights, the hidden states, its KV cache, and what it takes to begin again."""
    folder = checkpoint_of(model_type, quantisation)
    plain, planned = (mlx_flash.plan(folder, context=CONTEXT, memory="4GB", draft=draft) for draft in ("none", "mtp"))
    assert plain.demand.drafts == 0 and "the checkpoint's own head" in planned.describe()
    weights = (folder / "head.safetensors").stat().st_size
    propose, taken = HeadDrafter.propose, []

    def measured(drafter: HeadDrafter, count: int) -> list[int]:
        before = mx.get_active_memory()
        mx.reset_peak_memory()
        found = propose(drafter, count)
        taken.append(mx.get_peak_memory() - before)
        return found

    with loaded(folder, memory="4GB", draft="mtp") as (model, tokenizer):
        monkeypatch.setattr(HeadDrafter, "propose", measured)
        said(model, tokenizer, list(range(90)) * 6, num_draft_tokens=3)
        states = model.flash.drafting.model.states
        kept = states.between(states.begin, states.end).nbytes
    assert max(taken) > 0 and weights + kept + max(taken) < planned.demand.drafts


def test_a_pool_that_fills_up_in_a_pass_is_put_back(checkpoint_of: Callable[..., Path]) -> None:
    """DeepSeek V4's pool of 128 tokens says that it can be trimmed until it is full."""
    with loaded(checkpoint_of("deepseek_v4"), memory="4GB") as (model, _):

        def fed(cache: list[Any], tokens: list[int]) -> np.ndarray:
            logits = model(mx.array([tokens]), cache=cache)
            mx.eval(logits, [layer.state for layer in cache])
            return np.array(logits)

        one, other = make_prompt_cache(model), make_prompt_cache(model)
        for cache in (one, other):
            fed(cache, [*PROMPT * 8][:126])
        rewinder = Rewinder(one)
        rewinder.mark()
        fed(one, [7, 8, 9, 10])
        assert rewinder.rewind(4, 0) == 0
        for tokens in ([3, 4], [5, 6, 7]):
            assert np.array_equal(fed(one, tokens), fed(other, tokens))
