"""Reading many ranges of a file at once, straight into memory, by the C thread pool of reader.c.

A segment is (file offset, destination address, length), all in bytes. Segments that are adjacent in the file become
one request, long ones several; the tables are numpy arrays, so that a read costs no Python object. Where the file has
checksums, the threads compare them with what they have read.
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
from .requests import MERGE_BYTES, plan_requests
from .unit_file import Descriptor, Int64Array, UnitFile

BOUNCE_BYTES_PER_THREAD = 2 << 20
"""What a thread allocates for reads that are not aligned, a huge page, for the memory plan; nothing if all are."""


NO_CHECKS: Int64Array = np.empty((0, 3), np.int64)

_ABI = 2  # of reader.c
_SHORT_READ, _WITHHELD, _WRONG_SUM, _STOPPED = -1, -2, -3, -6  # batch.h


class _Result(ctypes.Structure):
    _fields_ = [
        (name, ctypes.c_int64) for name in ("code", "offset", "wanted", "got", "expected", "found", "busy_ns", "bytes")
    ]


@functools.cache
def _library() -> tuple[ctypes.CDLL, ctypes.PyDLL]:
    """The compiled reader.c twice: calls through the first release the GIL, calls through the second keep it."""
    here = Path(__file__).parent
    found = [*here.glob("_reader*.so"), *here.glob("_reader*.dylib")]
    if not found:
        raise FlashError(
            f"The compiled reader (_reader*.so) is missing in {here}. "
            "Reinstall mlx-flash-runtime where a C compiler is at hand (xcode-select --install on a Mac)."
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
    library.mf_pool_new.argtypes, library.mf_pool_new.restype = [int64], pointer
    for function in (library.mf_pool_stop, library.mf_pool_free, library.mf_drain):
        function.argtypes, function.restype = [pointer], None
    library.mf_outstanding.argtypes, library.mf_outstanding.restype = [pointer], int64
    library.mf_wait.argtypes, library.mf_wait.restype = [pointer, int64, ctypes.POINTER(_Result)], int64
    tables: list[Any] = [pointer, int64] * 3
    submit = keeping_gil.mf_submit
    submit.argtypes, submit.restype = [pointer, int64, ctypes.c_int, int64, *tables], int64
    library.mf_crc32_each.argtypes, library.mf_crc32_each.restype = [pointer, int64, int64, int64, pointer], None
    return library, keeping_gil


def crc32_of_each(address: int, stride: int, length: int, count: int) -> npt.NDArray[np.uint32]:
    """CRC-32 of `count` ranges of memory of `length` bytes, the first at `address`, each `stride` bytes further on."""
    sums = np.empty(count, np.uint32)
    _library()[0].mf_crc32_each(address, stride, length, count, sums.ctypes.data)
    return sums


@dataclass(frozen=True)
class ReadReport:
    """What one batch of reads did.

    seconds: from submission, or from the end of the batch before if that was later, to the last byte; so the sum over
    overlapping batches counts no moment twice. requests: reads after merging. bytes: asked of the file, with what
    alignment added.
    """

    seconds: float
    requests: int
    bytes: int


class Ticket:
    """A batch of reads under way; `Reader.wait` takes it once. It keeps its file open and its destination alive."""

    __slots__ = ("_descriptor", "destination", "file", "number", "requests")

    def __init__(self, file: UnitFile, descriptor: Descriptor, requests: int, destination: object) -> None:
        self.number = next(_numbers)
        self.file = file
        self.requests = requests
        self.destination = destination
        self._descriptor: Descriptor | None = descriptor


_numbers = itertools.count(1)  # of tickets, of all readers


class _Pool:
    """reader.c's pool, whose memory is freed when nothing has it any more: not under a call of another thread."""

    def __init__(self, threads: int) -> None:
        self.library, self.keeping_gil = _library()
        self._pid = os.getpid()
        self.pointer: int | None = self.library.mf_pool_new(threads)
        if self.pointer is None:
            raise FlashError(f"The system refused {threads} reader threads; ask for fewer.")

    @property
    def forked(self) -> bool:
        """Whether this is a child process, which has the pool's memory but not its threads, and perhaps its lock."""
        return os.getpid() != self._pid

    def __del__(self) -> None:
        if getattr(self, "pointer", None) is not None and not self.forked:
            self.library.mf_pool_free(self.pointer)


