"""The reader against the plain contents of real files."""

from __future__ import annotations

import ctypes
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_flash.errors import BudgetError, FlashError, ReadError, UsageError
from mlx_flash.flash import reader as reader_module
from mlx_flash.flash.reader import BOUNCE_BYTES_PER_THREAD, MERGE_BYTES, Reader, UnitFile, plan_requests
from mlx_flash.flash.system import READ_ALIGNMENT

PAGE = READ_ALIGNMENT
SIZE = 5 * MERGE_BYTES + 3 * PAGE + 1234  # not a multiple of a page: the last one can only be read in part
GUARD = 0xAB


@pytest.fixture(scope="module")
def contents() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, contents: np.ndarray) -> Path:
    path = tmp_path_factory.mktemp("reader") / "units.bin"
    path.write_bytes(contents.tobytes())
    return path


@pytest.fixture
def own_path(tmp_path: Path, contents: np.ndarray) -> Path:
    """A file that a test may change."""
    path = tmp_path / "units.bin"
    path.write_bytes(contents[: 64 * PAGE].tobytes())
    return path


@pytest.fixture(scope="module", params=[1, 16])
def reader(request: pytest.FixtureRequest) -> Iterator[Reader]:
    with Reader(request.param) as reader:
        yield reader


@pytest.fixture(scope="module", params=[True, False], ids=["direct", "buffered"])
def file(request: pytest.FixtureRequest, path: Path) -> Iterator[UnitFile]:
    with UnitFile(path, direct=request.param) as file:
        yield file


def destination(nbytes: int) -> np.ndarray:
    """Page-aligned guard bytes."""
    base = np.full(nbytes + PAGE, GUARD, np.uint8)
    start = -base.ctypes.data % PAGE
    return base[start : start + nbytes]


