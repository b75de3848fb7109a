"""Neurons over several ranks: the tokens of one machine, whoever holds which neurons in how many slots."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import Tiny  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from ranks_double import ThreadRank, failing_wait, ranks_as_threads, without_last_row  # type: ignore[import-not-found]
from slow_cases import others  # type: ignore[import-not-found]
from test_mixture import everything as everything_of_a_mixture  # type: ignore[import-not-found]
from test_neurons import GREEDY_TOKENS, PROMPT, TOLERANCE, everything, greedy  # type: ignore[import-not-found]

from mlx_flash.errors import FlashError, ReadError
from mlx_flash.flash.files import Manifest, read_manifest
from mlx_flash.flash.neurons import NeuronFile, NeuronSlots
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.layers.lookahead import LookAhead
from mlx_flash.layers.ranked_neurons import AHEAD, ALL, SOME
from mlx_flash.loading import neuron_ranks
from mlx_flash.loading.neuron_ranks import DividedNeurons
from mlx_flash.loading.other_rank import register
from mlx_flash.ranks.group import Handlers
from mlx_flash.source.children import child_environment

pytestmark = pytest.mark.usefixtures("one_processor")

CASES = [("float32", "lowrank"), ("4 bits", "shadow"), ("gated 8 bits", "exact"), ("bfloat16", "none")]
SLOW_CASES = [
    (name, predictor)
    for name in ("float32", "bfloat16", "4 bits", "gated 8 bits")
    for predictor in ("none", "exact", "lowrank", "shadow")
]
SHARES = (([1, 3, 2], 9), ([3, 1, 1, 1], 1000))  # the ranks' shares, and the most slots of each layer


@contextmanager
def threads(size: int) -> Iterator[ThreadRank]:
    """Rank 0's group."""
    loading = threading.Lock()  # Loading changes settings of the process.

    def prepare(group: ThreadRank, handlers: Handlers) -> None:
        register(group, handlers)
        for name, answer in list(handlers.questions.items()):

            def answered(value: Any, answer: Any = answer) -> Any:
                with loading:
                    return answer(value)

            handlers.questions[name] = answered

    with ranks_as_threads(size, prepare) as group:
        yield group