class Reader:
    """A pool of `threads` reader threads. Raises UsageError if `threads` is below 1.

    The memory at the addresses must stay alive, and unread by any other thread, until the ticket was waited for.
    """

    def __init__(self, threads: int = 16) -> None:
        if threads < 1:
            raise UsageError(f"{threads} reader threads were asked for; at least 1 is needed.")
        self._pool: _Pool | None = _Pool(threads)
        self._outstanding: set[Ticket] = set()  # keeps files and destinations; what is under way is known to reader.c
        self.threads = threads

    @property
    def outstanding(self) -> int:
        """Batches that were submitted and not waited for; 0 once the reader is closed."""
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
        """Starts reading segments of `file` and returns at once. Where the file has sums, all that is read is compared
        with them as it comes.

        Args:
            file: to read from.
            offsets, addresses, lengths: (n,) int64, in bytes; in ascending offset, so that neighbours are found. One
                number for `lengths` is that of every segment, and quicker.
            request_bytes: what a request aims at, at most MERGE_BYTES: a few long segments in shorter requests keep
                more threads busy.
            destination: whatever owns the memory that is read into, so that it outlives the read.

        Raises ReadError if a segment lies outside the file, if the reader or the file is closed or in a forked child;
        ValueError if the arrays disagree.
        """
        pool, descriptor = self._usable(), file._descriptor
        if descriptor is None:
            raise ReadError(f"{file.path} is closed.")
        requests, iovecs = plan_requests(file, offsets, addresses, lengths, request_bytes)
        checks = NO_CHECKS if file.sums is None else file.sums.checks(offsets, lengths)
        ticket = Ticket(file, descriptor, len(requests), destination)
        try:
            self._outstanding.add(ticket)  # first: an interrupt behind the call would lose what is under way
            # The GIL is kept: this only copies tables, and taking the GIL back from a busy thread costs 5 ms.
            code = pool.keeping_gil.mf_submit(
                pool.pointer, ticket.number, descriptor.number, file.alignment,
                requests.ctypes.data, len(requests), iovecs.ctypes.data, len(iovecs), checks.ctypes.data, len(checks),
            )  # fmt: skip
            if code != 0:
                raise _refusal(code, len(iovecs))
            return ticket
        except BaseException:
            pool.library.mf_wait(pool.pointer, ticket.number, ctypes.byref(_Result()))
            self._outstanding.discard(ticket)
            raise

    def wait(self, ticket: Ticket) -> ReadReport:
        """Blocks until the ticket's bytes are in place and compared.

        After an error the destinations hold anything. A ticket is waited for once; others are not affected.
        Raises ReadError if a byte could not be read or a checksum differs; it names the file and, where known, the
        units.
        """
        pool, result = self._usable(), _Result()
        code = pool.library.mf_wait(pool.pointer, ticket.number, ctypes.byref(result))
        ticket._descriptor = None
        self._outstanding.discard(ticket)
        if code != 0:
            raise ReadError("This ticket was already waited for, or belongs to another reader.")
        if result.code != 0:
            raise _failure(ticket.file, result)
        return ReadReport(result.busy_ns * 1e-9, ticket.requests, result.bytes)

    def read(
        self,
        file: UnitFile,
        offsets: npt.NDArray[np.integer],
        addresses: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer] | int,
    ) -> ReadReport:
        """`submit` and `wait` in one. If it is interrupted, all reads of this reader have ended and are void."""
        try:
            return self.wait(self.submit(file, offsets, addresses, lengths))
        except ReadError:
            raise
        except BaseException:
            self.drain()
            raise

    def drain(self) -> None:
        """Blocks until no read is under way, whoever knows of it. Tickets not yet waited for are void."""
        pool, known = self._pool, tuple(self._outstanding)
        if pool is not None and not pool.forked:
            pool.library.mf_drain(pool.pointer)
        self._outstanding.difference_update(known)

    def close(self) -> None:
        """Lets outstanding reads finish, then ends the threads. Tickets not yet waited for are void."""
        pool, known = self._pool, tuple(self._outstanding)
        self._pool = None
        if pool is not None and not pool.forked:
            pool.library.mf_pool_stop(pool.pointer)
        self._outstanding.difference_update(known)

    def _usable(self) -> _Pool:
        """Raises ReadError in a forked child, in which nothing would ever be read, and where the reader is closed."""
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


def _refusal(code: int, reads: int) -> Exception:
    """Why reader.c did not take a batch."""
    if code == errno.ENOMEM:
        return MemoryError(f"No memory for a table of {reads} reads.")
    if code == _STOPPED:
        return ReadError("The reader is closed.")
    return ValueError(
        "expected addresses above 0 and checks (position, length, CRC-32) that ascend within the bytes that are read"
    )


def _failure(file: UnitFile, result: _Result) -> ReadError:
    """What happened to a read, in a sentence, and what to do."""
    name = file.name_of(result.offset, result.wanted)
    where = f"{file.path}: {name}: " if name else f"{file.path}: "
    what = f"reading {result.wanted} bytes at {result.offset}"
    if result.code == _SHORT_READ:
        problem = (
            f"the file ends early: wanted {result.wanted} bytes at {result.offset}, got {result.got}; it is truncated: "
            "run `python -m mlx_flash.check` on a store, download a checkpoint again"
        )
    elif result.code == _WITHHELD:
        problem = (
            f"{what} brought only {result.got}, again and again, though the file has them. "
            "Check the disk, or the network that it is reached by"
        )
    elif result.code == _WRONG_SUM:
        problem = (
            f"the {result.wanted} bytes read at {result.offset} have the checksum {result.found:08x}, expected "
            f"{result.expected:08x}: the disk returned other bytes than were written, or the file was changed. "
            "Run `python -m mlx_flash.check` on a store, download a checkpoint again; if the file is whole, check the "
            "disk and the memory of this machine"
        )
    else:
        problem = f"{what} failed: {os.strerror(result.code)} (error {result.code}). Check the disk and the file"
    return ReadError(f"{where}{problem}.")
