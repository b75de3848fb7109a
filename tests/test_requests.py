"""How segments become requests: reader.c's tables against the same rules in NumPy."""

from __future__ import annotations

import ctypes
import itertools

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_flash.flash import reader as reader_module
from mlx_flash.flash.reader import BOUNCE_BYTES_PER_THREAD
from mlx_flash.flash.requests import MERGE_BYTES
from mlx_flash.flash.system import READ_ALIGNMENT

PAGE = READ_ALIGNMENT
SIZE = 5 * MERGE_BYTES + 3 * PAGE + 1234
Columns = tuple[np.ndarray, np.ndarray, np.ndarray]


def columns(*rows: tuple[int, int, int]) -> Columns:
    offsets, addresses, lengths = np.array(rows, np.int64).reshape(-1, 3).T.copy()
    return offsets, addresses, lengths


def planned(segments: Columns, alignment: int = 1, request_bytes: int = MERGE_BYTES) -> tuple[np.ndarray, np.ndarray]:
    """What mf_plan makes: requests (r, 3) of (offset, first iovec, number of iovecs), iovecs (m, 2) of (address,
    length)."""
    library, int64 = reader_module._library()[0], ctypes.c_int64
    library.mf_count_iovecs.restype = library.mf_plan.restype = int64
    rules = reader_module._Rules(SIZE, alignment, request_bytes, PAGE)
    offsets, addresses, lengths = (ctypes.c_void_p(column.ctypes.data) for column in segments)
    count = int64(len(segments[0]))
    most = library.mf_count_iovecs(offsets, lengths, count, ctypes.byref(rules))
    assert most >= 0
    requests, iovecs = np.full((most, 3), -1, np.int64), np.full((most, 2), -1, np.int64)
    tables = (ctypes.c_void_p(table.ctypes.data) for table in (requests, iovecs))
    made = library.mf_plan(offsets, addresses, lengths, count, ctypes.byref(rules), *tables)
    assert (iovecs >= 0).all()  # as many as were counted
    return requests[:made], iovecs


def expected(segments: Columns, alignment: int, request_bytes: int) -> tuple[np.ndarray, np.ndarray]:
    """`planned`, in NumPy."""
    offsets, addresses, lengths = (column[segments[2] > 0] for column in segments)
    pieces = np.maximum((lengths + request_bytes // 2) // request_bytes, 1)
    owner = np.repeat(np.arange(len(lengths)), pieces)
    turn = np.arange(len(owner)) - (np.cumsum(pieces) - pieces)[owner]
    head = offsets[owner] % PAGE
    begin = np.where(turn == 0, 0, turn * request_bytes - head)
    end = np.where(turn == pieces[owner] - 1, lengths[owner], (turn + 1) * request_bytes - head)
    offsets, addresses, lengths = offsets[owner] + begin, addresses[owner] + begin, end - begin
    starts = np.ones(len(owner), np.bool_)
    starts[1:] = offsets[1:] != offsets[:-1] + lengths[:-1]
    long = lengths >= request_bytes // 2
    starts[1:] |= long[1:] | long[:-1]
    loose = ((offsets | addresses | lengths) % alignment != 0) & (alignment > 1)
    starts[1:] |= loose[1:] != loose[:-1]
    run = np.maximum.accumulate(np.where(starts, np.arange(len(owner)), 0))
    window = (offsets - offsets[run]) // request_bytes
    starts[1:] |= window[1:] != window[:-1]
    first = np.flatnonzero(starts)
    counts = np.diff(np.append(first, len(owner)))
    return np.stack((offsets[first], first, counts), axis=1), np.stack((addresses, lengths), axis=1)


LENGTHS = [0, 1, 100, PAGE, PAGE, 2 * PAGE, 32 * PAGE, MERGE_BYTES // 2 - 1, MERGE_BYTES // 2, MERGE_BYTES]
LONG = [3 * MERGE_BYTES // 2 - 1, 3 * MERGE_BYTES // 2, 2 * MERGE_BYTES + 5]


@settings(deadline=None, max_examples=300)
@given(
    steps=st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, PAGE]), st.sampled_from(LENGTHS + LONG)), max_size=40),
    skip=st.sampled_from([0, PAGE, 1, 512]),
    skew=st.sampled_from([0, 0, 1, 512]),
    alignment=st.sampled_from([1, PAGE]),
    request_bytes=st.sampled_from([PAGE, 32 * PAGE, MERGE_BYTES]),
)
def test_requests_are_those_of_the_rules(
    steps: list[tuple[int, int]], skip: int, skew: int, alignment: int, request_bytes: int
) -> None:
    rows, at = [], skip
    for gap, length in steps:
        if at + gap + length <= SIZE:
            rows.append((at + gap, (1 << 40) + 3 * at + skew, length))
            at += gap + length
    segments = columns(*rows)
    for found, table in zip(
        planned(segments, alignment, request_bytes), expected(segments, alignment, request_bytes), strict=True
    ):
        assert np.array_equal(found, table)


def test_neighbours_become_one_request() -> None:
    rows = [(i * PAGE, 10 * PAGE * (i + 1), PAGE) for i in range(600) if i != 7]
    requests, iovecs = planned(columns(*rows))
    assert len(iovecs) == 599
    assert requests[:, 0].tolist() == [0, 8 * PAGE, 8 * PAGE + MERGE_BYTES, 8 * PAGE + 2 * MERGE_BYTES]
    assert requests[:, 1].tolist() == [0, 7, 7 + 256, 7 + 512]
    assert requests[:, 2].tolist() == [7, 256, 256, 599 - 519]


def test_an_unaligned_segment_leaves_its_neighbours_direct() -> None:
    rows = [(0, PAGE, PAGE), (PAGE, 9 * PAGE, 100), (PAGE + 100, 10 * PAGE, PAGE - 100), (2 * PAGE, 4 * PAGE, PAGE)]
    assert planned(columns(*rows), alignment=PAGE)[0][:, 2].tolist() == [1, 2, 1]
    assert planned(columns(*rows), alignment=1)[0][:, 2].tolist() == [4]


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(
        st.sampled_from([1, PAGE, MERGE_BYTES // 2 - 1, MERGE_BYTES, 1572863, 1572864, 2 * MERGE_BYTES + 5])
    ),
    skip=st.integers(0, 2 * PAGE),
    alignment=st.sampled_from([1, PAGE]),
)
def test_requests_are_bounded_and_complete(lengths: list[int], skip: int, alignment: int) -> None:
    lengths = [n for n, end in zip(lengths, itertools.accumulate(lengths), strict=True) if end + skip <= SIZE]
    offsets = skip + np.concatenate(([0], np.cumsum(lengths)))[:-1].astype(np.int64)
    requests, iovecs = planned((offsets, offsets + (1 << 40), np.array(lengths, np.int64)), alignment)
    assert iovecs[:, 1].sum() == sum(lengths)
    assert (iovecs[:, 1] > 0).all()
    at = skip
    for offset, first, count in requests:
        run = iovecs[first : first + count]
        assert offset == at and run[0, 0] == at + (1 << 40)
        at += run[:, 1].sum()
        first_page, end_page = offset // PAGE, -(-at // PAGE)
        assert (end_page - first_page) * PAGE <= BOUNCE_BYTES_PER_THREAD
