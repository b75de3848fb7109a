"""Reading many ranges of a file at once, straight into memory, by the C thread pool of reader.c.

A segment is (file offset, destination address, length), all in bytes. Segments that are adjacent in the file become
one request, long ones several; the tables are numpy arrays, so that a read costs no Python object. Where the file has
checksums, the threads compare them with what they have read.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import itertools
import os
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..errors import FlashError, ReadError, UsageError
from .system import READ_ALIGNMENT, open_for_reading

MERGE_BYTES = 1 << 20
"""What a request aims at: shorter adjacent segments are merged up to about this, longer ones cut into such pieces."""

BOUNCE_BYTES_PER_THREAD = 2 << 20
"""What a thread allocates for reads that are not aligned, a huge page, for the memory plan; nothing if all are."""

Int64Array = npt.NDArray[np.int64]

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


class _Descriptor:
    """An open file, which is closed when nothing has it any more: under a read its number cannot become another's."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        with contextlib.suppress(OSError):  # someone closed it by its number
            os.close(self.number)


class Sums(Protocol):
    """The checksums of what is read of a file; unit_sums.py has them for every kind of unit."""

    def checks(self, offsets: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer] | int) -> Int64Array:
        """What the segments that `Reader.submit` is given are compared with: (m, 3) int64, ascending.

        Where in the bytes of all segments, one segment behind the other; how many bytes; the CRC-32 (of zlib) that
        they have. Raises ValueError if bytes of a segment have no sum.
        """
        ...


