"""Rows of a table in a file, behind a cache of rows: book-keeping, reads, errors and interrupts."""

from __future__ import annotations

import contextlib
import os
import tracemalloc
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from interrupts import InterruptAt  # type: ignore[import-not-found]  # found beside this file

from mlx_flash.errors import ReadError, UsageError
from mlx_flash.flash import table_rows as engine
from mlx_flash.flash.in_place import InPlaceFiles, TableTensor
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.slot_cache import SlotCache
from mlx_flash.flash.table_rows import WAYS, RowCache, TableRows, rows_per_sum, summed_segments
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.flash.unit_sums import Ranges, make_sums
from mlx_flash.layers.streamed_table import StreamedTable

ROWS, WIDTH = 1000, 24
BEFORE = 77  # bytes of the file before the first row


def contents_of(keys: np.ndarray, nbytes: int = 3) -> np.ndarray:
    """The bytes of rows as a function of their keys: (n,) -> (n, nbytes)"""
    return (keys[:, None] * 7 + np.arange(nbytes)).astype(np.uint8)


@pytest.fixture
def table() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((ROWS, WIDTH), np.float32)


@pytest.fixture
def file(table: np.ndarray, tmp_path: Path) -> Path:
    """A file that ends with the table's last row, at an offset that is no multiple of a block."""
    path = tmp_path / "table"
    path.write_bytes(bytes(BEFORE) + table.tobytes())
    return path


@pytest.fixture
def open_rows(file: Path) -> Iterator[Callable[..., TableRows]]:
    """Opens the table's rows with so many slots. compared: with checksums."""
    opened: list[InPlaceFiles] = []

    def open_one(slots: int, direct: bool = True, compared: bool = False) -> TableRows:
        tensors = {"weight": TableTensor(0, BEFORE, ROWS, (WIDTH,), mx.float32)}
        reader, unit = Reader(4), UnitFile(file, direct)
        shared = InPlaceFiles([unit], reader)
        opened.append(shared)
        if compared:
            ((_, offsets, lengths),) = summed_segments(tensors)
            unit.sums = make_sums(unit, reader, Ranges.of_units(offsets, lengths), lambda _: None, lambda _: None)
        cache = RowCache({"weight": 4 * WIDTH}, slots)
        return TableRows(shared, "table", tensors, cache, group_rows=rows_per_sum(tensors) if compared else 1)

    yield open_one
    for shared in opened:
        shared.close()


def taken(rows: TableRows, *wanted: int) -> np.ndarray:
    """The rows that a call takes, as float32 (n, WIDTH)."""
    found = rows.take(np.array(sorted(wanted), np.int64))
    return found["weight"].view(np.float32)


# -- book-keeping ----------------------------------------------------------------------------------------------------

calls = st.lists(st.lists(st.integers(0, 60), unique=True, max_size=20), max_size=12)


