"""Reading many ranges of a file at once, straight into memory, by the C thread pool of reader.c.

A segment is (file offset, destination address, length), all in bytes. Segments that are adjacent in the file become
one request, long ones several; the tables are numpy arrays, so that a read costs no Python object.
"""

from __future__ import annotations

import ctypes
import functools
import os
import stat
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np
import numpy.typing as npt

from ..errors import FlashError, ReadError, UsageError
from .system import READ_ALIGNMENT, open_for_reading

MERGE_BYTES = 1 << 20
"""What a request aims at: shorter adjacent segments are merged up to about this, longer ones cut into such pieces."""

BOUNCE_BYTES_PER_THREAD = 2 << 20
"""What a thread allocates for reads that are not aligned, a huge page, for the memory plan; nothing if all are."""

_ABI = 1  # of reader.c
_SHORT_READ = -1

Int64Array = npt.NDArray[np.int64]


class _Result(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("code", "offset", "wanted", "got", "busy_ns", "bytes")]


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
    library.mf_pool_free.argtypes, library.mf_pool_free.restype = [pointer], None
    library.mf_wait.argtypes, library.mf_wait.restype = [pointer, pointer, ctypes.POINTER(_Result)], None
    submit = keeping_gil.mf_submit
    submit.argtypes, submit.restype = [pointer, ctypes.c_int, int64, pointer, int64, pointer, int64], pointer
    return library, keeping_gil


class UnitFile:
    """A file that units are read from, open for positional reads.

    path: as given. fd: the descriptor, -1 once closed. size: bytes when opened. direct: whether reads go past the page
    cache, which a file system may refuse. alignment: bytes that a read is aligned to, 1 if it need not be.
    Raises ReadError if `path` is not a readable regular file.
    """

    def __init__(self, path: str | os.PathLike[str], direct: bool = True) -> None:
        self.fd = -1
        self.path = Path(path)
        self._lock = threading.Lock()
        self._reads = 0  # batches submitted and not yet waited for
        self._close_wanted = False
        try:
            self.fd, self.direct = open_for_reading(path, direct)
            status = os.fstat(self.fd)
        except OSError as error:
            self.close()
            raise ReadError(f"{self.path} cannot be opened for reading: {error.strerror}.") from error
        if not stat.S_ISREG(status.st_mode):
            self.close()
            raise ReadError(f"{self.path} is not a regular file; the file of a store or a checkpoint was expected.")
        self.size = status.st_size
        self.alignment = READ_ALIGNMENT if self.direct else 1
        self._mtime_ns = status.st_mtime_ns

    def verify_unchanged(self) -> None:
        """Raises ReadError if someone has written into the file since it was opened (by its size and time)."""
        if self.fd < 0:
            raise ReadError(f"{self.path} is closed.")
        try:
            status = os.fstat(self.fd)
        except OSError as error:
            raise ReadError(f"{self.path} cannot be examined: {error.strerror}.") from error
        if (status.st_size, status.st_mtime_ns) != (self.size, self._mtime_ns):
            sizes = f"it has {status.st_size} bytes, and had {self.size}"
            how = sizes if status.st_size != self.size else "it was written to, or its time set"
            raise ReadError(
                f"{self.path} was changed while it was in use ({how}). "
                "Leave the files of a store or a checkpoint alone while a model runs; start again."
            )

    def close(self) -> None:
        """Closes the file, at once or when the last outstanding read has been waited for. May be called again."""
        with self._lock:
            # A number freed under a running read could be another file's by the time the read is made.
            self._close_wanted = True
            self._close_if_unused()

    def _close_if_unused(self) -> None:
        if self._close_wanted and self._reads == 0 and self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def _begin_read(self) -> None:
        with self._lock:
            if self._close_wanted:
                raise ReadError(f"{self.path} is closed.")
            self._reads += 1

    def _end_read(self) -> None:
        with self._lock:
            self._reads -= 1
            self._close_if_unused()

    def __enter__(self) -> UnitFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # While a read is outstanding its reader has the file; both may go at once, as parts of a cycle, in any order.
        if getattr(self, "fd", -1) >= 0 and self._reads == 0:
            os.close(self.fd)


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
    """A batch of reads under way; `Reader.wait` takes it once. It keeps its file open.

    destination: whatever owns the memory that is read into; who submits sets it, so that it outlives the read.
    """

    __slots__ = ("_batch", "destination", "file", "requests")

    def __init__(self, batch: int, file: UnitFile, requests: int) -> None:
        self._batch: int | None = batch
        self.file = file
        self.requests = requests
        self.destination: object = None


