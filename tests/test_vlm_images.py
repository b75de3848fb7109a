"""Prompts with images against mlx-vlm's own model and way of reading them, whatever the budget."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from seeing_models import said_by_mlx_vlm  # type: ignore[import-not-found]
from test_ranked_loading import group_of  # type: ignore[import-not-found]
from vlm_mixtures import make_seeing_mixture  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.errors import ImageError, UsageError
from mlx_flash.loading import in_place_loading
from mlx_flash.text.image_prompts import ImageProcessor, processor_of, see
from mlx_flash.text.images import Picture
from mlx_flash.text.prompt_cache import ReusedPromptCache

pytestmark = [
    pytest.mark.vlm,
    pytest.mark.usefixtures("one_processor"),
    pytest.mark.filterwarnings("ignore"),  # other people's
]
pytest.importorskip("mlx_vlm")
Image = pytest.importorskip("PIL.Image")

TEXT = "abc<|vision_start|><|image_pad|><|vision_end|>what is it"
TOKENS = 6


def look(model: Any, text: str, pictures: list[Picture]) -> tuple[list[int], list[Any]]:
    prompt = processor_of(model).prompt(text, pictures)
    return prompt.ids, see(model, prompt)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_seeing_mixture(tmp_path_factory.mktemp("seeing"))


def picture(seed: int = 0, size: tuple[int, int] = (30, 40)) -> Picture:
    numbers = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Picture(Image.fromarray(numbers))


@pytest.fixture
def load(folder: Path) -> Iterator[Any]:
    models = []

    def open_one(**options: Any) -> Any:
        model, tokenizer = mlx_flash.load(folder, images=True, context=600, **options)
        models.append(model)
        return model, tokenizer

    yield open_one
    for model in models:
        model.flash.close()


def spoken(model: Any, tokenizer: Any, prompt: Any, cache: Any = None, **options: Any) -> tuple[list[int], np.ndarray]:
    """(tokens, log-probabilities (TOKENS, V)) of an answer."""
    made = list(
        mlx_flash.stream_generate(model, tokenizer, prompt, TOKENS, prompt_cache=cache, prefill_step_size=4, **options)
    )
    return [one.token for one in made], np.stack([np.array(one.logprobs) for one in made])


def test_the_zoo_s_own_numbers(folder: Path, load: Any) -> None:
    """The prompt is read in pieces here, and at once there; the decode path's bits are the zoo's."""
    _, tokens, logprobs = said_by_mlx_vlm(folder, TEXT, [picture().pixels], 4, TOKENS)
    model, tokenizer = load()
    made, found_logits = spoken(model, tokenizer, *look(model, TEXT, [picture()]))
    assert made == tokens
    assert np.array_equal(found_logits, logprobs)


def test_the_same_over_ranks(load: Any) -> None:
    """Rank 0 has the vision part, and the other one a share of the text model's experts."""
    model, tokenizer = load()
    expected = spoken(model, tokenizer, *look(model, TEXT, [picture()]))
    with group_of([None], [None]) as group:
        shared, _ = load(group=group)
        found = spoken(shared, tokenizer, *look(shared, TEXT, [picture()]))
        shared.flash.close()
    assert found[0] == expected[0] and np.array_equal(found[1], expected[1]) and group.calls_made


