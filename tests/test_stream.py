"""A layer's stream against the plain contents of the store, through every history and after every fault."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import QUANTISED  # type: ignore[import-not-found]
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from interrupts import InterruptAt  # type: ignore[import-not-found]
from slow_cases import slow  # type: ignore[import-not-found]

from mlx_flash.errors import FlashError, ReadError
from mlx_flash.flash import neurons as stream_module
from mlx_flash.flash.files import Manifest, NeuronLayout, round_up
from mlx_flash.flash.neurons import NeuronFile, NeuronSlots
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import Reader, ReadReport, Ticket
from mlx_flash.flash.self_test import check_expert_pools, check_packed_products
from mlx_flash.flash.unit_file import UnitFile

LAYERS, NEURONS, WIDTH = 2, 50, 24
PARTS = ("gate", "up", "down")
SUBSETS = [PARTS, ("up", "down"), ("down",), ("gate",)]
DTYPES = {"float32": np.float32, "float16": np.float16}


def gathered(stream: NeuronSlots, ids: Any) -> tuple[mx.array, ...]:
    """The rows of neurons `ids` as numbers, one array per part."""
    pieces: list[Any] = []
    for piece, rows in stream.use(ids, packed=False):
        pieces.append(rows)
        if piece[-1] != ids[-1]:
            stream.guard(*rows)  # type: ignore[arg-type]
    return tuple(mx.concatenate(list(rows)) for rows in zip(*pieces, strict=True))  # type: ignore[arg-type]


class FaultyReader(Reader):
    """A reader whose `wait` fails at the calls numbered in `faults` and leaves garbage at the destination."""

    faults: frozenset[int] = frozenset()
    waits = 0

    def __init__(self, threads: int) -> None:
        super().__init__(threads)
        self.destinations: dict[Ticket, Any] = {}

    def submit(self, file: UnitFile, offsets: Any, addresses: Any, lengths: Any, **options: Any) -> Ticket:
        ticket = super().submit(file, offsets, addresses, lengths, **options)
        lengths = np.broadcast_to(lengths, addresses.shape)
        self.destinations[ticket] = zip(addresses.tolist(), lengths.tolist(), strict=True)
        return ticket

    def wait(self, ticket: Ticket) -> ReadReport:
        destinations = self.destinations.pop(ticket)
        report = super().wait(ticket)
        self.waits += 1
        if self.waits - 1 in self.faults:
            for address, length in destinations:
                ctypes.memset(address, 0xAA, length)
            raise ReadError("injected")
        return report


class Bench:
    """A bundle file of random rows and a streamer over it."""

    def __init__(self, path: Path, lanes: int, dtype: str) -> None:
        bundle = WIDTH * np.dtype(DTYPES[dtype]).itemsize * len(PARTS)
        self.layout = NeuronLayout(
            dtype, LAYERS, NEURONS, WIDTH, PARTS, lanes, round_up(lanes * bundle, 4096), piece_neurons=4 * lanes
        )
        assert self.layout.problem() is None
        self.path = path
        random = np.random.default_rng(lanes)
        shape = (LAYERS, len(PARTS), NEURONS, WIDTH)
        self.rows = random.standard_normal(shape).astype(DTYPES[dtype])
        contents = np.zeros((LAYERS, self.layout.layer_bytes), np.uint8)
        for layer, block in itertools.product(range(LAYERS), range(self.layout.blocks)):
            here = self.rows[layer, :, block * lanes : (block + 1) * lanes]
            here = np.pad(here, [(0, 0), (0, lanes - here.shape[1]), (0, 0)])
            start = block * self.layout.block_bytes
            contents[layer, start : start + here.nbytes] = np.frombuffer(here.tobytes(), np.uint8)
        path.write_bytes(contents.tobytes())
        self.reader = FaultyReader(4)
        self.file = UnitFile(path)
        self.streamer = NeuronFile(self.file, self.reader, self.layout)

    def stream(self, slots: int, parts: tuple[str, ...] = PARTS, window: int | None = None) -> NeuronSlots:
        self.reader.faults = frozenset()
        return NeuronSlots(self.streamer, 1, slots, parts, window)

    def check(self, rows: tuple[mx.array, ...], ids: Any, parts: tuple[str, ...] = PARTS) -> None:
        assert len(rows) == len(parts)
        for part, found in zip(parts, rows, strict=True):
            assert np.array_equal(np.array(found), self.rows[1, PARTS.index(part), ids]), part

    def check_pieces(self, stream: NeuronSlots, parts: tuple[str, ...] = PARTS) -> None:
        expected = 0
        for start, stop, rows in stream.pieces():
            assert start == expected and 0 < stop - start <= self.layout.piece_neurons
            self.check(rows, slice(start, stop), parts)
            expected = stop
        assert expected == NEURONS

    @property
    def idle(self) -> bool:
        return not self.reader.outstanding


@pytest.fixture(scope="module")
def bench_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Bench]]:
    benches: dict[Any, Bench] = {}

    def make(lanes: int = 3, dtype: str = "float32") -> Bench:
        key = (lanes, dtype)
        if key not in benches:
            benches[key] = Bench(tmp_path_factory.mktemp("stream") / "neurons.bin", lanes, dtype)
        benches[key].streamer.drain()  # waits for reads that an earlier test or example left pending
        return benches[key]

    yield make
    for bench in benches.values():
        bench.streamer.close()


@pytest.fixture
def bench(bench_of: Callable[..., Bench]) -> Bench:
    return bench_of()


SELECTIONS = st.lists(st.integers(0, NEURONS - 1), min_size=1, max_size=NEURONS, unique=True).map(sorted)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_history_gives_the_stored_rows(bench_of: Callable[..., Bench], data: st.DataObject) -> None:
    """Mixes selections with and without guesses and whole passes on one stream. Some fail or are abandoned."""
    bench = bench_of(data.draw(st.integers(1, 9), "lanes"), data.draw(st.sampled_from([*DTYPES]), "dtype"))
    parts = data.draw(st.sampled_from(SUBSETS), "parts")
    slots = data.draw(st.integers(1, bench.layout.blocks), "slots")
    stream = bench.stream(slots, parts, data.draw(st.none() | st.integers(1, 3), "window"))
    for _ in range(data.draw(st.integers(1, 6), "steps")):
        fault = data.draw(st.none() | st.integers(0, 4), "fault")
        bench.reader.waits, bench.reader.faults = 0, frozenset() if fault is None else frozenset([fault])
        action = data.draw(st.sampled_from(["gather", "gather", "ahead", "pieces", "abandon"]), "action")
        try:
            if action == "ahead":
                stream.prefetch(np.array(data.draw(SELECTIONS, "guess")))
                assert stream.pending is None or bench.streamer.loading[-1] is stream
                continue
            if action == "gather":
                ids = np.array(data.draw(SELECTIONS, "ids"))
                bench.check(gathered(stream, ids), ids, parts)
            elif action == "pieces":
                bench.check_pieces(stream, parts)
            else:
                with closing(stream.pieces()) as pieces:
                    for start, stop, rows in itertools.islice(pieces, 2):
                        bench.check(rows, slice(start, stop), parts)
        except ReadError:
            assert fault is not None and bench.reader.waits > fault
        assert bench.idle
        resident = [(u, s) for u, s in enumerate(stream.cache.slot_of.tolist()) if s >= 0]
        assert [(u, s) for s, u in enumerate(stream.cache.unit_of.tolist()) if u >= 0] == sorted(
            resident, key=lambda pair: pair[1]
        )
        assert stream.cache.resident == len(resident)


@pytest.mark.parametrize("parts", SUBSETS, ids="-".join)
@pytest.mark.parametrize("slots", range(1, 18))
def test_whole_passes_fill_the_slots_and_stay_right(bench: Bench, slots: int, parts: tuple[str, ...]) -> None:
    stream = bench.stream(slots, parts)
    for _ in range(2):
        bench.check_pieces(stream, parts)
    piece = bench.layout.piece_blocks
    last = bench.layout.blocks % piece
    filled = slots // piece * piece
    filled += last if slots - filled >= last else 0
    assert stream.cache.resident == min(filled, bench.layout.blocks)
    bench.check(gathered(stream, np.arange(NEURONS)), slice(None), parts)


def test_a_layer_without_slots_has_pieces(bench: Bench) -> None:
    bench.check_pieces(bench.stream(0))
    for start, stop, rows in bench.stream(3, ("down",)).whole_bundles():
        bench.check(rows, slice(start, stop))


@pytest.mark.parametrize("slots", [1, 5, 17])
@pytest.mark.parametrize("call", range(4))
def test_a_read_error_leaves_the_cache_usable(bench: Bench, slots: int, call: int) -> None:
    stream = bench.stream(slots)
    first, ids = np.arange(0, 15), np.arange(1, NEURONS, 2)
    bench.check(gathered(stream, first), first)
    before = stream.cache.resident
    bench.reader.waits, bench.reader.faults = 0, frozenset([call])
    try:
        bench.check(gathered(stream, ids), ids)
    except ReadError:
        assert bench.reader.waits == call + 1
    else:
        assert 0 < bench.reader.waits <= call
    bench.reader.faults = frozenset()
    assert bench.idle and 0 <= stream.cache.resident <= max(before, slots)
    bench.check(gathered(stream, ids), ids)
    bench.check(gathered(stream, first), first)


@pytest.mark.parametrize("slots", [1, 5, 9, 17])
@pytest.mark.parametrize("call", range(5))
def test_a_read_error_in_a_whole_pass(bench: Bench, slots: int, call: int) -> None:
    stream = bench.stream(slots)
    bench.reader.waits, bench.reader.faults = 0, frozenset([call])
    with pytest.raises(ReadError, match="injected"):
        bench.check_pieces(stream)
    assert bench.idle
    for _ in range(2):
        bench.check_pieces(stream)
    bench.check(gathered(stream, np.arange(NEURONS)), slice(None))


@pytest.mark.parametrize("slots", [2, 17])
def test_a_file_truncated_and_restored(tmp_path: Path, slots: int) -> None:
    bench = Bench(tmp_path / "neurons.bin", 3, "float32")
    contents = bench.path.read_bytes()
    stream = bench.stream(slots)
    early, late = np.arange(4), np.arange(NEURONS)
    bench.check(gathered(stream, early), early)
    os.truncate(bench.path, bench.layout.layer_bytes + 5 * bench.layout.block_bytes)
    for _ in range(2):
        with pytest.raises(ReadError, match="ends early"):
            gathered(stream, late)
        with pytest.raises(ReadError, match="ends early"):
            bench.check_pieces(stream)
        assert bench.idle
    with bench.path.open("r+b") as file:
        file.write(contents)
    bench.check_pieces(stream)
    bench.check(gathered(stream, late), late)
    bench.streamer.close()


@pytest.mark.parametrize("slots", [1, 17])
@pytest.mark.parametrize("how", ["closed", "forgotten", "broken off by the caller", "error in the caller"])
def test_an_abandoned_pass_leaves_no_read_in_flight(bench: Bench, slots: int, how: str) -> None:
    stream = bench.stream(slots)
    pieces = stream.pieces()
    next(pieces)
    assert bench.reader.outstanding == 1  # the next piece is being read
    if how == "closed":
        pieces.close()
    elif how == "forgotten":
        del pieces
    elif how == "broken off by the caller":
        with pytest.raises(KeyboardInterrupt):
            pieces.throw(KeyboardInterrupt())
    else:
        bench.reader.waits, bench.reader.faults = 0, frozenset([0])
        with pytest.raises(ValueError, match="the caller's own"):  # not the read error that comes after it
            pieces.throw(ValueError("the caller's own"))
        bench.reader.faults = frozenset()
    assert bench.idle
    bench.check_pieces(stream)


@pytest.mark.parametrize("slots", [1, 2, 6])
def test_held_outputs_are_evaluated_before_their_memory_is_written(bench: Bench, slots: int) -> None:
    stream = bench.stream(slots)
    first, second = np.arange(0, 3 * slots), np.arange(NEURONS - 3 * slots, NEURONS)
    outputs = [rows + 0 for rows in gathered(stream, first)]
    stream.guard(*outputs)
    bench.check(gathered(stream, second), second)
    assert not np.isin(first // 3, stream.cache.unit_of).any()
    bench.check(tuple(outputs), first)


def test_a_call_that_only_hits_does_not_forget_what_was_held(bench: Bench) -> None:
    stream = bench.stream(2)
    first, second = np.arange(0, 6), np.arange(NEURONS - 6, NEURONS)
    kept = []
    for _ in range(2):
        kept.append(tuple(rows + 0 for rows in gathered(stream, first)))
        stream.guard(*kept[-1])
    bench.check(gathered(stream, second), second)
    for rows in kept:
        bench.check(rows, first)


def test_held_outputs_are_evaluated_before_a_pass_fills_free_slots(bench: Bench) -> None:
    stream = bench.stream(4)
    ids = np.arange(12, 24)
    outputs = [rows + 0 for rows in gathered(stream, ids)]
    stream.guard(*outputs)
    stream.cache.reserve(np.arange(8, 12))  # as before a failed read: the slots are free, and nothing was written
    bench.check_pieces(stream)
    assert stream.cache.slot_of[:4].min() >= 0
    bench.check(tuple(outputs), ids)


def test_a_guess_is_counted_as_what_it_turned_out_to_be(bench_of: Callable[..., Bench]) -> None:
    bench = bench_of(1)
    stream, counters = bench.stream(40), bench.streamer.counters
    bench.check(gathered(stream, np.arange(10)), np.arange(10))
    before = counters.copy()
    stream.prefetch(np.arange(5, 20))  # 10 to 19 are missing
    ids = np.array([0, 6, 12, 13, 30])
    bench.check(gathered(stream, ids), ids)
    used = counters - before
    assert (used.hits, used.misses, used.prefetched_used, used.prefetched_unused) == (2, 3, 2, 8)
    assert used.bytes == 11 * bench.layout.block_bytes and (stream.prefetched.used, stream.prefetched.unused) == (2, 8)
    stream.prefetch(np.arange(NEURONS))  # more than there are slots
    assert stream.pending is None and bench.idle


@pytest.mark.parametrize("slots", [4, 10, 25, 49])
def test_guesses_and_needs_add_up_to_what_is_read(bench_of: Callable[..., Bench], slots: int) -> None:
    bench = bench_of(1)
    stream, counters, rng = bench.stream(slots), bench.streamer.counters, np.random.default_rng(slots)
    before, needed = counters.copy(), 0
    for _ in range(400):
        ids = np.flatnonzero(rng.random(NEURONS) < rng.random() * slots / NEURONS)
        if len(ids) > slots:  # In rounds, a unit may be read again within a call.
            continue
        if rng.random() < 0.5:
            stream.prefetch(ids)
        elif len(ids):
            bench.check(gathered(stream, ids), ids)
            needed += len(ids)
    did = counters - before
    assert did.prefetched_used > 0 and did.prefetched_unused > 0
    assert did.hits + did.misses == needed and did.hits > 0
    pending = stream.pending
    on_their_way = 0 if pending is None else len(pending.units)
    counted = did.misses + did.prefetched_unused + (on_their_way if pending is not None and pending.guess else 0)
    assert counted == did.bytes // bench.layout.block_bytes + on_their_way


@pytest.mark.parametrize("step", [3, slow(1)])
@pytest.mark.parametrize(("slots", "window"), [(5, None), (12, 2)])
def test_an_interrupt_at_any_line_leaves_the_cache_right(
    bench_of: Callable[..., Bench], slots: int, window: int | None, step: int
) -> None:
    """Each call after it has the stored rows, and each unit one slot."""
    bench = bench_of(3)
    calls = [np.arange(0, 12), np.arange(6, 30), np.arange(20, 44), np.arange(3, 15), np.arange(24, 36)]

    def disturbed(stream: NeuronSlots) -> None:
        stream.prefetch(calls[1])
        gathered(stream, calls[2])
        list(stream.pieces())
        gathered(stream, calls[3])

    def in_book_keeping(path: str) -> bool:
        return Path(path).stem in ("slot_cache", "units")

    for line in itertools.count(1, step):
        stream = bench.stream(slots, window=window)
        gathered(stream, calls[0])
        with contextlib.suppress(KeyboardInterrupt), InterruptAt(line, in_book_keeping) as lines:
            disturbed(stream)
        if lines.count < line:
            break
        bench.check_pieces(stream)
        for ids in calls:
            bench.check(gathered(stream, ids), ids)
        unit_of, slot_of = stream.cache.unit_of, stream.cache.slot_of
        assert [slot_of[unit] for unit in unit_of[unit_of >= 0]] == np.flatnonzero(unit_of >= 0).tolist()
        assert stream.cache.resident == np.count_nonzero(slot_of >= 0) == np.count_nonzero(unit_of >= 0)
    assert line > 100


def test_what_is_on_its_way_outlives_its_layer(bench_of: Callable[..., Bench]) -> None:
    bench = bench_of(1)
    stream = bench.stream(40)
    stream.prefetch(np.arange(30))
    (ticket,) = bench.reader._outstanding
    assert ticket.destination is stream.pool and stream.pool is not None
    bench.streamer.drain()
    assert bench.idle and stream.pending is None and not bench.streamer.loading
    assert stream.cache.resident == 0  # the bytes are not trusted
    bench.check(gathered(stream, np.arange(30)), np.arange(30))


class Interrupted(list[Any]):
    """Raises KeyboardInterrupt when an item is removed."""

    def remove(self, value: Any) -> None:
        super().remove(value)
        raise KeyboardInterrupt


def test_an_interrupt_when_reads_have_just_landed(bench_of: Callable[..., Bench]) -> None:
    bench = bench_of(1)
    stream = bench.stream(40)
    bench.streamer.loading = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        gathered(stream, np.arange(30))
    bench.streamer.loading = []
    assert bench.idle and stream.pending is None
    bench.check(gathered(stream, np.arange(30)), np.arange(30))


def test_the_counters_add_up(bench: Bench) -> None:
    stream, counters = bench.stream(5), bench.streamer.counters
    rng = np.random.default_rng(0)
    blocks = 0
    before = counters.copy()

    def blocks_of(ids: Any) -> Any:
        return np.unique(ids // bench.layout.neurons_per_block)

    for _ in range(30):
        ids = np.flatnonzero(rng.random(NEURONS) < rng.random())
        if len(ids):
            gathered(stream, ids)
            at_once = len(blocks_of(ids)) <= stream.cache.slots  # otherwise a block in two pieces counts in both
            size = NEURONS if at_once else bench.layout.piece_neurons
            blocks += sum(len(blocks_of(ids[i : i + size])) for i in range(0, len(ids), size))
    used = counters - before
    assert used.hits > 0 and used.hits + used.misses == blocks
    assert used.bytes == used.misses * bench.layout.block_bytes
    assert 0 < used.reads <= used.misses
    assert used.read_s > 0 and used.wait_s > 0 and used.manage_s > 0

    for slots in (0, 5, 17):
        stream = bench.stream(slots)
        for _ in range(2):
            before = counters.copy()
            bench.check_pieces(stream)
            used = counters - before
            assert used.hits + used.misses == bench.layout.blocks
            assert used.bytes == used.misses * bench.layout.block_bytes
    assert used.misses == 0


def test_a_device_that_does_not_see_the_host_is_refused(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if MLX had copied: the pool's address is not that of its array."""

    class Copying(AlignedPool):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            self.elsewhere = AlignedPool(*arguments)
            self.address = self.elsewhere.address

    message = r"self-test failed: the device does not see what the host writes.*Please report"
    streamer = NeuronFile(bench.file, bench.reader, bench.layout)
    for parts in SUBSETS:
        NeuronSlots(streamer, 0, 3, parts)
    monkeypatch.setattr(stream_module, "AlignedPool", Copying)
    with pytest.raises(FlashError, match=message):
        NeuronFile(bench.file, bench.reader, bench.layout)
    for parts in SUBSETS:  # each has its own views of a layer's slots
        for slots in (1, 3):
            with pytest.raises(FlashError, match=message):
                NeuronSlots(streamer, 0, slots, parts)


