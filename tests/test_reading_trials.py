"""The options that are tried on a loaded model: the same bits with all of them, and what is kept of them."""

from __future__ import annotations

import functools
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import VOCABULARY, assert_same, make_mixture, open_streamed  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_flash import load
from mlx_flash.flash.inflight import InFlightReads
from mlx_flash.flash.trials import WARM_UP, Trials
from mlx_flash.loading import layer_weights
from mlx_flash.source import kept_trials as kept_module
from mlx_flash.source.kept_trials import KeptTrials, kept_trials
from mlx_flash.text.generation import stream_generate

pytestmark = pytest.mark.usefixtures("one_processor")

PROMPT = [5, 17, 80, 3, 44, 61, 9, 30]
WIDE = {"num_hidden_layers": 5, "intermediate_size": 128}
COMBINATIONS = list(itertools.product((True, False), (True, False), (True, False), (1, 4), (4096, 128 << 10)))


def tokens_of(model: Any, before: Callable[[int], None] = lambda _: None) -> list[np.ndarray]:
    """The logits of a prompt and of single tokens. before: called before each of them."""
    cache = make_prompt_cache(model)
    found = []
    for number, call in enumerate([PROMPT, *([token % 90] for token in range(7, 7 + 5 * len(COMBINATIONS), 5))]):
        before(number)
        found.append(np.array(model(mx.array([call]), cache=cache).astype(mx.float32)))
    return found


def use(streamer: InFlightReads, number: int) -> None:
    """Puts one of all combinations into effect, in a random order."""
    order = random.Random(3).sample(COMBINATIONS, len(COMBINATIONS))
    look_ahead, overlap, direct, threads, pieces = order[number % len(order)]
    streamer.look_ahead, streamer.overlap, streamer.shortest_request = look_ahead, overlap, pieces
    streamer.reader.use_threads(threads)
    assert streamer.read_past_cache(direct) or not streamer.files[0].direct


@pytest.mark.parametrize(
    ("family", "slots", "pinned"), [("qwen3_moe", 4, None), ("qwen3_moe", 1, None), ("llama", 0, 1)]
)
def test_every_combination_has_the_bits_of_mlx_lm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, slots: int, pinned: int | None
) -> None:
    """The choices change at every token, for experts and for layers."""
    monkeypatch.setattr(layer_weights, "SHORTEST_TENSOR", 2048)
    folder = make_mixture(tmp_path / family, family, "4 bits", **({} if slots else WIDE))
    model, streamer = open_streamed(folder, slots, pinned=pinned)
    expected = tokens_of(load_model(folder)[0])
    assert_same(tokens_of(model, functools.partial(use, streamer)), expected, family)
    assert streamer.counters.misses > 0
    streamer.close()


def test_every_combination_has_the_same_bits_for_neurons(store: Path) -> None:
    model, _ = load(store, predictor="lowrank", threads=4, trials=False)
    expected = tokens_of(model)
    assert_same(tokens_of(model, functools.partial(use, model.flash.streamer)), expected, "neurons")
    model.flash.close()


# -- on a loaded model ---------------------------------------------------------------------------------------------


