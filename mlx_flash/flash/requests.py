"""Turns segments of a file into read requests: merges neighbours, cuts long segments, keeps aligned ones apart."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ..errors import ReadError
from .system import READ_ALIGNMENT
from .unit_file import Int64Array, UnitFile

MERGE_BYTES = 1 << 20
"""Target size of a request. Shorter adjacent segments are merged up to about this; longer ones are cut to it."""


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
        tables = _plan_rows(file, offsets, addresses, lengths, request_bytes)
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
            f"{file.path} has {file.size} bytes; {lengths[at]} bytes at {offsets[at]} lie outside it. The file and its "
            "index disagree. Run `python -m mlx_flash.check` on a store, or download a checkpoint again."
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
    file: UnitFile,
    offsets: npt.NDArray[np.integer],
    addresses: npt.NDArray[np.integer],
    length: int,
    request_bytes: int,
) -> tuple[Int64Array, Int64Array] | None:
    """`plan_requests` for the blocks of a token, which have one length and are all aligned or all bounced; None for any
    other input.

    It runs for every layer of every token, and needs only a third of the array operations.
    """
    n = len(offsets)
    if not (n and offsets.dtype == addresses.dtype == np.int64 and 0 < length < request_bytes // 2):
        return None
    if not offsets.shape == addresses.shape == (n,):
        return None
    steps = offsets[1:] - offsets[:-1]
    if n > 1 and steps.min() < length:  # not ascending, or overlapping
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
    if requests[:, 2].max() * length > request_bytes:
        return None
    iovecs = np.empty((n, 2), np.int64)
    iovecs[:, 0] = addresses
    iovecs[:, 1] = length
    return requests, iovecs


def _cut(offsets: Int64Array, addresses: Int64Array, lengths: Int64Array, request_bytes: int) -> tuple[Int64Array, ...]:
    """Cuts long segments into pieces, so that one keeps several threads busy and bounce buffers stay small.

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
    """The index of the first segment of each request: three arrays (n,) -> (r,)."""
    n = len(offsets)
    starts = np.ones(n, np.bool_)
    starts[1:] = offsets[1:] != offsets[:-1] + lengths[:-1]
    long = lengths >= request_bytes // 2  # merging gains them nothing
    starts[1:] |= long[1:] | long[:-1]
    if alignment > 1:
        # An unaligned segment sends its whole request through the bounce buffer, so no aligned one joins it.
        loose = (offsets | addresses | lengths) % alignment != 0
        starts[1:] |= loose[1:] != loose[:-1]
    if starts.all():
        return np.arange(n)
    run = np.maximum.accumulate(np.where(starts, np.arange(n), 0))  # the first segment of each run of neighbours
    window = (offsets - offsets[run]) // request_bytes
    starts[1:] |= window[1:] != window[:-1]
    return np.flatnonzero(starts)
