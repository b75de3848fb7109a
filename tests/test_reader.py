"""The reader against the plain contents of real files."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import pickle
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_flash.errors import BudgetError, FlashError, ReadError, UsageError
from mlx_flash.flash import reader as reader_module
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.requests import MERGE_BYTES
from mlx_flash.flash.system import READ_ALIGNMENT
from mlx_flash.flash.unit_file import UnitFile

PAGE = READ_ALIGNMENT
SIZE = 5 * MERGE_BYTES + 3 * PAGE + 1234  # not a multiple of a page, so that the last page can only be read in part
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
    """A page-aligned destination filled with guard bytes."""
    base = np.full(nbytes + PAGE, GUARD, np.uint8)
    start = -base.ctypes.data % PAGE
    return base[start : start + nbytes]


def columns(*rows: tuple[int, int, int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    offsets, addresses, lengths = np.array(rows, np.int64).reshape(-1, 3).T
    return offsets, addresses, lengths


def read_and_compare(
    reader: Reader, file: UnitFile, contents: np.ndarray, segments: list[tuple[int, int]], gap: int = 0, skew: int = 0
) -> None:
    """Reads (offset, length) segments to destinations in reverse order, `gap` bytes apart, and compares every byte."""
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
    """(gap before, length) pairs -> ascending segments. A unit of a page makes them aligned; one of a byte does not."""
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
    """One request has more destinations than a preadv takes. There are more requests than a thread takes at once."""
    length = 24
    offsets = np.arange(0, SIZE - length, length, dtype=np.int64)
    place = np.random.default_rng(1).permutation(len(offsets))
    target = np.zeros((len(offsets), length), np.uint8)
    reader.read(file, offsets, target.ctypes.data + place * length, np.full(len(offsets), length))
    assert np.array_equal(target[place], contents[: len(offsets) * length].reshape(-1, length))

    offsets = np.random.default_rng(2).integers(0, SIZE // PAGE, 5000) * PAGE  # in random order, with repetitions
    target = destination(len(offsets) * PAGE).reshape(-1, PAGE)
    report = reader.read(file, offsets, target.ctypes.data + np.arange(5000) * PAGE, np.full(5000, PAGE))
    assert report.requests > 4000
    assert np.array_equal(target, contents[: SIZE // PAGE * PAGE].reshape(-1, PAGE)[offsets // PAGE])


def test_nothing_to_read(reader: Reader, file: UnitFile) -> None:
    assert reader.read(file, *columns()).requests == 0
    report = reader.read(file, *columns((0, 0, 0), (SIZE, 0, 0)))
    assert (report.requests, report.bytes) == (0, 0)


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
    with pytest.raises(ValueError, match="must be"):  # four reads to one place are refused
        reader.submit(file, np.arange(4) * PAGE, np.array([1 << 40]), PAGE)
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
            expected = (
                rf"wanted {length} bytes at {offset}, got {min(max(left - offset, 0), length)}\. It is truncated: "
            )
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
        number = file.fd
        directory = os.open(tmp_path, os.O_RDONLY)
        os.dup2(directory, number)
        os.close(directory)
        with pytest.raises(ReadError, match=rf"{own_path}: reading {PAGE} bytes at 0 failed: .*directory.* \(error"):
            reader.read(file, *rows)
        os.close(number)
        with pytest.raises(ReadError, match="Bad file descriptor"):
            reader.read(file, *rows)
        with pytest.raises(ReadError, match="Bad file descriptor"):
            file.verify_unchanged()
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
    with pytest.raises(ReadError, match="closed"):
        reader.wait(ticket)
    with pytest.raises(ReadError, match="closed"):
        reader.submit(file, *columns((0, target.ctypes.data, 1)))


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads as Linux shows them")
def test_closing_the_reader_ends_its_threads_though_a_call_still_has_its_pool() -> None:
    def threads() -> set[str]:
        return set(os.listdir("/proc/self/task"))

    before = threads()
    reader = Reader(3)
    pool = reader._pool  # keeps the pool alive, so that its destructor cannot end the threads
    own = threads() - before
    assert len(own) == 3
    reader.close()
    end = time.monotonic() + 10
    while own & threads() and time.monotonic() < end:  # a joined thread is still listed for a moment
        time.sleep(0.001)
    assert pool is not None and not own & threads()


def test_closing_a_file_waits_for_its_reads(reader: Reader, own_path: Path, contents: np.ndarray) -> None:
    target = destination(PAGE)
    file = UnitFile(own_path)
    ticket = reader.submit(file, *columns((0, target.ctypes.data, PAGE)))
    number = file.fd
    file.close()
    os.fstat(number)  # still open
    with pytest.raises(ReadError, match="closed"):
        reader.submit(file, *columns((0, target.ctypes.data, PAGE)))
    reader.wait(ticket)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)
    assert np.array_equal(target, contents[:PAGE])
    with pytest.raises(ReadError, match="closed"):
        file.verify_unchanged()


def rewrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.write(b"other bytes")


def punch(path: Path) -> None:
    hole, keep_size = 2, 1  # linux/falloc.h
    with path.open("r+b") as file:
        failed = ctypes.CDLL(None, use_errno=True).fallocate(
            file.fileno(), hole | keep_size, ctypes.c_long(0), ctypes.c_long(PAGE)
        )
    if failed:
        pytest.skip(f"no holes here: {os.strerror(ctypes.get_errno())}")


CHANGES: dict[str, Callable[[Path], object]] = {
    "rewritten": rewrite,
    "hole": pytest.param(punch, marks=pytest.mark.skipif(sys.platform != "linux", reason="fallocate")),  # type: ignore[dict-item]
    "renamed": lambda path: path.rename(path.with_name("other.bin")),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_whose_time_was_put_back_is_noticed(own_path: Path, change: Callable[[Path], object]) -> None:
    with UnitFile(own_path) as file:
        status = os.fstat(file.fd)
        change(own_path)
        os.utime(file.fd, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert (os.fstat(file.fd).st_size, os.fstat(file.fd).st_mtime_ns) == (status.st_size, status.st_mtime_ns)
        with pytest.raises(
            ReadError, match=r"units\.bin was changed while .* modification time restored, or it was renamed"
        ):
            file.verify_unchanged()


@pytest.mark.parametrize("how", ["chmod", "link", "unlink", "replaced"])
def test_links_and_rights_are_no_contents(own_path: Path, how: str) -> None:
    """They change ctime, but no byte that is read. A later write through them is noticed."""
    with UnitFile(own_path) as file:
        before = os.fstat(file.fd).st_ctime_ns
        if how == "chmod":
            own_path.chmod(0o400)
        elif how == "link":
            os.link(own_path, own_path.with_name("link"))
        elif how == "unlink":
            own_path.unlink()
        else:
            own_path.with_name("new").write_bytes(b"another file")
            own_path.with_name("new").replace(own_path)
        assert os.fstat(file.fd).st_ctime_ns != before, "the file system does not note it"
        file.verify_unchanged()
        file.verify_unchanged()
        os.utime(file.fd, ns=(1, file.identity[2]))
        with pytest.raises(ReadError, match="changed while"):
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


@pytest.mark.parametrize("direct", [True, False])
def test_threads_and_the_way_of_reading_change_while_reads_are_in_flight(
    path: Path, contents: np.ndarray, direct: bool
) -> None:
    """Reads that are aligned and reads through bounce memory, of all lengths up to the longest."""
    random = np.random.default_rng(5)
    with Reader(2, most=6) as reader, UnitFile(path, direct) as file:
        in_flight = []
        for turn in range(40):
            starts = np.sort(random.integers(0, SIZE - MERGE_BYTES, 7))
            lengths = random.integers(1, MERGE_BYTES, 7)
            memory = np.full(int(lengths.sum()), GUARD, np.uint8)
            addresses = memory.ctypes.data + np.cumsum(lengths) - lengths
            ticket = reader.submit(file, starts, addresses, lengths, destination=memory)
            in_flight.append((ticket, starts, lengths, memory))
            if turn % 2:
                reader.use_threads(1 + turn % 6)
                assert file.read_past_cache(not file.direct) or not direct
        for ticket, starts, lengths, memory in in_flight:
            reader.wait(ticket)
            expected = [contents[at : at + n] for at, n in zip(starts, lengths, strict=True)]
            assert np.array_equal(memory, np.concatenate(expected))
        for wrong in (0, 7):
            with pytest.raises(ValueError, match="expected 1 to 6"):
                reader.use_threads(wrong)
        reader.use_threads(6)
        assert reader.longest_request == MERGE_BYTES // 3 // PAGE * PAGE
        reader.use_threads(1)
        assert reader.longest_request == MERGE_BYTES
    with pytest.raises(ReadError, match="closed"):
        reader.use_threads(1)


def test_the_way_of_reading_stays_where_the_file_was_replaced(own_path: Path) -> None:
    with UnitFile(own_path, direct=False) as file:
        own_path.rename(own_path.with_name("other"))
        assert file.read_past_cache(False) and not file.read_past_cache(True)
        own_path.write_bytes(bytes(64 * PAGE))
        assert not file.read_past_cache(True) and not file.direct and file.alignment == 1
    assert not file.read_past_cache(True)


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


def test_forgotten_readers_do_not_hang(path: Path) -> None:
    """Exits with outstanding reads."""
    program = f"""
