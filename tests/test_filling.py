"""Layers with a slot for every unit: their units are read while the model is loaded, and never looked up afterwards."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from interrupts import InterruptAt  # type: ignore[import-not-found]
from mixtures import make_mixture, open_streamed  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

from mlx_flash.errors import ReadError
from mlx_flash.flash import filling
from mlx_flash.flash.filling import bytes_to_fill, fill, whole_layers
from mlx_flash.flash.reader import Reader
from mlx_flash.layers import experts as experts_module
from mlx_flash.loading import fill_slots, runtime
from mlx_flash.loading import load as loading
from mlx_flash.loading.load import load
from mlx_flash.loading.load_progress import watching

pytestmark = pytest.mark.usefixtures("one_processor")

EXPERTS = 12
CALLS = [[5, 17, 80, 3, 44, 61, 9, 9, 30, 72, 1, 55, 8, 90], [4], [9], [77, 31], [6]]


def everything(model: Any) -> list[np.ndarray]:
    cache = make_prompt_cache(model)
    return [np.array(model(mx.array([call]), cache=cache)) for call in CALLS]


def apart(folder: Path) -> Path:
    """Saves a mixture's experts one by one, as Hugging Face does: in the order of their names, 10 before 2."""
    path = folder / "model.safetensors"
    weights: dict[str, mx.array] = {}
    loaded: Any = mx.load(str(path))
    for name, array in loaded.items():
        if ".switch_mlp." not in name:
            weights[name] = array
            continue
        for expert in range(EXPERTS):
            weights[name.replace(".switch_mlp.", f".experts.{expert}.")] = array[expert]
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)
    return folder


@pytest.fixture(scope="module")
def stacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_mixture(tmp_path_factory.mktemp("stacked"), "qwen3_moe", "4 bits")
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def one_by_one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = apart(make_mixture(tmp_path_factory.mktemp("apart"), "qwen3_moe"))
    write_tokenizer(folder)
    return folder


