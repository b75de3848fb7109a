"""Images beside weights that stay on the disk, and beside drafts, against mlx-vlm's own model in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drafting import Telling  # type: ignore[import-not-found]
from seeing_models import SEEING, make_seeing_model, said_by_mlx_vlm  # type: ignore[import-not-found]
from test_vlm_images import look, picture  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.errors import ImageError
from mlx_flash.loading import in_place_loading, layer_weights, lookup_tables
from mlx_flash.text.drafts import MODEL
from mlx_flash.text.image_prompts import processor_of
from mlx_flash.text.prompt_cache import ReusedPromptCache

pytestmark = [
    pytest.mark.vlm,
    pytest.mark.usefixtures("one_processor"),
    pytest.mark.filterwarnings("ignore"),  # other people's
]
pytest.importorskip("mlx_vlm")

TYPES = [*SEEING, "qwen3_vl_moe"]
TOKENS = 12
CHUNK = 4  # tokens of a prompt that are read at once


@pytest.fixture(autouse=True)
def smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """These models' tensors are short."""
    monkeypatch.setattr(layer_weights, "SHORTEST_TENSOR", 2048)
    monkeypatch.setattr(lookup_tables, "LEAST_BYTES", 0)
    monkeypatch.setattr(lookup_tables, "WORTH", 0)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return functools.cache(lambda model_type: make_seeing_model(tmp_path_factory.mktemp(model_type), model_type))


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Loads a model with so many layers in memory, with one slot for experts, and with its tables' rows read."""
    models = []
    divide = in_place_loading.divide_with_tables

    def load_one(folder: Path, pinned: int, chunks_at_once: int = 1, **options: Any) -> Any:
        def divided(divided: Any, weights: Any, tables: Any, *rest: Any) -> Any:
            plan = divide(divided, weights, tables, *rest)
            slots = tuple(1 for _ in plan.expert_slots)
            return replace(plan, pinned=pinned, expert_slots=slots, reads_rows=bool(tables))

        monkeypatch.setattr(in_place_loading, "divide_with_tables", divided)
        monkeypatch.setattr(
            in_place_loading, "with_spare_for_rows", lambda plan, _: replace(plan, chunks_at_once=chunks_at_once)
        )
        model, tokenizer = mlx_flash.load(folder, images=True, context=600, **options)
        models.append(model)
        return model, tokenizer

    yield load_one
    for model in models:
        model.flash.close()


def text_of(model_type: str) -> str:
    mark = "<|image_pad|>" if model_type.startswith("gemma4") else "<|vision_start|><|image_pad|><|vision_end|>"
    return f"abc{mark}what is it, what is it, what is"


@functools.cache
def expected(folder: Path, model_type: str) -> tuple[list[int], list[int], np.ndarray]:
    """(prompt, tokens, log-probabilities) of mlx-vlm's."""
    return said_by_mlx_vlm(  # type: ignore[no-any-return]
        folder, text_of(model_type), [picture().pixels], chunk_of(model_type), TOKENS
    )


def chunk_of(model_type: str) -> int | None:
    return None if model_type.endswith("at once") else CHUNK


def answer(model: Any, tokenizer: Any, prompt: Any, **options: Any) -> tuple[list[int], np.ndarray, Any]:
    """(tokens, log-probabilities, statistics) of an answer. prompt: from `look`."""
    ids, cache = prompt
    made = list(
        mlx_flash.stream_generate(model, tokenizer, ids, TOKENS, prompt_cache=cache, prefill_step_size=CHUNK, **options)
    )
    return [one.token for one in made], np.stack([np.array(one.logprobs) for one in made]), made[-1].statistics


@pytest.mark.parametrize("pinned", [0, 1])
@pytest.mark.parametrize("model_type", TYPES)
def test_streamed_weights_have_the_bits_of_mlx_vlm(
    folder_of: Callable[[str], Path], load: Callable[..., Any], model_type: str, pinned: int
) -> None:
    folder = folder_of(model_type)
    prompt, tokens, logprobs = expected(folder, model_type)
    model, tokenizer = load(folder, pinned)
    assert len(set(tokens)) > 2
    for _ in range(2):
        seen = look(model, text_of(model_type), [picture()])
        assert seen[0] == prompt
        made, found, statistics = answer(model, tokenizer, seen)
        assert made == tokens and np.array_equal(found, logprobs)
        assert statistics.per_token()["bytes_per_token"] > 0
    assert not np.array_equal(answer(model, tokenizer, look(model, text_of(model_type), [picture(1)]))[1], logprobs)