@pytest.fixture
def ranked(open_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """A context with (model, rank 0's group). weights: the ranks' shares. slots: the most of each layer and rank."""

    @contextmanager
    def made(store: Path, weights: list[int], slots: int, **options: Any) -> Iterator[tuple[Any, ThreadRank]]:
        def divide(units: int, _: object) -> list[float]:
            return [units * weight / sum(weights) for weight in weights]

        def slots_of(self: DividedNeurons, rank: int, total: int) -> tuple[int, ...]:
            return (min(slots, len(self.of(rank))),) * len(self.need)

        monkeypatch.setattr(neuron_ranks, "units_of_ranks", divide)
        monkeypatch.setattr(DividedNeurons, "slots", slots_of)
        with threads(len(weights)) as group:
            model = open_model(store, group=group, **options)
            try:
                yield model, group
            finally:
                model.flash.close()

    return made


@pytest.mark.parametrize(("name", "predictor"), others([*CASES, *SLOW_CASES], CASES))
def test_the_tokens_of_one_machine(
    tiny_of: Callable[[str], Tiny], open_model: Any, ranked: Any, name: str, predictor: str
) -> None:
    """In calls of every form: prompts, tokens, a few at once and batches."""
    store = tiny_of(name).store
    alone = open_model(store, predictor=predictor)
    expected, ids = everything(alone), greedy(alone, PROMPT, GREEDY_TOKENS)[0]
    for weights, slots in SHARES:
        with ranked(store, weights, slots, predictor=predictor) as (model, group):
            for a, b in zip(everything(model), expected, strict=True):
                assert np.allclose(a, b, atol=TOLERANCE), (weights, slots)
            assert greedy(model, PROMPT, GREEDY_TOKENS)[0] == ids
            held = [layer.units.count for layer in model.flash.layers]
            assert max(held) < read_manifest(store).layout.blocks * weights[0] / sum(weights) + 1
            purposes = {numbers["purpose"] for _, numbers in group.calls_made}
            assert purposes - {AHEAD} == ({ALL} if predictor == "none" else {ALL, SOME})


def test_the_bits_depend_on_the_shares_alone(tiny: Tiny, ranked: Any) -> None:
    found = []
    for slots in (3, 40, 1000):
        with ranked(tiny.store, [2, 1, 1], slots) as (model, _):
            found.append(everything(model))
    for others_found in found[1:]:
        assert all(np.array_equal(a, b) for a, b in zip(others_found, found[0], strict=True))


def test_a_token_of_rank_0s_own_neurons_is_not_sent(tiny: Tiny, ranked: Any) -> None:
    with ranked(tiny.store, [1, 1], 1000) as (model, group):
        layer = model.flash.layers[0]
        layer.predictor = lambda x: (mx.arange(512)[None] < 7, None)
        assert layer(mx.ones((1, 1, 64))).shape == (1, 1, 64)
        layer.predictor = lambda x: (mx.arange(512)[None] > 511, None)
        assert layer(mx.ones((1, 1, 64))).shape == (1, 1, 64)
        assert not group.calls_made
        layer.predictor = lambda x: (mx.arange(512)[None] > 504, None)
        assert layer(mx.ones((1, 1, 64))).shape == (1, 1, 64)
        assert [numbers["purpose"] for _, numbers in group.calls_made] == [SOME]


def test_guesses_are_read_by_the_ranks_that_hold_them(
    tiny: Tiny, open_model: Any, ranked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(open_model(tiny.store, predictor="lowrank"), PROMPT, GREEDY_TOKENS)[0]
    monkeypatch.setattr(LookAhead, "guess", lambda self, x: self._score(x))  # also where most guesses were wrong
    read: dict[int, int] = {}
    prefetch = NeuronSlots.prefetch

    def noting(units: NeuronSlots, ids: np.ndarray) -> None:
        assert len(ids) == 0 or 0 <= ids.min() <= ids.max() < units.neurons
        read[units.first_neuron] = read.get(units.first_neuron, 0) + len(ids)
        prefetch(units, ids)

    monkeypatch.setattr(NeuronSlots, "prefetch", noting)
    with ranked(tiny.store, [1, 1], 60, predictor="lowrank") as (model, group):
        assert greedy(model, PROMPT, GREEDY_TOKENS)[0] == expected
        assert AHEAD in {numbers["purpose"] for _, numbers in group.calls_made}
    assert set(read) == {0, 256} and all(read.values())


def test_a_failed_read_of_rank_0_leaves_the_ranks_in_step(tiny: Tiny, ranked: Any) -> None:
    with ranked(tiny.store, [1, 1], 20) as (model, _):
        expected = everything(model)
        reader = model.flash.streamer.reader
        for number in (0, 1, 12):
            with failing_wait(reader, number), pytest.raises(ReadError, match="injected"):
                everything(model)
            assert all(np.array_equal(a, b) for a, b in zip(everything(model), expected, strict=True))


def test_a_failed_read_of_another_rank_leaves_the_ranks_in_step(
    tiny: Tiny, ranked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ranked(tiny.store, [1, 1], 20) as (model, _):
        expected = everything(model)
        own, wait = model.flash.streamer.reader, Reader.wait

        def wait_or_fail(reader: Reader, ticket: Any) -> Any:
            report = wait(reader, ticket)
            if reader is not own:
                raise ReadError("injected")
            return report

        with monkeypatch.context() as patched:
            patched.setattr(Reader, "wait", wait_or_fail)
            with pytest.raises(FlashError, match="rank 1: injected"):
                mx.eval(model(mx.array([PROMPT]), cache=make_prompt_cache(model)))
        assert all(np.array_equal(a, b) for a, b in zip(everything(model), expected, strict=True))


def test_a_file_that_changes_under_another_rank_ends_the_token(
    tiny: Tiny, ranked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = tmp_path / "store"
    shutil.copytree(tiny.store, store)
    with ranked(store, [1, 1], 1000, predictor="lowrank") as (model, group):
        token, cache = mx.array([[5]]), make_prompt_cache(model)
        mx.eval(model(token, cache=cache))
        call = group.call

        def changing(kind: str, *arguments: Any, layer: int, **numbers: int) -> None:
            """Behind the first layer, in which every rank looks at its file."""
            if layer:
                os.utime(store / Manifest.neurons_file, (1, 1))
            call(kind, *arguments, layer=layer, **numbers)

        monkeypatch.setattr(group, "call", changing)
        monkeypatch.setattr(model.flash.streamer.file, "verify_unchanged", lambda: None)  # rank 0 looks at its own
        with pytest.raises(FlashError, match=r"rank 1: .*changed"):
            model(token, cache=cache)


@pytest.mark.parametrize("name", ["float32", "gated 8 bits"])
def test_shares_of_a_layer_are_its_rows(tiny_of: Callable[[str], Tiny], name: str) -> None:
    tiny = tiny_of(name)
    layout = tiny.manifest.layout
    file = UnitFile(tiny.store / Manifest.neurons_file, direct=False)
    shared = NeuronFile(file, Reader(2), layout)
    for share in (range(0, 3), range(3, layout.blocks - 1), range(layout.blocks - 1, layout.blocks)):
        units = NeuronSlots(shared, 1, 2, layout.parts, share=share)
        rows = tiny.rows[1][:, units.first_neuron : units.first_neuron + units.neurons]  # (parts, n, width)
        pieces = [[np.array(part) for part in parts] for _, _, parts in units.pieces()]
        for part, found in zip(rows, zip(*pieces, strict=True), strict=True):
            assert np.allclose(np.concatenate(found), part, atol=1e-6)
        last = np.array([units.neurons - 1])
        found_rows: list[Any] = [rows_of for _, rows_of in units.use(last, packed=False)]
        assert len(found_rows) == 1
        assert all(np.allclose(np.array(a)[0], b[-1], atol=1e-6) for a, b in zip(found_rows[0], rows, strict=True))
    shared.close()


def test_ranks_that_are_processes(tiny: Tiny, open_model: Any, tmp_path: Path) -> None:
    program = Path(__file__).with_name("ranked_program.py")
    command = [sys.executable, str(program), str(tiny.store), str(tmp_path / "logits")]
    subprocess.run(command, env=child_environment(), check=True, timeout=100, stdout=subprocess.DEVNULL)
    found = np.load(tmp_path / "logits.npz")
    alone = everything_of_a_mixture(open_model(tiny.store))
    assert len(found.files) == len(alone)
    for a, b in zip(found.values(), alone, strict=True):
        assert np.allclose(a, b, atol=TOLERANCE)


def test_the_plan_names_every_rank(tiny: Tiny, open_model: Any) -> None:
    said: list[str] = []
    with threads(3) as group:
        model = open_model(tiny.store, group=group, memory="4GB", say=said.append)
        model.flash.close()
    blocks = tiny.manifest.layout.blocks
    lines = [line for line in said[0].splitlines() if line.startswith("  rank ")]
    counts = [int(line.split(": ")[1].split()[0]) for line in lines]
    assert len(counts) == 3 and sum(counts) == blocks and max(counts) <= min(counts) + 1
    assert all("blocks of neurons of each layer (3" in line and line.endswith("all in slots") for line in lines)


def test_a_result_of_another_shape_is_refused(
    tiny_of: Callable[[str], Tiny], ranked: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum of one token would be added to that of every token."""
    monkeypatch.setattr(ThreadRank, "altered", without_last_row)
    refused = pytest.raises(FlashError, match=r"it returns \[1, \d+\] .* where \[2, \d+\] .* is expected")
    with ranked(tiny_of("float32").store, [1, 1], 1000, predictor="none") as (model, _), refused:
        mx.eval(model(mx.array([PROMPT[:2]]), cache=make_prompt_cache(model)))
