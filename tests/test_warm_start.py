"""The units that earlier runs used most are in slots when the next run begins. The text does not change."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import make_mixture, open_streamed  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.loading import store as store_module
from mlx_flash.loading import warm_start as module
from mlx_flash.loading.load import load
from mlx_flash.loading.warm_start import WarmStart
from mlx_flash.source import kept_uses
from mlx_flash.source.cached import entries, remove
from mlx_flash.source.kept_uses import KeptUses
from mlx_flash.text.generation import generate

pytestmark = pytest.mark.usefixtures("one_processor")

EXPERTS = 12
PROMPT = [5, 17, 80]


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_mixture(tmp_path_factory.mktemp("mixture"), "qwen3_moe")
    write_tokenizer(folder)
    return folder


def layers_of(model: Any) -> list[Any]:
    return [layer.mlp.switch_mlp.units for layer in model.model.layers]


def kept_of(mixture: Path) -> KeptUses:
    return KeptUses(mixture, [mixture / "model.safetensors"], "expert", [EXPERTS] * 2)


def speak(model: Any) -> list[int]:
    cache, tokens = make_prompt_cache(model), PROMPT
    said = []
    for _ in range(20):
        chosen: Any = mx.argmax(model(mx.array([tokens]), cache=cache)[0, -1]).item()
        tokens = [chosen]
        said += tokens
    return said


@pytest.mark.parametrize("slots", [4, 6])
def test_the_next_run_begins_with_the_units_that_this_one_used_most(mixture: Path, slots: int) -> None:
    model, streamer = open_streamed(mixture, slots)
    first = WarmStart(layers_of(model), kept_of(mixture))
    first.fill()
    assert streamer.counters.bytes == 0, "nothing is known yet"
    said = speak(model)
    uses = [units.cache.uses() for units in layers_of(model)]
    misses = streamer.counters.misses
    first.close()
    streamer.close()

    model, streamer = open_streamed(mixture, slots)
    steps: list[int] = []
    second = WarmStart(layers_of(model), kept_of(mixture))
    second.fill(steps.append)
    for units, used in zip(layers_of(model), uses, strict=True):
        here = np.flatnonzero(units.slot_of >= 0)
        assert len(here) == slots == units.cache.resident
        assert used[here].min() >= np.delete(used, here).max() * 0.99  # kept with 11 bits
    assert sum(steps) == 2 * slots * layers_of(model)[0].unit_bytes and streamer.counters.misses == 0
    assert speak(model) == said and streamer.counters.misses < misses
    streamer.close()


def test_it_stops_when_its_time_is_over(mixture: Path) -> None:
    kept_of(mixture).write([np.arange(1, EXPERTS + 1).astype(np.float16)] * 2)
    model, streamer = open_streamed(mixture, 8)
    times = iter([0.0, 0.0, 0.0, *[1.0] * 10, *[module.LONGEST_S] * 10])
    start = WarmStart(layers_of(model), kept_of(mixture), lambda: next(times))
    start.fill()
    for units in layers_of(model):
        here = np.flatnonzero(units.slot_of >= 0)
        assert 0 < len(here) < 8 and here[-1] == EXPERTS - 1 and (np.diff(here) == 1).all()  # the hottest come first
    streamer.close()


def test_uses_are_kept_from_time_to_time(mixture: Path) -> None:
    now = [0.0]
    model, streamer = open_streamed(mixture, 8)
    start = WarmStart(layers_of(model), kept_of(mixture), lambda: now[0])
    start.answered()
    now[0] = 2 * module.BETWEEN_WRITES_S
    start.answered()
    assert kept_of(mixture).read() is None, "nothing was used"
    speak(model)
    now[0] = 1.0
    start.answered()
    assert kept_of(mixture).read() is None
    now[0] = module.BETWEEN_WRITES_S
    start.answered()
    first = kept_of(mixture).read()
    assert first is not None and all((uses > 0).any() for uses in first)
    speak(model)
    start.close()
    second = kept_of(mixture).read()
    assert second is not None and any((a != b).any() for a, b in zip(first, second, strict=True))
    streamer.close()


def test_a_window_keeps_no_uses(mixture: Path) -> None:
    model, streamer = open_streamed(mixture, 8, window=4)
    start = WarmStart(layers_of(model), kept_of(mixture))
    speak(model)
    start.close()
    assert kept_of(mixture).read() is None
    streamer.close()


DAMAGES: list[Callable[[bytes], bytes]] = [
    lambda content: b"",
    lambda content: content[:-1],
    lambda content: content + b"\0",
    lambda content: content[:-1] + bytes([content[-1] ^ 1]),
    lambda content: content.replace(b'"expert"', b'"neuron"'),
    lambda content: b"[" * len(content),
    lambda content: content.replace(b'"about"', b"", 1)[1:],
    lambda content: b"\xff" * 70_000,
]


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_a_damaged_file_is_ignored_and_replaced(number: int, mixture: Path, folder_of_its_own: Path) -> None:
    kept, uses = kept_of(mixture), [np.ones(EXPERTS, np.float16)] * 2
    kept.write(uses)
    (path,) = (folder_of_its_own / "uses").iterdir()
    path.write_bytes(DAMAGES[number](path.read_bytes()))
    assert kept.read() is None
    kept.write(uses)
    found = kept.read()
    assert found is not None and np.array_equal(found, uses)


@pytest.mark.parametrize("value", [np.nan, np.inf, -1])
def test_wrong_numbers_are_ignored(value: float, mixture: Path) -> None:
    kept_of(mixture).write([np.full(EXPERTS, value, np.float16)] * 2)
    assert kept_of(mixture).read() is None


def test_other_files_and_shapes_are_other_models(mixture: Path, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"1")
    KeptUses(tmp_path, [file], "expert", [3, 3]).write([np.ones(3, np.float16)] * 2)
    assert KeptUses(tmp_path, [file], "expert", [3, 3]).read() is not None
    assert KeptUses(tmp_path, [file], "expert", [2, 4]).read() is None
    assert KeptUses(tmp_path, [file], "neuron", [3, 3]).read() is None
    os.utime(file, (1, 1))
    assert KeptUses(tmp_path, [file], "expert", [3, 3]).read() is None


def test_the_files_are_few_small_and_without_texts(
    tmp_path: Path, folder_of_its_own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept_uses, "MOST_FILES", 2)
    for name in "abc":
        folder = tmp_path / name
        folder.mkdir()
        (folder / "x").write_bytes(b"1")
        KeptUses(folder, [folder / "x"], "expert", [3]).write([np.ones(3, np.float16)])
    files = list((folder_of_its_own / "uses").iterdir())
    assert len(files) == 2
    head, body = files[0].read_bytes().split(b"\n", 1)
    assert set(json.loads(head)) == {"model", "files", "unit", "counts", "crc32"} and len(body) == 6
    (entry,) = (entry for entry in entries(folder_of_its_own) if entry.kind == "uses of units")
    assert remove(entry) and not (folder_of_its_own / "uses").exists()
    monkeypatch.setattr(kept_uses, "MOST_UNITS", 2)
    KeptUses(folder, [folder / "x"], "expert", [3]).write([np.ones(3, np.float16)])
    assert not (folder_of_its_own / "uses").exists()


def test_a_folder_that_cannot_be_written_is_no_trouble(mixture: Path, folder_of_its_own: Path) -> None:
    folder_of_its_own.write_text("")
    kept_of(mixture).write([np.ones(EXPERTS, np.float16)] * 2)
    assert kept_of(mixture).read() is None


@pytest.mark.parametrize("warm", [True, False])
def test_load_keeps_uses_only_if_it_is_asked_to(
    warm: bool, store: Path, folder_of_its_own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = store_module.make_plan
    monkeypatch.setattr(store_module, "make_plan", lambda *rest: replace(real(*rest), slots=(20, 20)))
    texts = []
    for turn in range(2):
        model, tokenizer = load(store, context=64, warm_start=warm)
        resident = [layer.units.cache.resident for layer in model.flash.layers]
        assert all(resident) if warm and turn == 1 else not any(resident)
        texts.append(generate(model, tokenizer, PROMPT, max_tokens=8))
        model.flash.close()
    assert texts[0] == texts[1] and (folder_of_its_own / "uses").exists() == warm