def test_per_layer_embeddings_are_rows_that_are_read(
    folder_of: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    folder = folder_of("gemma4")
    model, tokenizer = load(folder, 4)
    assert model.flash.plan.reads_rows
    _, tokens, logprobs = expected(folder, "gemma4")
    made, found, statistics = answer(model, tokenizer, look(model, text_of("gemma4"), [picture()]))
    assert made == tokens and np.array_equal(found, logprobs)
    assert statistics.prompt.reads + statistics.decode.reads > 0


@pytest.mark.parametrize("model_type", TYPES)
def test_chunks_that_share_a_reading(
    folder_of: Callable[[str], Path], load: Callable[..., Any], model_type: str
) -> None:
    folder = folder_of(model_type)
    model, tokenizer = load(folder, 0, chunks_at_once=3)
    made, found, _ = answer(model, tokenizer, look(model, text_of(model_type), [picture()]))
    assert made == expected(folder, model_type)[1] and np.array_equal(found, expected(folder, model_type)[2])


@pytest.mark.parametrize("wrong", [10**9, 3, 1])
@pytest.mark.parametrize("model_type", TYPES)
def test_drafts_leave_the_tokens_as_they_are(
    folder_of: Callable[[str], Path], load: Callable[..., Any], model_type: str, wrong: int
) -> None:
    """All right, some wrong, all wrong; the first pass holds the prompt's last token and drafts."""
    folder = folder_of(model_type)
    prompt, tokens, logprobs = expected(folder, model_type)
    model, tokenizer = load(folder, 1)
    model.flash.drafting = Telling(MODEL, model.flash.most_positions, text=prompt + tokens, wrong=wrong)
    made, found, statistics = answer(
        model, tokenizer, look(model, text_of(model_type), [picture()]), num_draft_tokens=3
    )
    assert made == tokens and np.allclose(found, logprobs, atol=1e-3)
    assert (statistics.drafts.accepted > 0) == (wrong > 1) and statistics.drafts.drafted > 0


def test_what_is_seen_of_a_long_prompt_is_in_the_plan(folder_of: Callable[[str], Path]) -> None:
    """Embeddings and per-layer embeddings of all its tokens are held until the last one is read."""
    folder = folder_of("gemma4")
    blind, seeing = (
        [mlx_flash.plan(folder, images=images, context=context).demand.workspace for context in (1024, 2000)]
        for images in (False, True)
    )
    more = (seeing[1] - seeing[0]) - (blind[1] - blind[0])
    assert more >= (2000 - 1024) * (64 + 4 * 32) * 4


def test_a_prompt_that_must_be_read_at_once_and_is_too_long(
    folder_of: Callable[[str], Path], load: Callable[..., Any]
) -> None:
    model, _ = load(folder_of("gemma4 at once"), 1, prefill_chunk=16)
    with pytest.raises(ImageError, match=r"at once, at most 16\. .* a larger --prefill-chunk"):
        look(model, text_of("gemma4 at once"), [picture()])


@pytest.mark.parametrize("kind", ["n-grams", "draft model"])
@pytest.mark.parametrize("model_type", TYPES)
def test_drafts_as_users_load_them(
    folder_of: Callable[[str], Path], load: Callable[..., Any], model_type: str, kind: str
) -> None:
    folder = folder_of(model_type)
    options: dict[str, Any] = {"draft": "ngram"} if kind == "n-grams" else {"draft_model": folder}
    model, tokenizer = load(folder, 1, **options)
    for _ in range(2):
        seen = look(model, text_of(model_type), [picture()])
        made, _, statistics = answer(model, tokenizer, seen, num_draft_tokens=3)
        assert made == expected(folder, model_type)[1]
        assert statistics.drafts.drafted > 0 or kind == "n-grams"  # few n-grams come twice


@pytest.mark.parametrize("model_type", TYPES)
def test_a_second_turn_about_an_image(
    folder_of: Callable[[str], Path], load: Callable[..., Any], model_type: str
) -> None:
    """A turn with images is read from its beginning, whatever the prompt cache holds, and a text after it is not."""
    folder = folder_of(model_type)
    model, tokenizer = load(folder, 1, prompt_cache="20MB")
    turns = ReusedPromptCache(model)

    def turn(text: str) -> list[int]:
        seen = processor_of(model).prompt(text, [picture()])
        made = turns.stream_generate(tokenizer, seen.ids, TOKENS, seen=seen, prefill_step_size=CHUNK)
        return [one.token for one in made]

    first = text_of(model_type)
    assert turn(first) == expected(folder, model_type)[1]
    second = first + tokenizer.decode(expected(folder, model_type)[1]) + "and now"
    _, tokens, _ = said_by_mlx_vlm(folder, second, [picture().pixels], chunk_of(model_type), TOKENS)
    assert turn(second) == tokens and turns.reused == 0
    text = tokenizer.encode("a text " * 20)
    alone = [one.token for one in mlx_flash.stream_generate(model, tokenizer, text, 4, prefill_step_size=CHUNK)]
    assert [one.token for one in turns.stream_generate(tokenizer, text, 4, prefill_step_size=CHUNK)] == alone
    assert turn(second) == tokens
