"""Reads many ranges of a file at once, straight into memory, with the C thread pool of reader.c.

A segment is (file offset, destination address, length), all in bytes. Segments that are adjacent in the file become
one request; a long segment becomes several. The tables are NumPy arrays, so that a read costs no Python object. If the
file has checksums, the threads verify what they read.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import FlashError, ReadError, UsageError
from .addresses import address
from .plain_files import AWAY, OF_A_LOST_VOLUME
from .requests import MERGE_BYTES, as_segments
from .system import READ_ALIGNMENT
from .unit_file import Descriptor, Int64Array, UnitFile

BOUNCE_BYTES_PER_THREAD = 2 << 20
"""Bytes of memory for the unaligned reads of a thread (MF_BOUNCE of reader.c), for the memory plan; 0 if all are
aligned."""


NO_CHECKS: Int64Array = np.empty((0, 3), np.int64)

_ABI = 5  # MF_ABI of reader.c
_SHORT_READ, _WITHHELD, _WRONG_SUM, _STOPPED, _OUTSIDE = -1, -2, -3, -6, -7  # codes of batch.h


class _Result(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("code", "offset", "wanted", "got", "expected", "found", "busy_ns", "bytes", "requests")
    ]


class _Rules(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("file_bytes", "alignment", "request_bytes", "block")]


@functools.cache
def _library() -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    """The compiled reader.c, loaded twice: calls through the first release the GIL, calls through the second keep it.

    Raises FlashError if the library is missing, cannot be loaded or belongs to another version.
    """
    here = Path(__file__).parent
    found = [*here.glob("_reader*.so"), *here.glob("_reader*.dylib")]
    if not found:
        raise FlashError(
            f"The compiled reader (_reader*.so) is missing in {here}. "
            "Install a C compiler (xcode-select --install on a Mac) and reinstall mlx-flash-runtime."
        )
    path = max(found, key=lambda file: file.stat().st_mtime_ns)
    try:
        library, keeping_gil = ctypes.CDLL(str(path)), ctypes.PyDLL(str(path))
        library.mf_abi.restype = ctypes.c_int64
        abi = library.mf_abi()
    except (OSError, AttributeError) as error:
        raise FlashError(f"The compiled reader {path} cannot be used: {error}. Reinstall mlx-flash-runtime.") from error
    if abi != _ABI:
        raise FlashError(
            f"The compiled reader {path} belongs to another version (interface {abi}, expected {_ABI}). "
            "Reinstall mlx-flash-runtime."
        )
    pointer, int64 = ctypes.c_void_p, ctypes.c_int64
    library.mf_pool_new.argtypes, library.mf_pool_new.restype = [int64, int64], pointer
    for function in (library.mf_pool_stop, library.mf_pool_free, library.mf_drain):
        function.argtypes, function.restype = [pointer], None
    library.mf_use_threads.argtypes, library.mf_use_threads.restype = [pointer, int64], None
    library.mf_outstanding.argtypes, library.mf_outstanding.restype = [pointer], int64
    library.mf_wait.argtypes, library.mf_wait.restype = [pointer, int64, ctypes.POINTER(_Result)], int64
    submit = keeping_gil.mf_submit_segments
    submit.argtypes = [pointer, int64, ctypes.c_int, ctypes.POINTER(_Rules), *[pointer] * 3, int64, pointer, int64]
    submit.restype = int64
    library.mf_crc32_each.argtypes, library.mf_crc32_each.restype = [pointer, int64, int64, int64, pointer], None
    slots: dict[str, list[Any]] = {
        "mf_look_up": [pointer, int64, pointer, pointer, int64, ctypes.c_float, pointer],
        "mf_make_room": [*[pointer, int64] * 4, pointer, pointer, int64, pointer, pointer, ctypes.POINTER(int64)],
        "mf_segments": [int64, pointer, pointer, *[int64] * 3, *[pointer] * 5],
    }
    for name, types in slots.items():
        function = getattr(keeping_gil, name)
        function.argtypes, function.restype = types, int64
    return library, keeping_gil


def slot_functions() -> ctypes.PyDLL:
    """The functions of slots.c, which keep the GIL."""
    return _library()[1]


def crc32_of_each(address: int, stride: int, length: int, count: int) -> npt.NDArray[np.uint32]:
    """CRC-32, uint32 (count,), of ranges of `length` bytes of memory, the first at `address`, `stride` bytes apart."""
    sums = np.empty(count, np.uint32)
    _library()[0].mf_crc32_each(address, stride, length, count, sums.ctypes.data)
    return sums


@dataclass(frozen=True)
class ReadReport:
    """The cost of one batch of reads.

    seconds: time to the last byte, from submission or from the end of the previous batch if that was later. A sum over
    overlapping batches therefore counts no moment twice. requests: reads after merging. bytes: bytes requested from the
    file, alignment included.
    """

    seconds: float
    requests: int
    bytes: int


class Ticket:
    """A batch of reads in flight. Pass it to `Reader.wait` once. It keeps its file open and its destination alive."""

    __slots__ = ("_descriptor", "destination", "file", "number")

    def __init__(self, file: UnitFile, descriptor: Descriptor, destination: object) -> None:
        self.number = next(_numbers)
        self.file = file
        self.destination = destination
        self._descriptor: Descriptor | None = descriptor


_numbers = itertools.count(1)  # ticket numbers, unique across readers


class _Pool:
    """The pool of reader.c. Its memory is freed with the last reference to it, so never during a thread's call."""

    def __init__(self, threads: int, working: int) -> None:
        self.library, self.keeping_gil = _library()
        self._pid = os.getpid()
        self.pointer: int | None = self.library.mf_pool_new(threads, working)
        if self.pointer is None:
            raise FlashError(f"The system refused to start {threads} reader threads. Use fewer threads.")

    @property
    def forked(self) -> bool:
        """Whether this is a forked child. It has the pool's memory without its threads, and the lock may be taken."""
        return os.getpid() != self._pid

    def __del__(self) -> None:
        if getattr(self, "pointer", None) is not None and not self.forked:
            self.library.mf_pool_free(self.pointer)