class UnitFile:
    """A file that units are read from, open for positional reads.

    path: as given. size: bytes when opened. direct: whether reads go past the page cache, which a file system may
    refuse. alignment: bytes that a read is aligned to, 1 if it need not be. name_of: (offset, bytes) -> which units
    lie there, for messages ("layer 3, neurons 24-31"); "" where that is not known. sums: of what every read is compared
    with; None to compare nothing.
    Raises ReadError if `path` is not a readable regular file.
    """

    def __init__(self, path: str | os.PathLike[str], direct: bool = True) -> None:
        self.path = Path(path)
        self.name_of: Callable[[int, int], str] = lambda offset, length: ""
        self.sums: Sums | None = None
        try:
            fd, self.direct = open_for_reading(path, direct)
            self._descriptor: _Descriptor | None = _Descriptor(fd)
            status = os.fstat(fd)
        except OSError as error:
            raise ReadError(f"{self.path} cannot be opened for reading: {error.strerror}.") from error
        if not stat.S_ISREG(status.st_mode):
            raise ReadError(f"{self.path} is not a regular file; the file of a store or a checkpoint was expected.")
        self.size = status.st_size
        self.alignment = READ_ALIGNMENT if self.direct else 1
        self._opened = status

    @property
    def fd(self) -> int:
        """The descriptor's number, -1 once the file is closed."""
        descriptor = self._descriptor
        return -1 if descriptor is None else descriptor.number

    @property
    def identity(self) -> tuple[int, int, int, int]:
        """What changes with every change of the contents: inode, size, time of writing, time of any change (ns)."""
        return identity_of(self._opened)

    def verify_unchanged(self) -> None:
        """Raises ReadError if someone may have written into the file since it was opened.

        Size and time of writing can be put back, the time of the last change (ctime) cannot. It also moves when a link
        is made or removed or when mode or owner are set, which is seen in them and leaves the bytes as they were. When
        it moves alone, the file was written to and its time put back; or it was renamed, or its extended attributes
        set: that cannot be told apart, and counts as a change.
        """
        descriptor = self._descriptor
        if descriptor is None:
            raise ReadError(f"{self.path} is closed.")
        try:
            now = os.fstat(descriptor.number)
        except OSError as error:
            raise ReadError(f"{self.path} cannot be examined: {error.strerror}.") from error
        then = self._opened
        if identity_of(now) == identity_of(then):
            return
        if now.st_size != then.st_size:
            how = f"it has {now.st_size} bytes, and had {then.st_size}"
        elif now.st_mtime_ns != then.st_mtime_ns:
            how = "it was written to, or its time set"
        elif _links_and_rights(now) != _links_and_rights(then):
            self._opened = now
            return
        else:
            how = "it was written to and its time put back, or it was renamed or given other attributes"
        raise ReadError(
            f"{self.path} was changed while it was in use ({how}). "
            "Leave the files of a store or a checkpoint alone while a model runs; start again."
        )

    def close(self) -> None:
        """Closes the file, at once or when the last outstanding read has been waited for. May be called again."""
        self._descriptor = None

    def __enter__(self) -> UnitFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def identity_of(status: os.stat_result) -> tuple[int, int, int, int]:
    """(inode, size, mtime, ctime) of a file: another tuple means that its bytes may be others."""
    return status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _links_and_rights(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_nlink, status.st_mode, status.st_uid, status.st_gid


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

    def __init__(self, file: UnitFile, descriptor: _Descriptor, requests: int, destination: object) -> None:
        self.number = next(_numbers)
        self.file = file
        self.requests = requests
        self.destination = destination
        self._descriptor: _Descriptor | None = descriptor


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


def plan_requests(
    file: UnitFile,
    offsets: npt.NDArray[np.integer],
    addresses: npt.NDArray[np.integer],
    lengths: npt.NDArray[np.integer] | int,
    request_bytes: int = MERGE_BYTES,
) -> tuple[Int64Array, Int64Array]:
    """Segments -> requests (r, 3) of (offset, first iovec, number of iovecs) and iovecs (m, 2) of (address, length).

    No request is longer than 1.5 * request_bytes + READ_ALIGNMENT. Raises as `Reader.submit` does.
    """
    if not READ_ALIGNMENT <= request_bytes <= MERGE_BYTES or request_bytes % READ_ALIGNMENT:
        raise ValueError(f"request_bytes is {request_bytes}, expected a multiple of {READ_ALIGNMENT} to {MERGE_BYTES}")
    if isinstance(lengths, int):
        tables = _plan_rows(file, offsets, addresses, lengths)
        if tables is not None:
            return tables
        lengths = np.full(len(offsets), lengths, np.int64)
    offsets, addresses, lengths = np.asarray(offsets), np.asarray(addresses), np.asarray(lengths)
    if not (offsets.ndim == 1 and offsets.shape == addresses.shape == lengths.shape):
        raise ValueError(
            f"offsets, addresses and lengths must be (n,) alike but are {offsets.shape}, {addresses.shape} and "
            f"{lengths.shape}"
        )
    if any(array.dtype.kind not in "iu" for array in (offsets, addresses, lengths) if array.size):
        raise ValueError("offsets, addresses and lengths must be integers")
    offsets, addresses, lengths = (array.astype(np.int64, copy=False) for array in (offsets, addresses, lengths))
    outside = (offsets < 0) | (lengths < 0) | (offsets > file.size - lengths)
    if outside.any():
        at = int(np.argmax(outside))
        raise ReadError(
            f"{file.path} has {file.size} bytes; {lengths[at]} bytes at {offsets[at]} lie outside of it. "
            "The file and its index disagree: run `python -m mlx_flash.check` on a store; download a checkpoint again."
        )
    if not lengths.all():
        some = lengths > 0
        offsets, addresses, lengths = offsets[some], addresses[some], lengths[some]
    if len(lengths) == 0:
        return np.empty((0, 3), np.int64), np.empty((0, 2), np.int64)
    if lengths.max() >= request_bytes * 3 // 2:
        offsets, addresses, lengths = _cut(offsets, addresses, lengths, request_bytes)
    first = _first_segments(offsets, addresses, lengths, file.alignment, request_bytes)
    requests = np.empty((len(first), 3), np.int64)
    requests[:, 0] = offsets[first]
    requests[:, 1] = first
    requests[:-1, 2] = first[1:] - first[:-1]
    requests[-1, 2] = len(lengths) - first[-1]
    return requests, np.stack((addresses, lengths), axis=1)


def _plan_rows(
    file: UnitFile, offsets: npt.NDArray[np.integer], addresses: npt.NDArray[np.integer], length: int
) -> tuple[Int64Array, Int64Array] | None:
    """`plan_requests` for what a token needs: blocks of one length, which are all aligned or may all be bounced; None
    for whatever else it is given.

    Called for every layer of every token, so it does with a third of the array operations.
    """
    n = len(offsets)
    if not (n and offsets.dtype == addresses.dtype == np.int64 and 0 < length < MERGE_BYTES // 2):
        return None
    if not offsets.shape == addresses.shape == (n,):
        return None
    steps = offsets[1:] - offsets[:-1]
    if n > 1 and steps.min() < length:  # not ascending, or one over the other
        return None
    if not 0 <= offsets[0] <= offsets[-1] <= file.size - length:
        return None
    if length % file.alignment == 0:
        used = int(np.bitwise_or.reduce(offsets)) | int(np.bitwise_or.reduce(addresses))
        if used % file.alignment:
            return None
    starts = np.ones(n, np.bool_)
    np.not_equal(steps, length, out=starts[1:])
    first = np.flatnonzero(starts)  # (r,) the segment that each request begins with
    requests = np.empty((len(first), 3), np.int64)
    requests[:, 0] = offsets[first]
    requests[:, 1] = first
    requests[:-1, 2] = first[1:] - first[:-1]
    requests[-1, 2] = n - first[-1]
    if requests[:, 2].max() * length > MERGE_BYTES:
        return None
    iovecs = np.empty((n, 2), np.int64)
    iovecs[:, 0] = addresses
    iovecs[:, 1] = length
    return requests, iovecs


def _cut(offsets: Int64Array, addresses: Int64Array, lengths: Int64Array, request_bytes: int) -> tuple[Int64Array, ...]:
    """Segments with the long ones in pieces, so that one segment keeps several threads busy and bounce buffers small.

    Pieces are request_bytes long and end on multiples of READ_ALIGNMENT in the file, so that no block is read twice;
    the last one is 0.5 to 1.5 times as long (and up to READ_ALIGNMENT more).
    """
    pieces = np.maximum((lengths + request_bytes // 2) // request_bytes, 1)  # (n,)
    owner = np.repeat(np.arange(len(lengths)), pieces)  # (m,) the segment of each piece
    rank = np.arange(len(owner)) - (np.cumsum(pieces) - pieces)[owner]
    head = offsets[owner] % READ_ALIGNMENT
    begin = np.where(rank == 0, 0, rank * request_bytes - head)
    end = np.where(rank == pieces[owner] - 1, lengths[owner], (rank + 1) * request_bytes - head)
    return offsets[owner] + begin, addresses[owner] + begin, end - begin


def _first_segments(
    offsets: Int64Array, addresses: Int64Array, lengths: Int64Array, alignment: int, request_bytes: int
) -> Int64Array:
    """The index of the first segment of each request: (n,) three times -> (r,)."""
    n = len(offsets)
    starts = np.ones(n, np.bool_)
    starts[1:] = offsets[1:] != offsets[:-1] + lengths[:-1]
    long = lengths >= request_bytes // 2  # gain nothing by being merged
    starts[1:] |= long[1:] | long[:-1]
    if alignment > 1:
        # A loose segment makes its whole request go through a bounce buffer; it shall not take aligned ones along.
        loose = (offsets | addresses | lengths) % alignment != 0
        starts[1:] |= loose[1:] != loose[:-1]
    if starts.all():
        return np.arange(n)
    run = np.maximum.accumulate(np.where(starts, np.arange(n), 0))  # the first segment of each run of neighbours
    window = (offsets - offsets[run]) // request_bytes
    starts[1:] |= window[1:] != window[:-1]
    return np.flatnonzero(starts)