@given(slots=st.integers(0, 40), calls=calls)
def test_the_cache_is_a_set_of_least_recently_used_rows(slots: int, calls: list[list[int]]) -> None:
    """Compares it with a model of loops: each set has slots of [number of the last call that used it, key]."""
    cache = RowCache({"a": 3, "b": 1}, slots)
    ways = max(1, min(WAYS, slots))
    sets = [[[0, -1] for _ in range(ways)] for _ in range(slots // ways)]
    assert cache.slots == len(sets) * ways and slots - cache.slots < ways
    hits = 0
    for number, call in enumerate(calls, 1):
        keys = np.array(sorted(call), np.int64)
        places = cache.find(keys)
        here = np.flatnonzero(places >= 0)
        used = [slot for each in sets for slot in each if slot[1] in call]
        assert keys[here].tolist() == sorted(key for _, key in used)
        hits += len(used)
        for slot in used:
            slot[0] = number
        found = {name: np.zeros((len(keys), size), np.uint8) for name, size in (("a", 3), ("b", 1))}
        cache.copy_into(found, here, places[here])
        assert np.array_equal(found["a"][here], contents_of(keys[here]))
        assert np.array_equal(found["b"][here], contents_of(keys[here], 1))
        absent = keys[places < 0]
        cache.keep(absent, {"a": contents_of(absent), "b": contents_of(absent, 1)})
        for turn, each in enumerate(sets):
            new = [key for key in absent.tolist() if key % len(sets) == turn]
            for slot, key in zip(sorted(each, key=lambda slot: slot[0]), new, strict=False):
                slot[:] = number, key
    assert cache.hits == hits and cache.hits + cache.misses == sum(map(len, calls))


def test_a_cache_with_a_slot_for_every_row_holds_them_all() -> None:
    cache, keys = RowCache({"a": 3}, ROWS), np.arange(ROWS, dtype=np.int64)
    cache.keep(keys, {"a": contents_of(keys)})
    assert len(set(cache.find(keys).tolist())) == ROWS


@pytest.mark.parametrize("slots", [256, 1024])
def test_eight_places_find_as_many_rows_as_an_exact_order_of_use(slots: int) -> None:
    """For tokens by Zipf's law, one row each. It also finds as many as fading use, by which experts are evicted."""
    vocabulary, calls = 262_144, 20_000
    weights = 1 / np.arange(1, vocabulary + 1)
    ids = np.random.default_rng(0).choice(vocabulary, calls, p=weights / weights.sum())
    cache, fading = RowCache({"a": 1}, slots), SlotCache(vocabulary, slots)
    order: OrderedDict[int, None] = OrderedDict()
    exact = faded = 0
    for row in ids.tolist():
        key = np.array([row])
        if cache.find(key)[0] < 0:
            cache.keep(key, {"a": np.zeros((1, 1), np.uint8)})
        exact += row in order
        order[row] = None
        order.move_to_end(row)
        if len(order) > slots:
            order.popitem(last=False)
        faded += fading.mark_used(key)
        fading.commit(*fading.reserve(key))
    assert abs(cache.hits - exact) < 0.01 * exact
    assert abs(cache.hits - faded) < 0.01 * faded


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compared", [False, True])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("slots", [0, 1, 60, ROWS])
def test_rows_are_those_of_the_file(
    open_rows: Callable[..., TableRows], table: np.ndarray, slots: int, direct: bool, compared: bool
) -> None:
    rows, random = open_rows(slots, direct, compared), np.random.default_rng(1)
    for count in (1, 2, 0, 1, 300, ROWS, 1, 40):
        wanted = np.unique(np.minimum(random.geometric(0.01, count), ROWS) - 1) if count < ROWS else np.arange(ROWS)
        assert np.array_equal(taken(rows, *wanted.tolist()), table[wanted])
    read = rows.shared.counters.bytes
    assert np.array_equal(taken(rows, 0, ROWS - 1), table[[0, ROWS - 1]])
    assert (rows.shared.counters.bytes == read) == (slots == ROWS)


def test_the_last_row_ends_where_the_file_ends(open_rows: Callable[..., TableRows], table: np.ndarray) -> None:
    rows = open_rows(0)
    assert np.array_equal(taken(rows, ROWS - 1), table[-1:])
    assert rows.shared.files[0].size % 4096


def test_a_call_is_one_batch_of_reads_and_neighbours_are_one_read(open_rows: Callable[..., TableRows]) -> None:
    rows = open_rows(0)
    taken(rows, *range(100, 200), 400, 600)
    assert rows.shared.counters.reads == 3


def test_tables_of_one_kind_share_a_cache(tmp_path: Path) -> None:
    contents = np.random.default_rng(0).integers(0, 256, (2, 50, 5), np.uint8)
    (tmp_path / "tables").write_bytes(contents.tobytes())
    shared = InPlaceFiles([UnitFile(tmp_path / "tables")], Reader(2))
    cache = RowCache({"weight": 5}, 100)
    places = [TableTensor(0, number * 250, 50, (5,), mx.uint8) for number in range(2)]
    tables = [TableRows(shared, f"t{n}", {"weight": place}, cache, 50 * n) for n, place in enumerate(places)]
    try:
        for _ in range(2):
            for number, table in enumerate(tables):
                assert np.array_equal(table.take(np.array([3, 49]))["weight"], contents[number, [3, 49]])
        assert (cache.hits, cache.misses) == (4, 4)
    finally:
        shared.close()


def test_no_memory_is_in_proportion_to_the_rows(tmp_path: Path) -> None:
    """The file has 30 GB, of which only the first and the last row are written."""
    rows, width = 60_000_000, 512
    path = tmp_path / "table"
    with path.open("wb") as file:
        file.truncate(rows * width)
        for row in (0, rows - 1):
            file.seek(row * width)
            file.write(contents_of(np.array([row]), width).tobytes())
    tracemalloc.start()
    try:
        shared = InPlaceFiles([UnitFile(path)], Reader(2))
        cache = RowCache({"weight": width}, 64)
        table = TableRows(shared, "table", {"weight": TableTensor(0, 0, rows, (width,), mx.uint8)}, cache)
        for _ in range(2):
            found = table.take(np.array([0, 12_345_678, rows - 1]))["weight"]
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    shared.close()
    assert np.array_equal(found[[0, 2]], contents_of(np.array([0, rows - 1]), width))
    assert not found[1].any() and cache.hits == 3


# -- the layer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slots", [0, 8, ROWS])
def test_the_layer_has_the_bits_of_the_embedding(
    open_rows: Callable[..., TableRows], table: np.ndarray, slots: int
) -> None:
    resident = nn.Embedding(ROWS, WIDTH)
    resident.weight = mx.array(table)
    layer = StreamedTable(nn.Embedding(1, 1), open_rows(slots))
    assert not layer.parameters()
    asked = [np.array([[5, 5, 999, 0]]), np.array([[[3], [-1]]]), np.array([7]), np.array(11), np.zeros((1, 0), int)]
    for ids in asked:
        for dtype in (mx.int32, mx.int64, *((mx.uint32,) if (ids >= 0).all() else ())):
            found, expected = layer(mx.array(ids, dtype)), resident(mx.array(ids, dtype))
            assert found.dtype == expected.dtype and found.shape == expected.shape
            assert np.array_equal(np.array(found), np.array(expected)), ids


def test_earlier_results_do_not_change_when_rows_are_replaced(
    open_rows: Callable[..., TableRows], table: np.ndarray
) -> None:
    """The results are evaluated only after later calls have used every slot anew."""
    layer = StreamedTable(nn.Embedding(1, 1), open_rows(8))
    asked = np.random.default_rng(2).integers(0, ROWS, (20, 5))
    results = [layer(mx.array(ids)) for ids in asked]
    for ids, result in zip(asked, results, strict=True):
        assert np.array_equal(np.array(result), table[ids])


@pytest.mark.parametrize("ids", [[ROWS], [3, -ROWS - 1]])
def test_rows_beyond_the_table_are_refused(open_rows: Callable[..., TableRows], ids: list[int]) -> None:
    layer = StreamedTable(nn.Embedding(1, 1), open_rows(8))
    with pytest.raises(UsageError, match=f"A table of {ROWS} rows was asked for rows"):
        layer(mx.array(ids))


# -- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_read_error_names_the_rows_and_leaves_the_cache_right(
    open_rows: Callable[..., TableRows], file: Path, table: np.ndarray
) -> None:
    rows, whole = open_rows(40), file.read_bytes()
    assert np.array_equal(taken(rows, 10, 20), table[[10, 20]])
    os.truncate(file, BEFORE + 500 * 4 * WIDTH)
    with pytest.raises(ReadError, match=r"table, row 700, weight: the file ends early"):
        taken(rows, 10, 30, 700)
    assert not rows.shared.reader.outstanding
    assert np.array_equal(taken(rows, 10, 20, 30), table[[10, 20, 30]])
    file.write_bytes(whole)
    assert np.array_equal(taken(rows, 10, 30, 700), table[[10, 30, 700]])


def test_a_flipped_bit_is_caught_by_the_sums(
    open_rows: Callable[..., TableRows], file: Path, table: np.ndarray
) -> None:
    rows = open_rows(0, compared=True)
    with file.open("r+b") as opened:
        opened.seek(BEFORE + 900 * 4 * WIDTH + 5)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 4]))
    first = 900 // rows_per_sum(rows.tensors) * rows_per_sum(rows.tensors)
    with pytest.raises(ReadError, match=rf"table, rows {first}-999, weight: .* checksum"):
        taken(rows, 950)
    assert np.array_equal(taken(rows, 3), table[[3]])