@pytest.fixture
def read_backs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of the arrays of ids that layers of experts have read back."""
    sizes: list[int] = []
    real = experts_module.to_numpy

    def counted(array: mx.array) -> np.ndarray:
        sizes.append(array.size)
        return real(array)

    monkeypatch.setattr(experts_module, "to_numpy", counted)
    return sizes


@pytest.mark.parametrize("layout", ["stacked", "one_by_one"])
def test_a_mixture_that_fits_reads_nothing_after_its_load(
    layout: str, request: pytest.FixtureRequest, read_backs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "STEP_BYTES", 1 << 15)  # several steps for each layer
    folder = request.getfixturevalue(layout)
    told: list[tuple[str, int, int]] = []
    with watching(lambda *step: told.append(step)):
        model, _ = load(folder, context=64)
    try:
        counters = model.flash.streamer.counters.copy()
        layers = [layer.units for layer in model.flash.layers]
        assert all(units.all_resident and (units.slot_of == np.arange(EXPERTS)).all() for units in layers)
        total = sum(units.unit_bytes for units in layers) * EXPERTS
        steps = [(done, of) for stage, done, of in told if stage == "reading experts"]
        assert len(steps) > 4 and steps[-1] == (total, total) and steps == sorted(set(steps))
        assert counters.bytes >= total and counters.misses == 0 and counters.manage_s < 1
        found = everything(model)
        assert read_backs == [] and model.flash.streamer.counters == counters
    finally:
        model.flash.close()
    for logits, expected in zip(found, everything(load_model(folder)[0]), strict=True):
        assert np.array_equal(logits, expected)


def test_a_store_that_fits_reads_nothing_after_its_load(store: Path) -> None:
    told: list[tuple[str, int, int]] = []
    with watching(lambda *step: told.append(step)):
        model, _ = load(store, context=32)
    try:
        counters = model.flash.streamer.counters.copy()
        assert [stage for stage, *_ in told][-1] == "reading neurons" and counters.bytes > 0
        everything(model)
        after = model.flash.streamer.counters
        assert (after.bytes, after.reads, after.misses) == (counters.bytes, counters.reads, 0) and after.hits > 0
    finally:
        model.flash.close()


def test_layers_with_too_few_slots_are_left_alone(stacked: Path) -> None:
    model, streamer = open_streamed(stacked, EXPERTS - 1)
    assert whole_layers([layer.units for layer in switches(model)]) == []
    streamer.close()


def switches(model: Any) -> list[Any]:
    return [layer.mlp.switch_mlp for layer in model.model.layers]


@pytest.mark.parametrize("slots", [5, EXPERTS])
def test_some_units_fill_what_is_empty(one_by_one: Path, slots: int) -> None:
    """Nothing is evicted, the order of the ids does not matter, and units in slots are not read again."""
    model, streamer = open_streamed(one_by_one, slots)
    first, second = (layer.units for layer in switches(model))
    list(first.use(np.array([3, 7])))
    wanted = [(second, np.array([11, 10, 9, 2, 0])), (first, np.array([9, 3, 10, 0, 1]))]
    assert bytes_to_fill(wanted) == 10 * first.unit_bytes
    fill(wanted)
    assert set(np.flatnonzero(first.slot_of >= 0)) == ({0, 1, 3, 7, 9, 10} if slots > 5 else {3, 7, 0, 9, 10})
    assert set(np.flatnonzero(second.slot_of >= 0)) == {0, 2, 9, 10, 11}
    read = streamer.counters.bytes
    fill(wanted if slots > 5 else [])
    assert streamer.counters.bytes == read
    for logits, expected in zip(everything(model), everything(load_model(one_by_one)[0]), strict=True):
        assert np.array_equal(logits, expected)
    streamer.close()


def test_an_interrupt_at_any_line_leaves_the_slots_right(stacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(filling, "STEP_BYTES", 1 << 16)
    expected = everything(load_model(stacked)[0])

    def watched(path: str) -> bool:
        return Path(path).stem in ("slot_cache", "units", "filling")

    for line in itertools.count(1, 7):
        model, streamer = open_streamed(stacked, EXPERTS)
        layers = [layer.units for layer in switches(model)]
        lines = InterruptAt(line, watched)
        try:
            with lines:
                fill(whole_layers(layers))
        except KeyboardInterrupt:
            pass
        assert streamer.reader.outstanding == 0
        if line % 3 == 0:  # the rest is read by the calls that need it
            fill(whole_layers(layers))
            assert all(units.all_resident for units in layers)
        assert all(np.array_equal(a, b) for a, b in zip(everything(model), expected, strict=True))
        streamer.close()
        if lines.count < line:
            break
    assert line > 50


class Failing(Reader):
    """A reader whose later `wait`s raise an exception."""

    error: BaseException | None = None
    closed: ClassVar[list[Reader]] = []

    def wait(self, ticket: Any) -> Any:
        report = super().wait(ticket)
        if self.error is not None:
            raise self.error
        return report

    def close(self) -> None:
        self.closed.append(self)
        super().close()


@pytest.mark.parametrize("error", [ReadError("the disk is gone"), KeyboardInterrupt()])
@pytest.mark.parametrize("kind", ["stacked", "store"])
def test_a_load_that_ends_while_it_fills_closes_everything(
    kind: str, error: BaseException, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = request.getfixturevalue(kind)
    monkeypatch.setattr("mlx_flash.loading.reading_trials.Reader", Failing)
    monkeypatch.setattr(Failing, "closed", [])
    real = fill_slots.fill
    streamers = []

    def failing(wanted: Any, progress: Any) -> None:
        streamers.append(wanted[0][0].shared)
        streamers[0].reader.error = error
        real(wanted, progress)

    monkeypatch.setattr(fill_slots, "fill", failing)
    own = runtime._BufferCache()  # Models that other tests left open count in the shared one.
    for module in (loading, runtime):
        monkeypatch.setattr(module, "BUFFER_CACHE", own)
    before = mx.set_cache_limit(1 << 30)
    with pytest.raises(type(error)):
        load(folder, context=32)
    assert Failing.closed == [streamers[0].reader] and streamers[0].reader.outstanding == 0
    assert mx.set_cache_limit(before) == 1 << 30


def test_a_checkpoint_cut_short_while_it_is_loaded_names_the_expert(
    stacked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in stacked.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    real = fill_slots.fill

    def cut(wanted: Any, progress: Any) -> None:
        path = tmp_path / "model.safetensors"
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size // 2)
        real(wanted, progress)

    monkeypatch.setattr(fill_slots, "fill", cut)
    with pytest.raises(ReadError, match=r"model\.safetensors: .*experts?.*ends early"):
        load(tmp_path, context=32)