@pytest.mark.parametrize("shape", [(), (5,), (3, 700), (2, 3000)])
def test_experts_slots_that_the_device_does_not_see_are_refused(shape: tuple[int, ...]) -> None:
    """The check uses the computed array, because a wrong stride or dtype would have the same effect."""
    for dtype in (mx.uint32, mx.bfloat16, mx.uint8):
        nbytes = int(np.prod(shape)) * dtype.size
        for slots in (1, 3):
            pool = AlignedPool(slots * nbytes, row_bytes=nbytes)
            check_expert_pools({"x": pool}, {"x": pool.array.view(dtype).reshape(slots, *shape)})
            copied = mx.array(np.array(pool.array)).view(dtype).reshape(slots, *shape)
            with pytest.raises(FlashError, match="self-test failed: the device does not see"):
                check_expert_pools({"x": pool}, {"x": copied})


def test_the_self_test_notices_a_stale_copy(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first write arrives, but the second does not, as with a device cache that is not flushed."""
    real, calls = ctypes.memmove, []

    def only_once(*arguments: int) -> None:
        calls.append(arguments)
        if len(calls) <= 2:  # the first and the last block
            real(*arguments)

    monkeypatch.setattr(ctypes, "memmove", only_once)
    with pytest.raises(FlashError, match="self-test failed"):
        NeuronFile(bench.file, bench.reader, bench.layout)
    assert len(calls) == 4


@pytest.mark.parametrize("bits", [4, 8])
def test_right_products_with_packed_rows_pass(bits: int) -> None:
    """Not for bfloat16, in which this backend also sums."""
    check_packed_products(NeuronLayout.plan("float16", 1, 9000, 64, PARTS, bits))
    check_packed_products(NeuronLayout.plan("float32", 1, 5, 256, PARTS, bits))


@pytest.mark.parametrize("count", [1, 7, 63, 64, 1025, 9000])
@pytest.mark.parametrize("transpose", [True, False])
def test_products_that_are_wrong_for_one_number_of_rows_are_refused(
    monkeypatch: pytest.MonkeyPatch, count: int, transpose: bool
) -> None:
    """A kernel for a remainder, or one that adds up parts, may be wrong alone."""
    real = mx.quantized_matmul

    def wrong(x: mx.array, packed: mx.array, *arguments: Any, **options: Any) -> mx.array:
        y = real(x, packed, *arguments, **options)
        return 1.1 * y if len(packed) == count and options["transpose"] == transpose else y

    layout = NeuronLayout.plan("float16", 1, 9000, 64, PARTS, 4)
    assert layout.piece_neurons >= 9000
    monkeypatch.setattr(mx, "quantized_matmul", wrong)
    with pytest.raises(FlashError, match=r"self-test failed: products .*16-bit store"):
        check_packed_products(layout)


def test_a_store_is_what_the_tests_think_it_is(tiny: Any) -> None:
    """Compares the fixture's own reading of a store with the checkpoint."""
    weights: Any = mx.load(str(tiny.checkpoint / "model.safetensors"))
    for layer in range(tiny.manifest.layout.layers):
        up, down = (np.array(weights[f"model.decoder.layers.{layer}.fc{i}.weight"]) for i in (1, 2))
        assert np.array_equal(tiny.rows[layer, 0], up)
        assert np.array_equal(tiny.rows[layer, 1], down.T)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_quantised_store_is_near_its_checkpoint(tiny_of: Callable[[str], Any], name: str) -> None:
    """Each number is within one and a half steps of its group, plus its rounding in 16 bits.

    A step is (max - min) / (2^bits - 1). The bound would be half a step, but MLX moves the ends so that it meets one of
    them and zero exactly.
    """
    tiny = tiny_of(name)
    weights: Any = mx.load(str(tiny.checkpoint / "model.safetensors"))
    layout = tiny.manifest.layout
    assert (layout.bits, layout.neurons_per_block) == ((4, 1) if name == "4 bits" else (8, 16))
    for layer in range(layout.layers):
        names = ("fc1", "fc2") if len(layout.parts) == 2 else ("gate_proj", "up_proj", "down_proj")
        found = [next(n for n in weights if f"layers.{layer}." in n and f"{name}.weight" in n) for name in names]
        for part, matrix in enumerate(found):
            exact = np.array(weights[matrix].astype(mx.float32))
            exact = exact.T if part == len(found) - 1 else exact
            groups = exact.reshape(len(exact), -1, layout.group_size)
            step = (groups.max(axis=-1) - groups.min(axis=-1)) / (2**layout.bits - 1)
            error = np.abs(tiny.rows[layer, part] - exact).reshape(groups.shape).max(axis=-1)
            assert (error <= 1.5 * step + 1e-3 * np.abs(groups).max(axis=-1)).all() and error.max() > 0


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", *QUANTISED])
def test_a_converted_store_streams(tiny_of: Callable[[str], Any], dtype: str, direct: bool) -> None:
    tiny = tiny_of(dtype)
    layout = replace(tiny.manifest.layout)
    with UnitFile(tiny.store / Manifest.neurons_file, direct) as file, Reader(3) as reader:
        streamer = NeuronFile(file, reader, layout)
        ids = np.arange(1, layout.neurons, 3)
        for layer in range(layout.layers):
            stream = NeuronSlots(streamer, layer, 7, layout.parts)
            for part, rows in enumerate(gathered(stream, ids)):
                expected = tiny.rows[layer, part, ids]
                if layout.quantised:
                    assert rows.dtype == mx.float32  # on this backend
                    assert np.abs(np.array(rows) - expected).max() < 1e-6  # one rounding, fused or not
                    continue
                assert rows.dtype == getattr(mx, dtype)
                assert np.array_equal(np.array(rows.astype(mx.float32)), expected)