class Reader:
    """A pool of reader threads, of which `threads` read. Raises UsageError if `threads` is below 1, FlashError if the
    threads cannot start.

    The memory at the addresses must stay alive until the ticket was waited for, and no other thread may read it.
    """

    def __init__(self, threads: int = 16, most: int | None = None) -> None:
        """most: the most threads that `use_threads` may ask for; None for `threads`."""
        if threads < 1:
            raise UsageError(f"threads is {threads}, expected at least 1.")
        self.most = max(threads, most or threads)
        self._pool: _Pool | None = _Pool(self.most, threads)
        self._outstanding: set[Ticket] = set()  # keeps files and destinations alive; reader.c counts the reads
        self._buffers = threads  # as many as bounce memory was made for
        self.threads = threads

    def use_threads(self, threads: int) -> None:
        """Waits for the reads in flight, and lets so many threads read from then on, from 1 to `most`.

        They share the memory that was made for the first number of threads, so requests get shorter if there are more.
        Raises ReadError if the reader is closed, or in a forked child; ValueError.
        """
        if not 1 <= threads <= self.most:
            raise ValueError(f"threads is {threads}, expected 1 to {self.most}")
        pool = self._usable()
        if threads != self.threads:
            pool.library.mf_use_threads(pool.pointer, threads)
            self.threads = threads

    @property
    def longest_request(self) -> int:
        """The most bytes of a request's target size, so that its bounce buffer has room."""
        share = MERGE_BYTES * self._buffers // max(self.threads, self._buffers)
        return max(READ_ALIGNMENT, share // READ_ALIGNMENT * READ_ALIGNMENT)

    @property
    def outstanding(self) -> int:
        """Number of batches that were submitted and not waited for; 0 once the reader is closed."""
        pool = self._pool
        return 0 if pool is None or pool.forked else pool.library.mf_outstanding(pool.pointer)

    def submit(
        self,
        file: UnitFile,
        offsets: npt.NDArray[np.integer],
        addresses: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer] | int,
        *,
        request_bytes: int = MERGE_BYTES,
        destination: object = None,
    ) -> Ticket:
        """Starts reading segments of `file` and returns at once. If the file has sums, every read is verified.

        Args:
            file: the file to read.
            offsets, addresses, lengths: (n,) int64, in bytes. Offsets ascend, so that neighbours are found. A single
                number for `lengths` is the length of every segment, and faster.
            request_bytes: target size of a request, at most MERGE_BYTES; `longest_request` bounds it further. Smaller
                requests keep more threads busy with a few long segments.
            destination: owner of the memory that is read into, kept alive until the read has ended.

        Raises ReadError if a segment lies outside the file, if the reader or the file is closed, or in a forked child;
        ValueError if the arrays disagree; MemoryError.
        """
        pool, descriptor = self._usable(), file._descriptor
        if descriptor is None:
            raise ReadError(f"{file.path} is closed.")
        columns = as_segments(offsets, addresses, lengths)
        size = min(request_bytes, self.longest_request)
        if not READ_ALIGNMENT <= size <= MERGE_BYTES or size % READ_ALIGNMENT:
            raise ValueError(f"request_bytes is {size}, expected a multiple of {READ_ALIGNMENT} to {MERGE_BYTES}")
        checks = NO_CHECKS if file.sums is None else file.sums.checks(offsets, lengths)
        rules = _Rules(file.size, file.alignment, size, READ_ALIGNMENT)
        ticket = Ticket(file, descriptor, destination)
        try:
            self._outstanding.add(ticket)  # first, since an interrupt after the call would lose the ticket
            # The GIL is kept: this only makes tables, and taking the GIL back from a busy thread costs 5 ms.
            code = pool.keeping_gil.mf_submit_segments(
                pool.pointer, ticket.number, descriptor.number, rules, *map(address, columns), len(offsets),
                address(checks), len(checks),
            )  # fmt: skip
            if code != 0:
                raise _refusal(code, file, *columns)
            return ticket
        except BaseException:
            pool.library.mf_wait(pool.pointer, ticket.number, ctypes.byref(_Result()))
            self._outstanding.discard(ticket)
            raise

    def wait(self, ticket: Ticket) -> ReadReport:
        """Blocks until the ticket's bytes are in place and verified.

        After an error, the contents of the destinations are undefined. A ticket can be waited for once; other tickets
        are not affected. Raises ReadError if a byte could not be read or a checksum differs; it names the file and, if
        known, the units.
        """
        pool, result = self._usable(), _Result()
        code = pool.library.mf_wait(pool.pointer, ticket.number, ctypes.byref(result))
        ticket._descriptor = None
        self._outstanding.discard(ticket)
        if code != 0:
            raise ReadError("This ticket was already waited for, or belongs to another reader.")
        if result.code != 0:
            raise _failure(ticket.file, result)
        return ReadReport(result.busy_ns * 1e-9, result.requests, result.bytes)

    def read(
        self,
        file: UnitFile,
        offsets: npt.NDArray[np.integer],
        addresses: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer] | int,
    ) -> ReadReport:
        """`submit` and `wait` in one call. An interrupt ends all reads of this reader and voids their tickets."""
        try:
            return self.wait(self.submit(file, offsets, addresses, lengths))
        except ReadError:
            raise
        except BaseException:
            self.drain()
            raise

    def drain(self) -> None:
        """Blocks until no read is in flight, even of lost tickets. Tickets not yet waited for become void."""
        pool, known = self._pool, tuple(self._outstanding)
        if pool is not None and not pool.forked:
            pool.library.mf_drain(pool.pointer)
        self._outstanding.difference_update(known)

    def close(self) -> None:
        """Lets outstanding reads finish, then ends the threads. Tickets not yet waited for become void."""
        pool, known = self._pool, tuple(self._outstanding)
        self._pool = None
        if pool is not None and not pool.forked:
            pool.library.mf_pool_stop(pool.pointer)
        self._outstanding.difference_update(known)

    def _usable(self) -> _Pool:
        """The pool. Raises ReadError if the reader is closed, or in a forked child, where no thread would ever read."""
        pool = self._pool
        if pool is None:
            raise ReadError("The reader is closed.")
        if pool.forked:
            raise ReadError(
                "This process was forked from the one that loaded the model, and has none of its reader threads. "
                "Load the model in the process that uses it."
            )
        return pool

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self.close()