def columns(*rows: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets, addresses, lengths = np.array(rows, np.int64).reshape(-1, 3).T
    return offsets, addresses, lengths


def read_and_compare(
    reader: Reader, file: UnitFile, contents: np.ndarray, segments: list[tuple[int, int]], gap: int = 0, skew: int = 0
) -> None:
    """Reads (offset, length) segments to places in reverse order, `gap` bytes apart, and compares every byte."""
    room = [length + gap for _, length in segments]
    places = [skew + sum(room[i + 1 :]) for i in range(len(room))]
    target = destination(skew + sum(room) + PAGE)
    expected = target.copy()
    for (offset, length), place in zip(segments, places, strict=True):
        expected[place : place + length] = contents[offset : offset + length]
    rows = [(offset, target.ctypes.data + place, n) for (offset, n), place in zip(segments, places, strict=True)]
    report = reader.read(file, *columns(*rows))
    assert np.array_equal(target, expected)
    assert report.bytes >= sum(length for _, length in segments)
    assert report.seconds >= 0
    assert report.requests >= (sum(length for _, length in segments) > 0)


@st.composite
def segment_sets(draw: st.DrawFn) -> list[tuple[int, int]]:
    """(gap before, length) pairs -> ascending segments; a unit of a page makes them aligned, one of a byte not."""
    unit = draw(st.sampled_from([1, 512, PAGE]))
    most = draw(st.sampled_from([3, 40, 400]))
    position, segments = draw(st.integers(0, 9)) * unit, []
    for gap, length in draw(
        st.lists(st.tuples(st.sampled_from([0, 0, 0, 1, 7]), st.integers(0, most)), min_size=1, max_size=30)
    ):
        offset = position + gap * unit
        if offset + length * unit > SIZE:
            break
        segments.append((offset, length * unit))
        position = offset + length * unit
    return segments


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(segments=segment_sets(), gap=st.sampled_from([0, 0, 1, PAGE]), skew=st.sampled_from([0, 0, 1, 512]))
def test_any_segments(
    reader: Reader, file: UnitFile, contents: np.ndarray, segments: list[tuple[int, int]], gap: int, skew: int
) -> None:
    read_and_compare(reader, file, contents, segments, gap, skew)


@pytest.mark.parametrize("skew", [0, 3])
def test_the_whole_file_and_its_unaligned_tail(reader: Reader, file: UnitFile, contents: np.ndarray, skew: int) -> None:
    read_and_compare(reader, file, contents, [(0, SIZE)], skew=skew)
    read_and_compare(reader, file, contents, [(SIZE - 1, 1)], skew=skew)
    read_and_compare(reader, file, contents, [(5, SIZE - 5)], skew=skew)


def test_very_many_segments(reader: Reader, file: UnitFile, contents: np.ndarray) -> None:
    """More destinations in one request than one preadv takes, and more requests than a thread takes at once."""
    length = 24
    offsets = np.arange(0, SIZE - length, length, dtype=np.int64)
    place = np.random.default_rng(1).permutation(len(offsets))
    target = np.zeros((len(offsets), length), np.uint8)
    reader.read(file, offsets, target.ctypes.data + place * length, np.full(len(offsets), length))
    assert np.array_equal(target[place], contents[: len(offsets) * length].reshape(-1, length))

    offsets = np.random.default_rng(2).integers(0, SIZE // PAGE, 5000) * PAGE  # in any order, with repetitions
    target = destination(len(offsets) * PAGE).reshape(-1, PAGE)
    report = reader.read(file, offsets, target.ctypes.data + np.arange(5000) * PAGE, np.full(5000, PAGE))
    assert report.requests > 4000
    assert np.array_equal(target, contents[: SIZE // PAGE * PAGE].reshape(-1, PAGE)[offsets // PAGE])


def test_nothing_to_read(reader: Reader, file: UnitFile) -> None:
    assert reader.read(file, *columns()).requests == 0
    report = reader.read(file, *columns((0, 0, 0), (SIZE, 0, 0)))
    assert (report.requests, report.bytes) == (0, 0)


def test_neighbours_become_one_request(path: Path) -> None:
    with UnitFile(path) as file:
        rows = [(i * PAGE, 10 * PAGE * (i + 1), PAGE) for i in range(600) if i != 7]
        requests, iovecs = plan_requests(file, *columns(*rows))
        assert len(iovecs) == 599
        assert requests[:, 0].tolist() == [0, 8 * PAGE, 8 * PAGE + MERGE_BYTES, 8 * PAGE + 2 * MERGE_BYTES]
        assert requests[:, 1].tolist() == [0, 7, 7 + 256, 7 + 512]
        assert requests[:, 2].tolist() == [7, 256, 256, 599 - 519]


def test_an_unaligned_segment_leaves_its_neighbours_direct(path: Path) -> None:
    with UnitFile(path) as file:
        rows = [(0, PAGE, PAGE), (PAGE, 9 * PAGE, 100), (PAGE + 100, 10 * PAGE, PAGE - 100), (2 * PAGE, 4 * PAGE, PAGE)]
        requests, _ = plan_requests(file, *columns(*rows))
        assert requests[:, 2].tolist() == ([1, 2, 1] if file.direct else [4])


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks=st.lists(st.integers(0, 900), max_size=200),
    ordered=st.booleans(),
    length=st.sampled_from([0, 1, 100, PAGE, 2 * PAGE, MERGE_BYTES // 2, MERGE_BYTES]),
    shift=st.sampled_from([0, 0, 8]),
)
def test_one_length_for_all_is_the_same(path: Path, blocks: list[int], ordered: bool, length: int, shift: int) -> None:
    """The quick way of planning against the general one, on whatever it is given."""
    blocks = sorted(set(blocks)) if ordered else blocks
    offsets = np.array(blocks, np.int64) * length + shift
    addresses = np.arange(len(blocks), dtype=np.int64) * length + (1 << 40) + shift
    arguments = offsets, addresses, np.full(len(blocks), length, np.int64)
    with UnitFile(path) as file:
        try:
            expected = plan_requests(file, *arguments)
        except ReadError:
            with pytest.raises(ReadError):
                plan_requests(file, offsets, addresses, length)
            return
        for found, table in zip(plan_requests(file, offsets, addresses, length), expected, strict=True):
            assert np.array_equal(found, table)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths=st.lists(
        st.sampled_from([1, PAGE, MERGE_BYTES // 2 - 1, MERGE_BYTES, 1572863, 1572864, 2 * MERGE_BYTES + 5])
    ),
    skip=st.integers(0, 2 * PAGE),
)
def test_requests_are_bounded_and_complete(path: Path, lengths: list[int], skip: int) -> None:
    with UnitFile(path) as file:
        lengths = [n for n, end in zip(lengths, itertools.accumulate(lengths), strict=True) if end + skip <= SIZE]
        offsets = skip + np.concatenate(([0], np.cumsum(lengths)))[:-1].astype(np.int64)
        requests, iovecs = plan_requests(file, offsets, offsets + (1 << 40), np.array(lengths, np.int64))
        assert iovecs[:, 1].sum() == sum(lengths)
        assert (iovecs[:, 1] > 0).all()
        at = skip
        for offset, first, count in requests:
            run = iovecs[first : first + count]
            assert offset == at and run[0, 0] == at + (1 << 40)
            at += run[:, 1].sum()
            first_page, end_page = offset // PAGE, -(-at // PAGE)
            assert (end_page - first_page) * PAGE <= BOUNCE_BYTES_PER_THREAD


def test_alignment_is_counted(path: Path) -> None:
    target = destination(PAGE)
    with UnitFile(path) as file, Reader(2) as reader:
        report = reader.read(file, *columns((PAGE - 1, target.ctypes.data, 2)))
        assert report.bytes == (2 * PAGE if file.direct else 2)


@pytest.mark.parametrize("row", [(SIZE, 1), (0, SIZE + 1), (-1, 1), (0, -1), (2**62, 2**62)])
def test_a_segment_outside_the_file(reader: Reader, file: UnitFile, row: tuple[int, int]) -> None:
    with pytest.raises(ReadError, match=r"units\.bin .* lie outside"):
        reader.submit(file, *columns((0, 0, 0), (row[0], 0, row[1])))


def test_arrays_that_disagree(reader: Reader, file: UnitFile) -> None:
    with pytest.raises(ValueError, match="must be"):
        reader.submit(file, np.zeros(2, np.int64), np.zeros(1, np.int64), np.zeros(2, np.int64))
    with pytest.raises(ValueError, match="integers"):
        reader.submit(file, *[np.zeros(1)] * 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("direct", [True, False])
@pytest.mark.parametrize("left", [0, 8 * PAGE, 8 * PAGE + 100, 9 * PAGE + 4000])
def test_a_file_truncated_after_opening(reader: Reader, own_path: Path, direct: bool, left: int) -> None:
    target = destination(4 * PAGE)
    with UnitFile(own_path, direct) as file:
        os.truncate(own_path, left)
        for offset, length in [(7 * PAGE, 4 * PAGE), (7 * PAGE + 5, 4 * PAGE - 100)]:
            expected = f"wanted {length} bytes at {offset}, got {min(max(left - offset, 0), length)}; .* truncated"
            with pytest.raises(ReadError, match=f"{own_path}.*ends early: {expected}"):
                reader.read(file, *columns((offset, target.ctypes.data, length)))
        with pytest.raises(ReadError, match="changed"):
            file.verify_unchanged()


def test_an_error_does_not_poison_other_batches(
    reader: Reader, own_path: Path, path: Path, contents: np.ndarray
) -> None:
    target = destination(64 * PAGE)
    where = np.arange(64, dtype=np.int64) * PAGE
    lengths = np.full(64, PAGE)
    with UnitFile(own_path) as broken, UnitFile(path) as sound:
        os.truncate(own_path, 32 * PAGE)
        scattered = target.ctypes.data + where[::-1]
        bad = [reader.submit(broken, where, scattered, lengths) for _ in range(3)]
        good = reader.submit(sound, where + MERGE_BYTES, target.ctypes.data + where, lengths)
        for ticket in bad:
            with pytest.raises(ReadError, match="ends early"):
                reader.wait(ticket)
        reader.wait(good)
        reader.read(sound, where + MERGE_BYTES, target.ctypes.data + where, lengths)
    assert np.array_equal(target, contents[MERGE_BYTES : MERGE_BYTES + 64 * PAGE])


def test_input_output_errors_are_named(reader: Reader, own_path: Path, tmp_path: Path) -> None:
    target = destination(PAGE)
    rows = columns((0, target.ctypes.data, PAGE))
    with UnitFile(own_path) as file:
        directory = os.open(tmp_path, os.O_RDONLY)
        os.dup2(directory, file.fd)
        os.close(directory)
        with pytest.raises(ReadError, match=rf"{own_path}: reading {PAGE} bytes at 0 failed: .*directory.* \(error"):
            reader.read(file, *rows)
        os.close(file.fd)
        with pytest.raises(ReadError, match="Bad file descriptor"):
            reader.read(file, *rows)
        with pytest.raises(ReadError, match="Bad file descriptor"):
            file.verify_unchanged()
        file.fd = -1
    with UnitFile(own_path) as file, pytest.raises(ReadError, match="Bad address"):
        reader.read(file, *columns((0, PAGE, PAGE)))  # a page that no process maps


def test_several_tickets_in_any_order(reader: Reader, file: UnitFile, contents: np.ndarray) -> None:
    count, length = 40, 3 * PAGE
    target = destination(count * length).reshape(count, length)
    tickets = [reader.submit(file, *columns((2 * i * length, target[i].ctypes.data, length))) for i in range(count)]
    order = np.random.default_rng(3).permutation(count)
    for i in order:
        assert reader.wait(tickets[i]).requests == 1
        assert np.array_equal(target[i], contents[2 * i * length :][:length])
    with pytest.raises(ReadError, match="already waited"):
        reader.wait(tickets[0])


def test_closing_the_reader_finishes_the_reads(file: UnitFile, contents: np.ndarray) -> None:
    target = destination(MERGE_BYTES)
    reader = Reader(4)
    ticket = reader.submit(file, *columns((PAGE, target.ctypes.data, MERGE_BYTES)))
    reader.close()
    reader.close()
    assert np.array_equal(target, contents[PAGE : PAGE + MERGE_BYTES])
    with pytest.raises(ReadError, match="already waited"):
        reader.wait(ticket)
    with pytest.raises(ReadError, match="closed"):
        reader.submit(file, *columns((0, target.ctypes.data, 1)))


def test_closing_a_file_waits_for_its_reads(reader: Reader, own_path: Path, contents: np.ndarray) -> None:
    target = destination(PAGE)
    file = UnitFile(own_path)
    ticket = reader.submit(file, *columns((0, target.ctypes.data, PAGE)))
    file.close()
    assert file.fd >= 0
    with pytest.raises(ReadError, match="closed"):
        reader.submit(file, *columns((0, target.ctypes.data, PAGE)))
    reader.wait(ticket)
    assert file.fd == -1
    assert np.array_equal(target, contents[:PAGE])
    with pytest.raises(ReadError, match="closed"):
        file.verify_unchanged()


def test_a_changed_file_is_noticed(own_path: Path) -> None:
    with UnitFile(own_path) as file:
        assert (file.size, file.path) == (64 * PAGE, own_path)
        assert file.alignment == (PAGE if file.direct else 1)
        file.verify_unchanged()
        status = own_path.stat()
        os.utime(own_path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        with pytest.raises(ReadError, match="changed while"):
            file.verify_unchanged()


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ReadError, match=r"missing\.bin cannot be opened .* No such file"):
        UnitFile(tmp_path / "missing.bin")
    for direct in (True, False):
        with pytest.raises(ReadError):
            UnitFile(tmp_path, direct)


def test_threads_are_bounded_below() -> None:
    with pytest.raises(UsageError, match="at least 1"):
        Reader(0)


def test_a_missing_or_foreign_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load = reader_module._library.__wrapped__
    monkeypatch.setattr(reader_module, "__file__", str(tmp_path / "reader.py"))
    with pytest.raises(FlashError, match="C compiler"):
        load()
    (tmp_path / "_reader.so").write_bytes(b"not a library")
    with pytest.raises(FlashError, match="cannot be used"):
        load()
    monkeypatch.undo()
    monkeypatch.setattr(reader_module, "_ABI", -5)
    with pytest.raises(FlashError, match="another version"):
        load()


def test_forgotten_readers_and_children_do_not_hang(path: Path) -> None:
    """Exit with reads outstanding; and a forked child, which lacks the threads, drops its copy of the reader."""
    program = f"""
import os, numpy as np
from mlx_flash.flash.reader import Reader, UnitFile
reader, file, target = Reader(4), UnitFile({str(path)!r}), np.zeros({MERGE_BYTES}, np.uint8)
child = os.fork()
if child == 0:
    reader.close()
    os._exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
one = np.array([1])
reader.submit(file, one, one * target.ctypes.data, one * {MERGE_BYTES})
print("submitted")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "submitted\n", "")


def test_a_budget_error_keeps_its_figures() -> None:
    error = pickle.loads(pickle.dumps(BudgetError("Too small.", 123, 500, 400)))
    assert (str(error), error.smallest_bytes, error.full_bytes, error.units_bytes) == ("Too small.", 123, 500, 400)
    assert error.exit_code == 2


def test_result_layout_is_six_int64() -> None:
    assert ctypes.sizeof(reader_module._Result) == 48