import numpy as np
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.unit_file import UnitFile
reader, file, target = Reader(4), UnitFile({str(path)!r}), np.zeros({MERGE_BYTES}, np.uint8)
one = np.array([1])
reader.submit(file, one, one * target.ctypes.data, one * {MERGE_BYTES})
print("submitted")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "submitted\n", "")


def test_a_forked_child_is_told_so(path: Path) -> None:
    """The child has no reader threads, so a read would never end. It begins none and waits for none."""
    program = f"""
import os, numpy as np
from mlx_flash.errors import ReadError
from mlx_flash.flash.reader import Reader
from mlx_flash.flash.unit_file import UnitFile
reader, file, target = Reader(4), UnitFile({str(path)!r}), np.zeros({MERGE_BYTES}, np.uint8)
one = np.array([1])
segment = file, one, one * target.ctypes.data, one * {MERGE_BYTES}
ticket = reader.submit(*segment)
child = os.fork()
if child == 0:
    told = 0
    for act in (lambda: reader.submit(*segment), lambda: reader.wait(ticket), lambda: reader.read(*segment)):
        try:
            act()
        except ReadError as error:
            told += "forked" in str(error)
    reader.drain()
    assert reader.outstanding == 0
    reader.close()
    del reader
    os._exit(told)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
reader.wait(ticket)
reader.close()
print("right")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


def test_a_budget_error_keeps_its_figures() -> None:
    error = pickle.loads(pickle.dumps(BudgetError("Too small.", 123)))
    assert (str(error), error.smallest_bytes) == ("Too small.", 123)
    assert error.exit_code == 2


def test_result_layout_is_nine_int64() -> None:
    assert ctypes.sizeof(reader_module._Result) == 72


# -- checksums --------------------------------------------------------------------------------------------------


def test_every_way_to_a_crc_is_zlibs() -> None:
    """With tables, and with the processor's instructions if it has them, at any length and alignment."""
    by = reader_module._library()[0].mf_crc32_by
    by.argtypes, by.restype = [ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint32
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 1 << 16, np.uint8)
    lengths = [*range(200), *rng.integers(200, 3000, 200).tolist(), 1 << 15]
    for length in lengths:
        begin = int(rng.integers(0, 1 << 12))
        expected = zlib.crc32(data[begin : begin + length].data)
        for instructions in (0, 1):
            assert by(instructions, data.ctypes.data + begin, length) == expected, (instructions, begin, length)
    ones = np.full(777, 0xFF, np.uint8)
    assert reader_module.crc32_of_each(ones.ctypes.data, 100, 77, 8).tolist() == [zlib.crc32(ones[:77].data)] * 8