def _refusal(code: int, file: UnitFile, offsets: Int64Array, addresses: Int64Array, lengths: Int64Array) -> Exception:
    """The exception for segments that reader.c refused."""
    if code == errno.ENOMEM:
        return MemoryError(f"There is no memory for a table of {len(offsets)} segments.")
    if code == _OUTSIDE:
        outside = (offsets < 0) | (lengths < 0) | (lengths > file.size) | (offsets > file.size - lengths)
        at = int(np.argmax(outside))
        return ReadError(
            f"{file.path} has {file.size} bytes; {lengths[at]} bytes at {offsets[at]} lie outside it. The file and its "
            "index disagree. Run `python -m mlx_flash.check` on a store, or download a checkpoint again."
        )
    if code == _STOPPED:
        return ReadError("The reader is closed.")
    return ValueError(
        "expected addresses above 0 and checks (position, length, CRC-32) that ascend within the bytes that are read"
    )


def _failure(file: UnitFile, result: _Result) -> ReadError:
    """The error for a failed read: what happened, and what to do."""
    name = file.name_of(result.offset, result.wanted)
    where = f"{file.path}: {name}: " if name else f"{file.path}: "
    what = f"reading {result.wanted} bytes at {result.offset}"
    if result.code == _SHORT_READ:
        problem = (
            f"the file ends early: wanted {result.wanted} bytes at {result.offset}, got {result.got}. It is truncated: "
            "run `python -m mlx_flash.check` on a store, or download a checkpoint again"
        )
    elif result.code == _WITHHELD:
        problem = (
            f"{what} returned only {result.got} bytes, again and again, although the file has them all. "
            "Check the disk, or the network connection to it"
        )
    elif result.code == _WRONG_SUM:
        problem = (
            f"the {result.wanted} bytes read at {result.offset} have the checksum {result.found:08x}, expected "
            f"{result.expected:08x}: the disk returned other bytes than were written, or the file was changed. "
            "Run `python -m mlx_flash.check` on a store, or download a checkpoint again. If the file is intact, check "
            "the disk and the memory of this machine"
        )
    else:
        remedy = AWAY if result.code in OF_A_LOST_VOLUME else "Check the disk and the file."
        return ReadError(f"{where}{what} failed: {os.strerror(result.code)} (error {result.code}). {remedy}")
    return ReadError(f"{where}{problem}.")
