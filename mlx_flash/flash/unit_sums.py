"""CRC-32 sums of units: the blocks of a store, and ranges of a checkpoint's own files.

`UnitFile.sums` is one of these classes. This module knows which sums belong to a read; the reader's threads compare.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import CorruptStoreError, ReadError
from .files import AGAIN, Manifest, NeuronLayout
from .reader import NO_CHECKS, Reader
from .unit_file import Int64Array, UnitFile

UInt32Array = npt.NDArray[np.uint32]

RANGE_BYTES = 1 << 20
"""At most this many bytes of a unit share a sum. A longer range would keep one thread busy after the last read."""

SUMS_FORMAT = "mlx_flash sums 2"  # version 1 did not record the file's SHA-256
WINDOW_BYTES = 16 << 20  # bytes per read while sums are made


class BlockSums:
    """The sums of a store's blocks, and of parts of blocks that were learnt.

    layout: the store's layout. sums: uint32 (layers, blocks), of whole blocks.
    """

    def __init__(self, layout: NeuronLayout, sums: UInt32Array) -> None:
        self._layout = layout
        # (layer, offset in each block, bytes) -> (blocks,)
        self._sums = {(layer, 0, layout.block_bytes): row for layer, row in enumerate(sums)}

    def learn(self, layer: int, parts: tuple[str, ...], sums: UInt32Array) -> None:
        """Adds the sums of neighbouring `parts` of every block of a layer. sums: uint32 (blocks,)."""
        self._sums.setdefault((layer, *self._layout.part_range(parts)), sums)

    def checks(self, offsets: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer] | int) -> Int64Array:
        """See `Sums.checks`. The segments of one layer are the same parts of single blocks, or runs of whole blocks."""
        if len(offsets) == 0:
            return NO_CHECKS
        block_bytes = self._layout.block_bytes
        if isinstance(lengths, int):
            nbytes = lengths
        else:
            runs = [np.arange(o, o + n, block_bytes) for o, n in zip(offsets, lengths, strict=True)]
            offsets, nbytes = np.concatenate(runs), block_bytes
            if (lengths % block_bytes).any():
                raise ValueError(f"segments of {lengths} bytes are not runs of blocks of {block_bytes}")
        layer, begin = divmod(int(offsets[0]), self._layout.layer_bytes)
        skip = begin % block_bytes
        sums = self._sums.get((layer, skip, nbytes))
        blocks, rest = np.divmod(offsets - (layer * self._layout.layer_bytes + skip), block_bytes)
        if sums is None or rest.any() or blocks.max() >= len(sums) or blocks.min() < 0:
            raise ValueError(f"there is no sum of {nbytes} bytes at {offsets}")
        checks = np.empty((len(blocks), 3), np.int64)
        checks[:, 0] = np.arange(len(blocks)) * nbytes
        checks[:, 1] = nbytes
        checks[:, 2] = sums[blocks]
        return checks


def read_block_sums(folder: Path, manifest: Manifest) -> BlockSums:
    """The sums of a store's blocks. Raises CorruptStoreError, or ReadError for a disk error."""
    path = folder / manifest.neurons_checksums_file
    try:
        table = path.read_bytes()
    except OSError as error:
        raise ReadError(f"{path} cannot be read: {error.strerror}. Check the disk and the file.") from None
    if hashlib.sha256(table).hexdigest() != manifest.files[path.name]["sha256"]:
        raise CorruptStoreError(f"{path} does not match its checksum. {AGAIN}")
    layout = manifest.layout
    return BlockSums(layout, np.frombuffer(table, "<u4").reshape(layout.layers, layout.blocks))


@dataclass(frozen=True)
class Ranges:
    """Ranges of a file that have sums: (n,) int64, ascending, without overlaps, at most RANGE_BYTES long."""

    offsets: Int64Array
    lengths: Int64Array

    @staticmethod
    def of_units(offsets: Int64Array, lengths: Int64Array) -> Ranges:
        """The ranges of units, or parts of units, that are each read as a whole.

        offsets, lengths: int64 (m,), in any order; a unit may occur twice. Raises ValueError if units overlap.
        """
        begins, pieces = _pieces(lengths)
        owner = np.repeat(np.arange(len(lengths)), pieces)
        nbytes = np.minimum(RANGE_BYTES, lengths[owner] - begins)
        both = np.unique(np.stack((offsets[owner] + begins, nbytes), axis=1), axis=0)
        ranges = Ranges(both[:, 0].copy(), both[:, 1].copy())
        if (ranges.offsets[1:] < ranges.offsets[:-1] + ranges.lengths[:-1]).any():
            raise ValueError("units of a file overlap, expected separate ranges of bytes")
        return ranges

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Ranges)
            and np.array_equal(self.offsets, other.offsets)
            and np.array_equal(self.lengths, other.lengths)
        )