class Recorder(Trials):
    """Notes what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def took(self, rows: int, positions: int, seconds: float, misses: int, resized: bool = False) -> None:
        assert seconds > 0 and misses >= 0
        self.told.append((rows, positions))

    def interrupted(self) -> None:
        self.told.append("prompt")


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    folder = make_mixture(tmp_path / "mixture", "qwen3_moe", "4 bits")
    write_tokenizer(folder, VOCABULARY)
    return folder


def test_passes_are_told_with_their_tokens(mixture: Path) -> None:
    model, tokenizer = load(mixture, draft="ngram", context=64)
    model.flash.trials = recorder = Recorder()
    for drafts in (0, 2):
        list(stream_generate(model, tokenizer, [5, 6, 5, 6, 5, 6, 5], 6, num_draft_tokens=drafts))
    model.flash.close()
    plain, drafted = recorder.told[:7], recorder.told[7:]
    assert plain == ["prompt", *[(1, 1)] * 6]
    assert drafted[0] == "prompt" and {(1, 1)} < set(drafted[1:]) <= {(1, 1), (1, 2), (1, 3)}


def test_options_of_each_kind(mixture: Path, store: Path) -> None:
    model, _ = load(mixture, context=64)
    trials = model.flash.trials
    assert {name: trial.choices for name, trial in trials.items()} == {
        "lookahead": (False, True),
        "overlap": (True, False),
        "io": ("direct", "buffered"),
        "threads": (16, 8, 32),
        "pieces": (128 << 10, 32 << 10, 512 << 10),
    }
    streamer = model.flash.streamer
    for name, trial in trials.items():
        trial.keep(trial.choices[-1])
        assert trials.choices()[name]["choice"] == trial.choices[-1]
    assert (streamer.look_ahead, streamer.overlap, streamer.files[0].direct) == (True, False, False)
    assert (streamer.reader.threads, streamer.shortest_request) == (32, 512 << 10)
    model.flash.close()
    model, _ = load(store, predictor="lowrank", io="buffered", threads=3)
    told = model.flash.trials.choices()
    assert {name: (each["choice"], each["by"]) for name, each in told.items()} == {
        "lookahead": (True, "default"),
        "io": ("buffered", "you"),
        "threads": (3, "you"),
    }
    model.flash.fix_look_ahead(False)
    assert not model.flash.streamer.look_ahead
    model.flash.close()
    model, _ = load(mixture, context=64, trials=False)
    assert not any(trial.open for trial in model.flash.trials.values())
    model.flash.close()


def test_results_are_used_by_the_next_start(mixture: Path) -> None:
    model, _ = load(mixture, context=64)
    trials = model.flash.trials
    while "overlap" not in trials.results()["trials"]:
        trials.took(1, 1, 0.5 if not model.flash.streamer.overlap else 1.0, 3)
    assert not model.flash.streamer.overlap
    model.flash.close()
    model, _ = load(mixture, context=64)
    assert not model.flash.streamer.overlap and model.flash.trials.choices()["overlap"]["by"] == "trial"
    model.flash.close()
    model, _ = load(mixture, context=64, trials=False)
    assert model.flash.streamer.overlap
    model.flash.close()
    os.utime(next(mixture.glob("*.safetensors")))
    model, _ = load(mixture, context=64)
    assert model.flash.streamer.overlap
    model.flash.close()


# -- what is kept --------------------------------------------------------------------------------------------------

RESULTS = {"trials": {"io": {"choice": "buffered"}}, "unfinished": {}}


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    made = [tmp_path / "model" / name for name in ("a.safetensors", "b.safetensors")]
    for path in made:
        path.write_bytes(b"abc")
    yield made


def kept(files: list[Path], share: float = 0.3, device: str = "gpu") -> KeptTrials:
    return KeptTrials(files[0].parent, files, share, device)


def the_file(files: list[Path]) -> Path:
    return next((files[0].parents[1] / "cache" / "trials").iterdir())


def test_results_are_kept_by_budget(files: list[Path]) -> None:
    assert kept(files).read() == {} and kept_trials() == []
    kept(files).write(RESULTS)
    kept(files, 1.0).write({"trials": {}})
    assert kept(files, 0.26).read() == RESULTS and kept(files, 1.0).read() == {"trials": {}}
    assert kept(files, 0.24).read() == {}
    (told,) = kept_trials()
    assert told["about"]["model"] == str(files[0].parent) and told["same_machine"]
    assert told["budgets"] == {"2": RESULTS, "8": {"trials": {}}}
    assert [path.name for path in the_file(files).parent.iterdir()] == [the_file(files).name]


@pytest.mark.parametrize("change", ["size", "time", "device", "machine", "mlx", "disk"])
def test_other_conditions_drop_them(files: list[Path], monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    kept(files).write(RESULTS)
    if change == "size":
        files[1].write_bytes(b"abcd")
    elif change == "time":
        os.utime(files[1], (1, 1))
    elif change == "machine":
        monkeypatch.setattr(kept_module.os, "cpu_count", lambda: 999)
    elif change == "mlx":
        monkeypatch.setattr(kept_module, "version", lambda _: "99.0")
    elif change == "disk":
        monkeypatch.setattr(kept_module.psutil, "disk_partitions", lambda all: [])
    device = "cpu" if change == "device" else "gpu"
    assert kept(files, device=device).read() == {}
    assert [each["same_machine"] for each in kept_trials()] == [change not in ("machine", "mlx")]
    kept(files, device=device).write({"trials": {}})
    (told,) = kept_trials()
    assert told["budgets"] == {"2": {"trials": {}}}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"[" * 100_000, b'{"about": 3, "budgets": []}', b"\xff", None])
def test_damaged_files_are_replaced(files: list[Path], content: bytes | None) -> None:
    kept(files).write(RESULTS)
    path = the_file(files)
    path.unlink()
    if content is None:
        os.mkfifo(path)
    else:
        path.write_bytes(content)
    assert kept(files).read() == {} and kept_trials() == []
    kept(files).write(RESULTS)
    assert kept(files).read() == RESULTS


def test_a_folder_whose_name_is_not_unicode(files: list[Path]) -> None:
    folder = files[0].parent / os.fsdecode(b"model \xff")
    folder.mkdir()
    (folder / "weights").write_bytes(b"abc")
    odd = KeptTrials(folder, [folder / "weights"], 0.25, "gpu")
    odd.write(RESULTS)
    assert odd.read() == RESULTS


def test_a_folder_that_cannot_be_written_to_is_no_error(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    (files[0].parents[1] / "cache").mkdir()
    (files[0].parents[1] / "cache" / "trials").write_text("a file in the way")
    kept(files).write(RESULTS)
    assert kept(files).read() == {} and kept_trials() == []
    gone = KeptTrials(files[0].parent, [files[0].with_name("gone")], 0.5, "gpu")
    gone.write(RESULTS)
    assert gone.read() == {}


def test_a_full_disk_leaves_the_old_file(files: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    kept(files).write(RESULTS)

    def full(path: Path, _: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        kept(files).write({"trials": {}})
    assert kept(files).read() == RESULTS
    assert len(list(the_file(files).parent.iterdir())) == 1


def test_listing_them_is_quick() -> None:
    code = "import sys; from mlx_flash.source.kept_trials import kept_trials; kept_trials(); "
    code += "print([name for name in ('mlx', 'numpy', 'mlx_lm') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.replace("'", '"')) == []


def test_trials_begin_after_the_warm_up_where_units_are_read(mixture: Path) -> None:
    model, tokenizer = load(mixture, context=256)
    counters = model.flash.streamer.counters
    list(stream_generate(model, tokenizer, PROMPT, WARM_UP + 4))
    assert (counters.misses, model.flash.trials.choices()["lookahead"]["trying"]) == (0, False)  # all was read at load
    took = model.flash.trials.took
    model.flash.trials.took = lambda *pass_: took(*pass_[:3], 1)
    list(stream_generate(model, tokenizer, PROMPT, WARM_UP + 4))
    assert model.flash.trials.trying == "lookahead"
    model.flash.close()