class Expected:
    """Checksums of `contents` in ranges of `step` bytes of the read data. The one at file offset `wrong` is wrong."""

    def __init__(self, contents: np.ndarray, step: int, wrong: int | None = None) -> None:
        self.contents, self.step, self.wrong = contents, step, wrong

    def checks(self, offsets: np.ndarray, lengths: np.ndarray | int) -> np.ndarray:
        lengths = np.broadcast_to(lengths, offsets.shape)
        rows, at = [], 0
        for offset, length in zip(offsets.tolist(), lengths.tolist(), strict=True):
            for begin in range(0, length, self.step):
                end = min(begin + self.step, length)
                crc = zlib.crc32(self.contents[offset + begin : offset + end].data)
                rows.append((at + begin, end - begin, crc ^ (offset + begin == self.wrong)))
            at += length
        return np.array(rows, np.int64).reshape(-1, 3)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), segments=segment_sets(), gap=st.sampled_from([0, 1, PAGE]), skew=st.sampled_from([0, 1, 512]))
def test_what_is_read_is_compared(
    reader: Reader, path: Path, contents: np.ndarray, data: st.DataObject, segments: Any, gap: int, skew: int
) -> None:
    """Merged, cut, bounced or direct: right sums pass, and a single wrong one is reported anywhere."""
    if data.draw(st.integers(0, 9)) == 0:
        segments = [(5 * skew, 2 * MERGE_BYTES + 77)]
    starts = [offset + at for offset, length in segments for at in range(0, length, 3 * PAGE)]
    with UnitFile(path, direct=data.draw(st.booleans())) as file:
        file.sums = Expected(contents, 3 * PAGE)
        read_and_compare(reader, file, contents, segments, gap, skew)
        if starts:
            wrong = data.draw(st.sampled_from(starts))
            file.sums, file.name_of = Expected(contents, 3 * PAGE, wrong), lambda offset, length: f"unit {offset}"
            with pytest.raises(
                ReadError, match=rf"units\.bin: unit {wrong}: the \d+ bytes read at {wrong} have the che"
            ):
                read_and_compare(reader, file, contents, segments, gap, skew)
            assert reader.outstanding == 0