def test_the_sums_cover_the_whole_table(table: np.ndarray, file: Path) -> None:
    tensors = {
        "weight": TableTensor(0, BEFORE, ROWS, (WIDTH,), mx.float32),
        "scales": TableTensor(1, 5, ROWS, (2,), mx.float16),
    }
    for (number, offsets, lengths), tensor in zip(summed_segments(tensors), tensors.values(), strict=True):
        assert number == tensor.file and offsets[0] == tensor.begin
        assert np.array_equal(offsets[1:], offsets[:-1] + lengths[:-1])
        assert offsets[-1] + lengths[-1] == tensor.begin + ROWS * tensor.nbytes
    offsets, lengths = summed_segments(tensors)[0][1:]
    sums = [zlib.crc32(file.read_bytes()[o : o + n]) for o, n in zip(offsets, lengths, strict=True)]
    assert len(set(sums)) == len(sums) > 1


def test_ctrl_c_between_any_two_lines_leaves_the_cache_right(
    open_rows: Callable[..., TableRows], table: np.ndarray
) -> None:
    def in_engine(path: str) -> bool:
        return path == engine.__file__

    rows, line, random = open_rows(16), 0, np.random.default_rng(3)
    interrupted = True
    while interrupted:
        line += 1
        wanted = np.unique(random.integers(0, 40, 12))
        with contextlib.suppress(KeyboardInterrupt), InterruptAt(line, in_engine) as lines:
            taken(rows, *wanted.tolist())
        interrupted = lines.count >= line
        assert not rows.shared.reader.outstanding
        every = np.arange(40)
        places = rows.cache.find(every)
        here = np.flatnonzero(places >= 0)
        held = {"weight": np.zeros((40, 4 * WIDTH), np.uint8)}
        rows.cache.copy_into(held, here, places[here])
        assert np.array_equal(held["weight"].view(np.float32)[here], table[here])
        assert np.array_equal(taken(rows, *wanted.tolist()), table[wanted])
    assert line > 40