class Reader:
    """A pool of `threads` reader threads. Raises UsageError if `threads` is below 1.

    The memory at the addresses must stay alive, and unread by any other thread, until the ticket was waited for.
    """

    def __init__(self, threads: int = 16) -> None:
        self._pool: int | None = None
        if threads < 1:
            raise UsageError(f"{threads} reader threads were asked for; at least 1 is needed.")
        self._library, self._keeping_gil = _library()
        self._outstanding: set[Ticket] = set()
        self._pid = os.getpid()
        self.threads = threads
        self._pool = self._library.mf_pool_new(threads)
        if self._pool is None:
            raise FlashError(f"The system refused {threads} reader threads; ask for fewer.")

    def submit(
        self,
        file: UnitFile,
        offsets: npt.NDArray[np.integer],
        addresses: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer] | int,
        *,
        request_bytes: int = MERGE_BYTES,
    ) -> Ticket:
        """Starts reading segments of `file` and returns at once.

        offsets, addresses, lengths: (n,) int64, in bytes; in ascending offset, so that neighbours are found. One
        number for `lengths` is that of every segment, and quicker. request_bytes: what a request aims at, at most
        MERGE_BYTES: a few long segments in shorter requests keep more threads busy.
        Raises ReadError if a segment lies outside the file; ValueError if the arrays disagree.
        """
        if self._pool is None:
            raise ReadError("The reader is closed.")
        requests, iovecs = plan_requests(file, offsets, addresses, lengths, request_bytes)
        file._begin_read()
        # The GIL is kept: this only copies two tables, and taking the GIL back from a busy thread costs 5 ms.
        batch = self._keeping_gil.mf_submit(
            self._pool, file.fd, file.alignment, requests.ctypes.data, len(requests), iovecs.ctypes.data, len(iovecs)
        )
        if batch is None:
            file._end_read()
            raise MemoryError(f"No memory for a table of {len(iovecs)} reads.")
        ticket = Ticket(batch, file, len(requests))
        self._outstanding.add(ticket)
        return ticket

    def wait(self, ticket: Ticket) -> ReadReport:
        """Blocks until the ticket's bytes are in place. Raises ReadError if one of them could not be read.

        After an error the destinations hold anything. A ticket is waited for once; others are not affected.
        """
        result = self._finish(ticket)
        if result.code == _SHORT_READ:
            raise ReadError(
                f"{ticket.file.path}: the file ends early: wanted {result.wanted} bytes at {result.offset}, got "
                f"{result.got}; it is truncated: run `python -m mlx_flash.check` on a store, download a "
                "checkpoint again."
            )
        if result.code != 0:
            raise ReadError(
                f"{ticket.file.path}: reading {result.wanted} bytes at {result.offset} failed: "
                f"{os.strerror(result.code)} (error {result.code}). Check the disk and the file."
            )
        return ReadReport(result.busy_ns * 1e-9, ticket.requests, result.bytes)

    def read(
        self,
        file: UnitFile,
        offsets: npt.NDArray[np.integer],
        addresses: npt.NDArray[np.integer],
        lengths: npt.NDArray[np.integer] | int,
    ) -> ReadReport:
        """`submit` and `wait` in one."""
        return self.wait(self.submit(file, offsets, addresses, lengths))

    def drain(self) -> None:
        """Blocks until no read is under way. Tickets not yet waited for are void."""
        for ticket in tuple(self._outstanding):
            self._finish(ticket)

    def close(self) -> None:
        """Lets outstanding reads finish, then ends the threads. Tickets not yet waited for are void."""
        if self._pool is None:
            return
        if os.getpid() != self._pid:  # a forked child has the pool's memory but not its threads
            self._pool = None
            return
        self.drain()
        pool, self._pool = self._pool, None
        self._library.mf_pool_free(pool)

    def _finish(self, ticket: Ticket) -> _Result:
        if ticket not in self._outstanding:
            raise ReadError("This ticket was already waited for, or belongs to another reader.")
        self._outstanding.remove(ticket)
        batch, ticket._batch = ticket._batch, None
        result = _Result()
        self._library.mf_wait(self._pool, batch, ctypes.byref(result))
        ticket.file._end_read()
        return result

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self.close()


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
