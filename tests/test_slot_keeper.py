"""Slots that are given back and taken again: by a scripted signal, in any order, interrupted, with the same bits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import InterruptAt  # type: ignore[import-not-found]
from mixtures import assert_same, make_mixture, open_streamed  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache
from test_mixture import everything, reference  # type: ignore[import-not-found]
from test_stream import NEURONS, Bench, gathered  # type: ignore[import-not-found]

from mlx_flash.flash import pressure, sysctl, system
from mlx_flash.flash.inflight import InFlightReads
from mlx_flash.flash.pressure import Level, Pressure
from mlx_flash.flash.slot_cache import SlotCache
from mlx_flash.flash.stats import Clock, Counters, Statistics
from mlx_flash.flash.units import Units
from mlx_flash.layers.experts import StreamedExperts
from mlx_flash.loading import slot_keeper as module
from mlx_flash.loading.load import load
from mlx_flash.loading.slot_keeper import CALM_S, CHECK_S, MOST_CALM_S, SlotKeeper

pytestmark = pytest.mark.usefixtures("one_processor")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_mixture(tmp_path_factory.mktemp("keeper") / "qwen3_moe", "qwen3_moe", "4 bits")


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    made = Bench(tmp_path_factory.mktemp("stream") / "neurons.bin", 3, "float32")
    yield made
    made.streamer.close()


# -- the book-keeping and the slots --------------------------------------------------------------------------


def test_the_units_that_would_be_evicted_last_stay() -> None:
    for window in (None, 3):
        cache = SlotCache(10, 6, window)
        for units in ([0, 1, 2], [3, 4, 5], [3, 5], [5, 1]):
            ids = np.array(units)
            cache.mark_used(ids)
            cache.commit(*cache.reserve(ids))
        kept = cache.last_evicted(3)
        units, used = cache.unit_of[kept], cache.last_used[kept]
        assert sorted(units) == [1, 3, 5]
        cache.restart(4, units, used)
        assert (cache.slots, cache.resident, cache.free) == (4, 3, 1)
        assert cache.unit_of.tolist() == [*units.tolist(), -1] and cache.slot_of[units].tolist() == [0, 1, 2]


CALLS = st.lists(
    st.tuples(
        st.sampled_from(["use", "use", "prefetch", "resize", "pieces"]),
        st.lists(st.integers(0, NEURONS - 1), min_size=1, max_size=20, unique=True).map(sorted),
        st.integers(1, 20),
    ),
    min_size=3,
    max_size=12,
)


@settings(max_examples=40, deadline=None)
@given(calls=CALLS, window=st.none() | st.integers(1, 4))
def test_any_history_with_resizes_gives_the_stored_rows(bench: Bench, calls: Any, window: int | None) -> None:
    bench.streamer.drain()
    stream = bench.stream(9, window=window)
    for kind, chosen, slots in calls:
        ids = np.array(chosen)
        if kind == "use":
            bench.check(gathered(stream, ids), ids)
        elif kind == "prefetch":
            stream.prefetch(ids)
        elif kind == "pieces":
            bench.check_pieces(stream)
        else:
            before = set(stream.cache.unit_of[stream.cache.unit_of >= 0].tolist())
            on_their_way = set() if stream.pending is None else set(stream.pending.units.tolist())
            stream.resize(slots)
            after = set(stream.cache.unit_of[stream.cache.unit_of >= 0].tolist())
            assert stream.cache.slots == min(slots, stream.count) and stream.pending is None
            assert after <= before | on_their_way and len(after) == min(len(before | on_their_way), slots)
    assert stream.pool is not None and stream.pool.nbytes == stream.cache.slots * stream.slot_bytes


@pytest.mark.parametrize("slots", [4, 16])
def test_an_interrupt_at_any_line_of_a_resize(bench: Bench, slots: int) -> None:
    """Each call after it has the stored rows. The map never names a slot that does not exist."""
    calls = [np.arange(0, 12), np.arange(6, 30), np.arange(20, 44)]

    def watched(path: str) -> bool:
        return Path(path).stem in ("slot_cache", "units")

    for line in itertools.count(1, 2):
        bench.streamer.drain()
        stream = bench.stream(9)
        gathered(stream, calls[0])
        with suppress(KeyboardInterrupt), InterruptAt(line, watched) as lines:
            stream.prefetch(calls[1][:9])
            stream.resize(slots)
        if lines.count < line:
            break
        stream.cache.recover()
        assert stream.pool is not None and stream.cache.slots * stream.slot_bytes <= stream.pool.nbytes
        for ids in calls:
            bench.check(gathered(stream, ids), ids)
        bench.check_pieces(stream)
    assert line > 40


def test_a_graph_that_was_not_evaluated_keeps_the_old_slots(bench: Bench) -> None:
    stream = bench.stream(20)
    ids = np.arange(12)
    rows = gathered(stream, ids)
    stream.resize(2)
    gathered(stream, np.arange(30, 50))  # overwrites the new slots
    bench.check(rows, ids)


# -- a model ------------------------------------------------------------------------------------------------


def resizing_at_random(model: Any, seed: int, most: int) -> Callable[[mx.array], None]:
    """What a call of a layer begins with: now and then some layer gets another number of slots."""
    random = np.random.default_rng(seed)
    layers = [each for _, each in model.named_modules() if isinstance(each, StreamedExperts)]

    def before_layer(_: mx.array) -> None:
        if random.random() < 0.5:
            layer = layers[random.integers(len(layers))]
            layer.units.resize(int(random.integers(1, most + 1)))
            if random.random() < 0.5:  # otherwise the layer's own call does it
                layer.follow_slots()

    return before_layer


@pytest.mark.parametrize("slots", [3, 12])
def test_the_same_bits_while_experts_come_and_go(folder: Path, slots: int) -> None:
    model, streamer = open_streamed(folder, slots)
    for seed in range(3):
        streamer.before_layer = resizing_at_random(model, seed, 12)
        assert_same(everything(model), reference(folder), (slots, seed))
    streamer.close()


def test_a_layer_that_was_all_resident_looks_up_again(folder: Path) -> None:
    model, streamer = open_streamed(folder, 12)
    layers = [each for _, each in model.named_modules() if isinstance(each, StreamedExperts)]
    for _ in range(2):
        assert_same(everything(model), reference(folder), "grows")
        for layer in layers:
            layer.units._start(np.arange(12))
            layer.units._finish()
        assert_same(everything(model), reference(folder), "all resident")
        assert all(layer.units.all_resident and layer._slot_of is not None for layer in layers)
        for layer in layers:
            layer.units.resize(4)
        assert_same(everything(model), reference(folder), "shrunk")
        assert all(layer._slot_of is None and layer.units.cache.slots == 4 for layer in layers)
        for layer in layers:
            layer.units.resize(12)
    streamer.close()


def test_an_interrupt_while_a_layer_follows_its_slots(folder: Path) -> None:
    model, streamer = open_streamed(folder, 12)
    layer = next(each for _, each in model.named_modules() if isinstance(each, StreamedExperts))
    expected = reference(folder)
    for line in itertools.count(1):
        layer.units.resize(5 + line % 2)
        with suppress(KeyboardInterrupt), InterruptAt(line, lambda path: path.endswith("layers/experts.py")) as lines:
            layer.follow_slots()
        cache = make_prompt_cache(model)
        found = np.array(model(mx.array([[5, 17, 80]]), cache=cache).astype(mx.float32))
        if line == 1:
            expected = found
        assert np.array_equal(found, expected)
        if lines.count < line:
            break
    assert line > 5
    streamer.close()


def tokens_of(store: Path, gives: bool) -> tuple[list[int], int]:
    """Tokens of a model of neurons whose slots come and go at a scripted signal, and the bytes that were given back."""
    from mlx_flash.text.generation import stream_generate

    model, tokenizer = load(store, memory="2GB", context=64)
    times, states = itertools.count(0.0, 0.05), itertools.cycle([Level.NORMAL] * 6 + [Level.CRITICAL] * 2)
    if gives:
        model.flash.keeper._clock = lambda: next(times)
        model.flash.keeper._signal = lambda: Pressure(next(states))
        model.flash.keeper._calm_s = 0.5
    else:
        model.flash.keeper._signal = lambda: Pressure(Level.NORMAL)
    found = list(stream_generate(model, tokenizer, "It was the best of", 24))
    statistics = found[-1].statistics
    assert statistics is not None
    counters = statistics.prompt + statistics.decode
    assert counters.given_back - counters.taken_again == model.flash.keeper.given_bytes
    model.flash.keeper._signal = lambda: Pressure(Level.NORMAL)
    while model.flash.keeper.given_bytes:
        model.flash.keeper.check()
    assert all(layer.units.all_resident for layer in model.flash.layers)
    assert any("given back" in line for line in statistics.lines("exact")) == gives
    model.flash.close()
    return [each.token for each in found], counters.given_back


def test_the_same_text_while_neurons_come_and_go(store: Path) -> None:
    (tokens, given_back), (expected, none) = tokens_of(store, True), tokens_of(store, False)
    assert tokens == expected and given_back > 0 and none == 0


# -- the keeper ---------------------------------------------------------------------------------------------


class FakeUnits(Units):
    """Units without memory."""

    slot_bytes = 1 << 20

    def __init__(self, slots: int, resized: list[int]) -> None:
        self.cache, self.count = SlotCache(slots, slots), slots + 1
        self.resized = resized

    def resize(self, slots: int) -> None:
        self.cache.restart(slots)
        self.resized.append(slots)

    use = _submit = _arrived = _slots_with = _take_slots = places = unit_bytes = None  # type: ignore[assignment]


class Scene:
    """A keeper of four layers of 64 slots of 1 MiB, in a scripted system."""

    def __init__(self, usable: int | None = None) -> None:
        FakeUnits.__abstractmethods__ = frozenset()
        self.now, self.level, self.usable = 0.0, Level.NORMAL, usable
        self.resized: list[int] = []
        self.layers = [SimpleNamespace(units=FakeUnits(64, self.resized)) for _ in range(4)]
        counters = Counters()
        self.streamer = SimpleNamespace(counters=counters, clock=Clock(counters))
        plan: Any = SimpleNamespace(units=SimpleNamespace(least=4), total=1000 << 20)
        self.keeper = SlotKeeper(plan, self.layers, self.streamer, self.signal, lambda: self.now)

    def signal(self) -> Pressure:
        available = None if self.usable is None else self.usable - (700 << 20)
        return Pressure(self.level, available, self.usable)

    def wait(self, seconds: float, step: float = CHECK_S) -> None:
        end = self.now + seconds
        while self.now < end:
            self.now += step
            self.keeper.check()

    @property
    def slots(self) -> list[int]:
        return [layer.units.cache.slots for layer in self.layers]


def test_a_graph_that_reads_old_slots_is_evaluated_before_they_change() -> None:
    scene = Scene()
    scene.level = Level.WARNING
    slots = mx.zeros((1 << 20,))
    mx.eval(slots)
    x = slots.sum()
    before = mx.get_active_memory()
    del slots
    scene.now += CHECK_S
    scene.keeper.check(x)
    assert scene.resized and before - mx.get_active_memory() > 3 << 20


def test_a_level_takes_slots_until_it_falls_and_they_come_back_slowly() -> None:
    scene = Scene()
    scene.wait(60)
    assert scene.slots == [64] * 4 and not scene.resized
    scene.level = Level.WARNING
    scene.wait(1)
    assert scene.slots == [64, 64, 64, 32]
    scene.wait(300)
    assert scene.slots == [32] * 4
    scene.level = Level.CRITICAL
    scene.wait(30)
    assert scene.slots == [4] * 4  # the fewest slots of the plan stay
    assert scene.keeper.given_bytes == 240 << 20 == scene.streamer.counters.given_back
    scene.level = Level.NORMAL
    scene.wait(CALM_S - 1)
    assert scene.slots == [4] * 4
    scene.wait(5)
    assert 16 < sum(scene.slots) < 256
    scene.wait(60)
    assert scene.slots == [64] * 4 and scene.keeper.given_bytes == 0
    assert scene.streamer.counters.taken_again == 240 << 20


def test_critical_is_quicker_than_a_warning() -> None:
    scenes = {level: Scene() for level in (Level.WARNING, Level.CRITICAL)}
    for level, scene in scenes.items():
        scene.level = level
        scene.wait(3)
    assert scenes[Level.CRITICAL].keeper.given_bytes > scenes[Level.WARNING].keeper.given_bytes > 0


def test_as_much_is_given_as_others_need() -> None:
    scene = Scene(1200 << 20)
    scene.wait(1)
    assert not scene.resized  # 200 MiB are to spare
    scene.usable = 950 << 20
    scene.wait(1)
    given = scene.keeper.given_bytes
    assert 170 << 20 <= given < 202 << 20  # the margin twice and what is lacking, and less than half a layer more
    scene.wait(60)
    assert scene.keeper.given_bytes == given


def test_each_return_of_pressure_makes_it_wait_longer() -> None:
    scene, waited = Scene(), []
    for _ in range(7):
        scene.level = Level.CRITICAL
        scene.wait(2)
        given, began, scene.level = scene.keeper.given_bytes, scene.now, Level.NORMAL
        while scene.keeper.given_bytes == given:
            scene.wait(CHECK_S)
        waited.append(scene.now - began)
    assert CALM_S - 1 <= waited[0] <= CALM_S + 1 and MOST_CALM_S - 1 <= waited[-1] <= MOST_CALM_S + 1
    assert waited == sorted(waited)


def test_a_system_that_cannot_be_asked_is_asked_again() -> None:
    scene = Scene()

    def fail() -> Pressure:
        raise OSError("Too many open files")

    scene.keeper._signal = fail
    scene.wait(10)
    assert scene.slots == [64] * 4
    scene.keeper._signal, scene.level = scene.signal, Level.CRITICAL
    scene.wait(1)
    assert sum(scene.slots) < 256


def test_a_limit_that_is_just_the_plan_is_not_pressure() -> None:
    scene = Scene(1000 << 20)
    scene.wait(60)
    assert not scene.resized


def test_slots_that_would_not_fit_again_are_not_taken() -> None:
    scene = Scene(1200 << 20)
    scene.wait(1)
    scene.usable = 900 << 20
    scene.wait(1)
    given = scene.keeper.given_bytes
    scene.usable = (1000 << 20) - given + (100 << 20)
    scene.wait(400)
    assert scene.keeper.given_bytes == given > 0


def test_new_slots_never_exceed_the_plan_beside_the_old() -> None:
    scene = Scene()
    held, most = sum(scene.slots), [0]

    def counting(self: FakeUnits, slots: int) -> None:
        most[0] = max(most[0], sum(scene.slots) + slots)
        self.cache.restart(slots)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeUnits, "resize", counting)
        scene.level = Level.CRITICAL
        scene.wait(20)
        scene.level = Level.NORMAL
        scene.wait(100)
    assert scene.slots == [64] * 4
    assert held < most[0] <= held + (module.MLX_CACHE_BYTES >> 20)


def test_slots_that_cannot_be_allocated_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    scene = Scene()
    scene.level = Level.CRITICAL

    def fails(self: FakeUnits, slots: int) -> None:
        raise RuntimeError("[malloc] Unable to allocate")

    with monkeypatch.context() as patch:
        patch.setattr(FakeUnits, "resize", fails)
        scene.wait(5)
    assert scene.slots == [64] * 4 and scene.streamer.counters.given_back == 0
    scene.wait(5)
    assert scene.keeper.given_bytes > 0


def test_layers_without_slots_are_left_alone() -> None:
    counters = Counters()
    plan: Any = SimpleNamespace(units=SimpleNamespace(least=2), total=1000)
    whole: Any = SimpleNamespace(units=SimpleNamespace(cache=SimpleNamespace(slots=3)))

    def signal() -> Pressure:
        raise AssertionError("nothing can be given back, so nothing is asked")

    streamer: Any = SimpleNamespace(counters=counters, clock=Clock(counters))
    SlotKeeper(plan, [whole], streamer, signal).check()


# -- the signal ---------------------------------------------------------------------------------------------


def test_the_levels_of_macos() -> None:
    assert [pressure.level_of_macos(number) for number in (0, 1, 2, 4, 99)] == [0, 0, 1, 2, 0]


@pytest.mark.parametrize(("status", "level"), [(0, Level.CRITICAL), (-1, Level.NORMAL)])
def test_macos_is_asked_for_its_level(monkeypatch: pytest.MonkeyPatch, status: int, level: Level) -> None:
    def sysctlbyname(name: bytes, value: Any, size: Any, *_: object) -> int:
        assert name == b"kern.memorystatus_vm_pressure_level"
        size._obj.value = 4
        if value is not None:
            value.raw = bytes([4, 0, 0, 0])
        return status

    monkeypatch.setattr(pressure.sys, "platform", "darwin")
    monkeypatch.setattr(sysctl.ctypes, "CDLL", lambda *_, **__: SimpleNamespace(sysctlbyname=sysctlbyname))
    assert pressure.memory_pressure() == Pressure(level)


def test_the_levels_of_stalls() -> None:
    text = "some avg10={} avg60=0.00 avg300=0.00 total=1\nfull avg10={} avg60=0.00 avg300=0.00 total=1\n"
    cases = [("0.00", "0.00"), ("9.99", "0.50"), ("10.00", "3.00"), ("60.12", "25.00")]
    assert [pressure.stall_level(text.format(*case)) for case in cases] == [0, 0, 1, 2]
    assert pressure.stall_level("") == Level.NORMAL


def test_stalls_count_only_while_memory_is_scarce(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pressure.sys, "platform", "linux")
    monkeypatch.setattr(pressure, "_stalls", lambda: "some avg10=50.00\nfull avg10=0.00\n")
    monkeypatch.setattr(pressure, "current_memory_bytes", lambda: 1000)
    for available, level in ((2000, Level.NORMAL), (100, Level.WARNING)):
        monkeypatch.setattr(pressure, "available_memory_bytes", lambda free=available: free)
        assert pressure.memory_pressure() == Pressure(level, available, available + 1000)


def test_the_system_can_be_asked() -> None:
    assert pressure.memory_pressure().level in Level
    assert isinstance(pressure._stalls(), str) and system.available_memory_bytes() > 0


def test_statistics_say_what_came_and_went() -> None:
    quiet = Statistics(Counters(), Counters(), 1, 0.0)
    told = Statistics(Counters(given_back=3_000_000), Counters(taken_again=1_000_000), 1, 0.0)
    assert len(told.lines("router")) == len(quiet.lines("router")) + 1
    assert told.lines("router")[-1].startswith("Memory: 3 MB of slots given back")


def test_a_stream_without_a_keeper_is_undisturbed() -> None:
    InFlightReads(SimpleNamespace(), []).before_layer(mx.zeros(1))  # type: ignore[arg-type]