def test_the_same_at_every_budget_and_another_for_another_image(load: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also beside a text and another image that are read meanwhile: each conversation has its own positions."""
    model, tokenizer = load()
    reference = spoken(model, tokenizer, *look(model, TEXT, [picture()]))
    text = spoken(model, tokenizer, "what is it now")
    other = spoken(model, tokenizer, *look(model, TEXT, [picture(1)]))
    assert not np.array_equal(other[1], reference[1])
    divide = in_place_loading.divide_with_tables
    monkeypatch.setattr(in_place_loading, "divide_with_tables", lambda *a: replace(divide(*a), expert_slots=(1, 2)))
    small, _ = load()
    assert sorted(layer.units.cache.slots for layer in small.flash.layers) == [1, 2]
    for one in (small, model):
        first = look(one, TEXT, [picture()])
        second = look(one, TEXT, [picture(1)])
        for found, wanted in [
            (spoken(one, tokenizer, "what is it now"), text),
            (spoken(one, tokenizer, *second), other),
            (spoken(one, tokenizer, *first), reference),
        ]:
            assert found[0] == wanted[0] and np.array_equal(found[1], wanted[1])


def test_a_quantised_context(load: Any) -> None:
    """mlx-vlm has a class of its own for it. With 8 bits the numbers change a little."""
    model, tokenizer = load()
    reference = spoken(model, tokenizer, *look(model, TEXT, [picture()]))
    quantised, _ = load(kv_bits=8)
    assert "8 bits" in quantised.flash.plan.describe()
    assert quantised.flash.plan.demand.kv_cache < model.flash.plan.demand.kv_cache
    found = spoken(quantised, tokenizer, *look(quantised, TEXT, [picture()]))
    assert 0 < np.abs(found[1] - reference[1])[0].max() < 0.1


def test_two_conversations_in_turns(load: Any) -> None:
    model, tokenizer = load()
    alone = [spoken(model, tokenizer, *look(model, TEXT, [picture(seed)]))[0] for seed in (0, 1)]
    streams = [
        mlx_flash.stream_generate(model, tokenizer, ids, TOKENS, prompt_cache=cache, prefill_step_size=4)
        for ids, cache in (look(model, TEXT, [picture(seed)]) for seed in (0, 1))
    ]
    made: list[list[int]] = [[], []]
    for _ in range(TOKENS):
        for stream, tokens in zip(streams, made, strict=True):
            tokens.append(next(stream).token)
    assert made == alone


def test_two_images(load: Any) -> None:
    model, tokenizer = load()
    both = look(model, TEXT + "and" + TEXT, [picture(), picture(1, (20, 60))])
    ids = both[0]
    assert ids.count(89) > 4
    assert spoken(model, tokenizer, *both)[0]


def test_marks_and_images_that_do_not_match(load: Any) -> None:
    model, _ = load()
    with pytest.raises(ImageError, match="cannot use"):
        look(model, "no place for it", [picture()])


def test_a_prompt_that_is_too_long(load: Any) -> None:
    model, _ = load()
    with pytest.raises(UsageError, match=r"those of its images included, and the plan has room for 600"):
        look(model, TEXT + "a" * 700, [picture()])


def test_without_its_vision_part(folder: Path) -> None:
    model, _ = mlx_flash.load(folder, context=64)
    with pytest.raises(ImageError, match="--images"):
        look(model, TEXT, [picture()])
    model.flash.close()


def test_what_cannot_look(tmp_path: Path, tiny: Any) -> None:
    with pytest.raises(UsageError, match="is not a model that reads images"):
        mlx_flash.load(tiny.store, images=True)


def test_the_vision_part_is_in_the_plan(folder: Path) -> None:
    blind, seeing = (mlx_flash.plan(folder, images=images, context=64) for images in (False, True))
    assert seeing.demand.resident > blind.demand.resident
    assert "the vision part" in seeing.describe() and "the vision part" not in blind.describe()


def test_the_prompts_that_wait_in_a_server_are_in_the_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def workspace(waiting: int) -> int:
        monkeypatch.setattr(in_place_loading, "MOST_WAITING", waiting)
        return int(mlx_flash.plan(folder, images=True, context=64).demand.workspace)

    pixels = ImageProcessor(folder).largest()["pixel_values"].nbytes
    assert workspace(3) - workspace(1) >= 2 * pixels


def test_generate(folder: Path, tmp_path: Path) -> None:
    paths = []
    for seed in range(2):
        paths.append(str(tmp_path / f"{seed}.png"))
        picture(seed).pixels.save(paths[-1])
    command = [sys.executable, "-m", "mlx_flash.generate", "--model", str(folder), "--prompt", "what", "--json"]
    command += ["--max-tokens", "4", "--context", "200"]
    texts = []
    for chosen in (paths[:1], paths[1:], paths):
        more = [word for path in chosen for word in ("--image", path)]
        done = subprocess.run([*command, *more], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        texts.append(json.loads(done.stdout.splitlines()[-1]))
    assert texts[2]["prompt_tokens"] > texts[0]["prompt_tokens"] > 4
    (tmp_path / "text.png").write_text("not an image")
    done = subprocess.run(
        [*command, "--image", str(tmp_path / "text.png")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2 and "is not a known image" in done.stderr


def test_chat(folder: Path, tmp_path: Path) -> None:
    """Every turn is read with the images of the turns before it."""
    picture().pixels.save(tmp_path / "0.png")
    picture(1).pixels.save(tmp_path / "1.png")
    command = [sys.executable, "-m", "mlx_flash.chat", "--model", str(folder), "--max-tokens", "4", "--context", "300"]
    lines = (
        f"/image {tmp_path / '0.png'}\nwhat\nand\n/image {tmp_path / '1.png'}\nso\n/image {folder / 'config.json'}\n"
    )

    def ran(*more: str, asked: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *more], input=asked, capture_output=True, text=True, timeout=300)

    done = ran("--images", asked=lines)
    assert done.returncode == 2 and "config.json begins with" in done.stderr
    assert "your next message is about 1 image" in done.stderr
    given = ran("--image", str(tmp_path / "0.png"), asked="what\nand\n")
    assert given.returncode == 0 and len(given.stdout.splitlines()) == 2
    assert done.stdout.splitlines()[:2] == given.stdout.splitlines()
    assert (
        ran("--image", str(tmp_path / "1.png"), asked="what\n").stdout.splitlines()[0] != given.stdout.splitlines()[0]
    )
    blind = ran(asked=f"/image {tmp_path / '0.png'}\nwhat\n")
    assert blind.returncode == 2 and "Start with --images" in blind.stderr


def test_a_conversation_with_other_images_reuses_nothing(load: Any) -> None:
    model, tokenizer = load(prompt_cache="20MB")
    turns = ReusedPromptCache(model)
    seen = [processor_of(model).prompt(TEXT, [picture(seed)]) for seed in (0, 1)]
    assert seen[0].ids == seen[1].ids

    def answer(number: int) -> list[int]:
        made = turns.stream_generate(tokenizer, seen[number].ids, 6, seen=seen[number])
        return [one.token for one in made]

    first, second = answer(0), answer(1)
    assert turns.reused == 0 and turns.tokens == []
    assert first != second and answer(0) == first
    text = [one.token for one in turns.stream_generate(tokenizer, seen[0].ids, 6)]
    assert text not in (first, second) and turns.reused == 0