def test_tables_that_cannot_be_are_refused(reader: Reader, file: UnitFile) -> None:
    """mf_plan never makes such tables, but mf_submit does not rely on that."""
    target = destination(PAGE)
    address, most, least = target.ctypes.data, 2**63 - 1, -(2**63)
    pool = reader._pool
    assert pool is not None
    numbers = itertools.count(1 << 40)
    hand_over = pool.keeping_gil.mf_submit
    tables: list[Any] = [ctypes.c_void_p, ctypes.c_int64] * 3
    hand_over.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int, ctypes.c_int64, *tables]
    hand_over.restype = ctypes.c_int64

    def submit(*rows: Any, alignment: int = 1, **counts: int) -> int:
        arrays = [np.array(table, np.int64) for table in (*rows, [])[:3]]
        sizes = [counts.get(name, len(t)) for name, t in zip(("requests", "iovecs", "checks"), arrays, strict=True)]
        both = itertools.chain.from_iterable((t.ctypes.data, n) for t, n in zip(arrays, sizes, strict=True))
        number = next(numbers)
        code = hand_over(pool.pointer, number, file.fd, alignment, *both)
        pool.library.mf_wait(pool.pointer, number, ctypes.byref(reader_module._Result()))
        return int(code)

    sound = [(0, 0, 1)], [(address, 512)]
    assert submit(*sound) == 0 and submit(*sound, [(0, 512, 0)]) == 0  # the sum is wrong, but the table is valid
    bad = -5
    for offset in (-1, least, most, most - PAGE):
        assert submit([(offset, 0, 1)], [(address, 512)]) == bad
    for first, count in ((-1, 1), (1, 1), (0, 2), (0, 0), (0, -1), (1, most), (most, 1), (least, most)):
        assert submit([(0, first, count)], [(address, 512)]) == bad
    for where, length in ((address, 0), (address, -1), (address, most), (0, 512), (-address, 512), (most, 512)):
        assert submit([(0, 0, 1)], [(where, length)]) == bad
    for check in (
        (-1, 5, 0),
        (0, 0, 0),
        (0, -1, 0),
        (0, 513, 0),
        (most, 1, 0),
        (1, most, 0),
        (0, 5, -1),
        (0, 5, 2**32),
    ):
        assert submit(*sound, [check]) == bad
    assert submit(*sound, [(5, 5, 0), (9, 5, 0)]) == bad  # two checks overlap
    assert submit([(0, 0, 2)], [(address, 512), (address + 600, 512)], [(500, 24, 0)]) == bad  # not side by side
    for counts in ({"requests": -1}, {"iovecs": -1}, {"checks": -1}, {"requests": most}, {"checks": most}):
        assert submit(*sound, **counts) == bad
    assert submit(*sound, alignment=-1) == submit(*sound, alignment=most) == bad
    assert reader.outstanding == 0