def _pieces(lengths: npt.NDArray[np.integer]) -> tuple[Int64Array, Int64Array]:
    """The offset of each piece in its unit, (m,), and the number of pieces of each unit, (n,)."""
    pieces = -(-lengths.astype(np.int64) // RANGE_BYTES)
    rank = np.arange(pieces.sum()) - np.repeat(np.cumsum(pieces) - pieces, pieces)
    return rank * RANGE_BYTES, pieces


class RangeSums:
    """The sums of ranges of a file. sums: uint32 (n,). file_sha256: the whole file's, for sums that were kept."""

    def __init__(self, ranges: Ranges, sums: UInt32Array, file_sha256: str | None = None) -> None:
        self.ranges = ranges
        self.sums = sums
        self.file_sha256 = file_sha256

    def checks(self, offsets: npt.NDArray[np.integer], lengths: npt.NDArray[np.integer] | int) -> Int64Array:
        """See `Sums.checks`. The segments are whole units, or parts, that were passed to `Ranges.of_units`."""
        lengths = np.broadcast_to(np.asarray(lengths), offsets.shape)
        begins, pieces = _pieces(lengths)
        owner = np.repeat(np.arange(len(offsets)), pieces)
        index = np.searchsorted(self.ranges.offsets, offsets[owner] + begins)
        found = np.minimum(index, len(self.sums) - 1)
        nbytes = np.minimum(RANGE_BYTES, lengths[owner] - begins)
        if len(self.sums) == 0:
            raise ValueError("the file has no units")
        there = self.ranges.offsets[found] == offsets[owner] + begins
        if not (there & (self.ranges.lengths[found] == nbytes)).all():
            raise ValueError(f"there are no sums of {lengths} bytes at {offsets}")
        position = np.cumsum(lengths) - lengths
        return np.stack((position[owner] + begins, nbytes, self.sums[found]), axis=1).astype(np.int64)

    def within(self, begin: int, nbytes: int) -> Int64Array:
        """The checks for `nbytes` bytes at `begin`, in the form of `Sums.checks`: all sums of ranges there.

        Raises ValueError unless these ranges cover the bytes exactly.
        """
        first, last = np.searchsorted(self.ranges.offsets, (begin, begin + nbytes))
        position = self.ranges.offsets[first:last] - begin
        lengths = self.ranges.lengths[first:last]
        if not np.array_equal(position, np.cumsum(lengths) - lengths) or lengths.sum() != nbytes:
            raise ValueError(f"the ranges with sums do not cover {nbytes} bytes at {begin}")
        return np.stack((position, lengths, self.sums[first:last]), axis=1).astype(np.int64)

    def to_bytes(self, identity: dict[str, Any], file_sha256: str) -> bytes:
        """The contents of a file that keeps the sums: a line of JSON, then offsets and lengths (int64) and sums
        (uint32), all little-endian.

        identity: plain JSON that identifies the file. file_sha256: the whole file's, when the sums were made.
        """
        arrays = (self.ranges.offsets.astype("<i8"), self.ranges.lengths.astype("<i8"), self.sums.astype("<u4"))
        body = b"".join(array.tobytes() for array in arrays)
        head = {"format": SUMS_FORMAT, "identity": identity, "file_sha256": file_sha256, "ranges": len(self.sums)}
        head["sha256"] = hashlib.sha256(json.dumps(head, sort_keys=True).encode() + body).hexdigest()
        return json.dumps(head).encode() + b"\n" + body

    @staticmethod
    def from_bytes(data: bytes, identity: dict[str, Any]) -> RangeSums | None:
        """The inverse of `to_bytes`; None if `data` has another identity or is damaged."""
        line, _, body = data.partition(b"\n")
        try:
            head = json.loads(line)
            digest = head.pop("sha256")
            sha256, count = head["file_sha256"], head["ranges"]
            sound = digest == hashlib.sha256(json.dumps(head, sort_keys=True).encode() + body).hexdigest()
        except (ValueError, RecursionError, AttributeError, LookupError, TypeError):
            return None
        expected = {"format": SUMS_FORMAT, "identity": identity, "file_sha256": sha256, "ranges": count}
        if not sound or head != expected or type(count) is not int or len(body) != 20 * count:
            return None
        offsets, lengths = np.frombuffer(body[: 16 * count], "<i8").reshape(2, count)
        ranges = Ranges(offsets.astype(np.int64), lengths.astype(np.int64))
        return RangeSums(ranges, np.frombuffer(body[16 * count :], "<u4").astype(np.uint32), sha256)


def make_sums(
    file: UnitFile,
    reader: Reader,
    ranges: Ranges,
    hashed: Callable[[memoryview], object],
    progress: Callable[[int], None],
) -> RangeSums:
    """Reads the whole file once and makes the sums of `ranges`.

    hashed: receives all bytes, in order. progress: receives the number of bytes of each read. Raises ReadError, also if
    the file is changed meanwhile.
    """
    buffers = [np.zeros(WINDOW_BYTES + file.alignment, np.uint8) for _ in range(2)]
    sums = np.zeros(len(ranges.offsets), np.uint32)
    starts = range(0, file.size, WINDOW_BYTES)

    def begin(turn: int) -> tuple[Any, memoryview]:
        buffer = buffers[turn % 2]
        skip = -buffer.ctypes.data % file.alignment
        nbytes = min(WINDOW_BYTES, file.size - starts[turn])
        segment = (np.array([value]) for value in (starts[turn], buffer.ctypes.data + skip, nbytes))
        return reader.submit(file, *segment, destination=buffer), memoryview(buffer[skip : skip + nbytes].data)

    coming, at = begin(0) if starts else None, 0
    for turn, start in enumerate(starts):
        assert coming is not None
        ticket, view = coming
        reader.wait(ticket)
        coming = begin(turn + 1) if turn + 1 < len(starts) else None
        hashed(view)
        end = start + len(view)
        while at < len(sums) and ranges.offsets[at] < end:
            first, last = int(ranges.offsets[at]), int(ranges.offsets[at] + ranges.lengths[at])
            sums[at] = zlib.crc32(view[max(first - start, 0) : last - start], int(sums[at]))
            if last > end:
                break
            at += 1
        progress(len(view))
    file.verify_unchanged()
    return RangeSums(ranges, sums)