# -- interrupts and odd disks -----------------------------------------------------------------------------------


def interrupted_at(action: Callable[[], object], at: int) -> bool:
    """Runs `action` and raises KeyboardInterrupt at opcode number `at` of reader.py. Returns whether there was one."""
    seen = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal seen
        if frame.f_code.co_filename != reader_module.__file__:
            return None
        frame.f_trace_opcodes = True
        if event == "opcode":
            seen += 1
            if seen == at:
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupt_at_any_opcode_leaves_nothing_in_flight(path: Path, contents: np.ndarray) -> None:
    """Ctrl-C may come within submit, wait or read. `drain` then ends everything that was begun, even without a ticket.

    The file can be closed, and the same reader continues to work.
    """
    length = 16 * PAGE
    target = destination(length)
    segment = columns((0, target.ctypes.data, length))
    with Reader(3) as reader:

        def apart(file: UnitFile) -> None:
            reader.wait(reader.submit(file, *segment))

        for action in (apart, lambda file: reader.read(file, *segment)):
            for at in itertools.count(1):
                file = UnitFile(path)
                interrupted = interrupted_at(functools.partial(action, file), at)
                if action is not apart:  # read cleans up by itself
                    assert reader.outstanding == 0
                reader.drain()
                assert reader.outstanding == 0 and not reader._outstanding
                number = file.fd
                file.close()
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.fstat(number)
                if not interrupted:
                    break
            assert at > 100
        with UnitFile(path) as file:
            apart(file)
        assert np.array_equal(target, contents[:length])


@pytest.fixture(scope="module")
def shorter(tmp_path_factory: pytest.TempPathFactory) -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    """The reader over a preadv that returns less than requested."""
    here, source = Path(__file__).parent / "faults", Path(reader_module.__file__).parent
    folder = tmp_path_factory.mktemp("shorter")
    flags = [os.environ.get("CC", "cc"), "-std=gnu11", "-O1", "-fPIC", "-pthread"]
    batch, library = str(folder / "batch.o"), folder / "_reader.so"
    subprocess.run([*flags, "-Dpreadv=shorter_preadv", "-c", str(source / "batch.c"), "-o", batch], check=True)
    others = [
        str(here / "shorter.c"),
        str(source / "reader.c"),
        str(source / "crc32.c"),
        str(source / "requests.c"),
        str(source / "slots.c"),
        batch,
    ]
    subprocess.run([*flags, "-shared", "-o", str(library), *others], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader_module, "__file__", str(folder / "reader.py"))
        opened: tuple[ctypes.CDLL, ctypes.PyDLL] = reader_module._library.__wrapped__()
    return opened


@pytest.fixture
def short_reads(shorter: tuple[ctypes.CDLL, ctypes.PyDLL], monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets the kind of short reads, numbered as in shorter.c."""
    monkeypatch.setattr(reader_module, "_library", lambda: shorter)
    return lambda kind: shorter[0].shorter_set(ctypes.c_int64(kind))


def test_short_reads_of_any_length_are_continued(
    short_reads: Callable[[int], None], file: UnitFile, contents: np.ndarray
) -> None:
    short_reads(1)
    with Reader(3) as reader:
        for segments in ([(0, SIZE)], [(5, SIZE - 5)], [(PAGE * i * 3, PAGE) for i in range(90)], [(SIZE - 99, 99)]):
            read_and_compare(reader, file, contents, segments)


def test_a_file_that_is_whole_is_not_called_truncated(short_reads: Callable[[int], None], file: UnitFile) -> None:
    short_reads(2)
    target = destination(PAGE)
    with (
        Reader(1) as reader,
        pytest.raises(ReadError, match="returned only 0 bytes, again and again, although the file has"),
    ):
        reader.read(file, *columns((PAGE, target.ctypes.data, PAGE)))
