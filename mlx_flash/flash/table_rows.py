"""Rows of lookup tables, read from the checkpoint's own files when their ids come.

A row is a few kilobytes, so it is copied: from the reader's destination, or from memory that holds rows of earlier
calls, into an array of the call's own. No graph reads memory that is written again, and nothing has to be evaluated
before a read. This is simpler than slots that graphs read (units.py), and a call may need any number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from .in_place import InPlaceFiles, TableTensor
from .reader import Ticket
from .unit_file import Int64Array

WAYS = 8  # slots that a row may lie in; as many hits as an exact order of use has (bench/results/table-rows.md)
SUM_BYTES = 64 << 10  # of rows that share a checksum, where reads are compared; 20 bytes of memory for each of its sums

Rows = dict[str, npt.NDArray[np.uint8]]
"""Rows of a table: for each of its tensors, by name, uint8 (n, bytes of a row)."""


def rows_per_sum(tensors: Mapping[str, TableTensor]) -> int:
    """The number of rows that share a checksum. A sum of every row would be a tenth of a table of short rows."""
    return max(1, SUM_BYTES // sum(tensor.nbytes for tensor in tensors.values()))


def summed_segments(tensors: Mapping[str, TableTensor]) -> list[tuple[int, Int64Array, Int64Array]]:
    """The ranges of a table that need checksums if reads are compared: (file, offsets, lengths) of each tensor."""
    together = rows_per_sum(tensors)
    count = -(-next(iter(tensors.values())).rows // together)
    groups = np.arange(count, dtype=np.int64)
    return [(tensor.file, *tensor.segments(groups, together)) for tensor in tensors.values()]


class RowCache:
    """The rows that were used last, of tables whose rows have the same tensors, in host memory.

    Everything in here is in proportion to the slots, not to the rows of the tables, which may be hundreds of millions.

    A row has a key: a number, unique among these tables. It lies in one of WAYS slots, those of the set key % sets.
    There it takes the place of the row whose last use is longest ago. An interrupt at any moment leaves every slot
    empty or right.
    """

    def __init__(self, row_bytes: Mapping[str, int], slots: int) -> None:
        """row_bytes: for each tensor, by name, the bytes of its part of a row. slots: rounded down to whole sets."""
        ways = max(1, min(WAYS, slots))
        self._sets = slots // ways
        self.slots = self._sets * ways
        self.row_bytes = dict(row_bytes)
        self._memory = {name: np.zeros((self.slots, nbytes), np.uint8) for name, nbytes in row_bytes.items()}
        self._keys = np.full((self._sets, ways), -1, np.int64)
        self._used = np.zeros((self._sets, ways), np.int64)  # number of the call
        self._calls = 0
        self.hits = self.misses = 0  # rows that calls needed

    @staticmethod
    def slot_bytes(row_bytes: Mapping[str, int]) -> int:
        """Bytes of memory for each slot."""
        return sum(row_bytes.values()) + 2 * np.dtype(np.int64).itemsize

    def find(self, keys: Int64Array) -> Int64Array:
        """The slots of rows that a call needs, by their keys: int64 (n,) -> int64 (n,), -1 for a row without a slot."""
        self._calls += 1
        if not self._sets:
            self.misses += len(keys)
            return np.full(len(keys), -1, np.int64)
        sets = keys % self._sets
        same = self._keys[sets] == keys[:, None]  # (n, ways)
        found, ways = same.any(axis=1), same.argmax(axis=1)
        self._used[sets[found], ways[found]] = self._calls
        hits = int(np.count_nonzero(found))
        self.hits += hits
        self.misses += len(keys) - hits
        return np.where(found, sets * same.shape[1] + ways, -1)

    def copy_into(self, target: Rows, places: npt.NDArray[np.integer], slots: Int64Array) -> None:
        """Copies the rows in `slots` to `places` of `target`, both (m,)."""
        for name, memory in self._memory.items():
            target[name][places] = memory[slots]

    def keep(self, keys: Int64Array, rows: Rows) -> None:
        """Stores rows that are in no slot, by their distinct keys. If a set has too few slots, some are left out."""
        if not self._sets:
            return
        sets = keys % self._sets
        order = np.argsort(sets, kind="stable")
        sets = sets[order]
        rank = np.arange(len(sets)) - np.searchsorted(sets, sets)  # of each row in its set
        fit = rank < self._keys.shape[1]
        order, sets, rank = order[fit], sets[fit], rank[fit]
        ways = np.argsort(self._used[sets], axis=1, kind="stable")[np.arange(len(sets)), rank]
        slots = sets * self._keys.shape[1] + ways
        self._keys[sets, ways] = -1  # First, and the keys last, so that no key ever stands for other bytes.
        for name, memory in self._memory.items():
            memory[slots] = rows[name][order]
        self._used[sets, ways] = self._calls
        self._keys[sets, ways] = keys[order]


class TableRows:
    """The rows of one lookup table.

    shared: the files, the reader and the counters of the model's units. tensors: the table's, by name. cache: where
    rows are kept, perhaps with those of other tables. first_key: the key of the first row in it; the next `count` keys
    are this table's, too. group_rows: rows that are read together; 1 unless the reads are compared with checksums
    (`rows_per_sum`).
    """

    def __init__(
        self,
        shared: InPlaceFiles,
        name: str,
        tensors: Mapping[str, TableTensor],
        cache: RowCache,
        first_key: int = 0,
        group_rows: int = 1,
    ) -> None:
        """name: the table's name, for messages."""
        self.shared, self.tensors, self.cache = shared, dict(tensors), cache
        self.count = next(iter(tensors.values())).rows
        self._first_key, self._group_rows = first_key, group_rows
        shared.tables[name] = self.tensors

    def take(self, rows: Int64Array) -> Rows:
        """The rows that a call needs, in memory of their own. rows: int64 (n,), ascending, distinct, 0 to count - 1.

        Rows that are not kept from earlier calls are read in one batch. Raises ReadError.
        """
        clock, cache = self.shared.clock, self.cache
        clock.start()
        keys = self._first_key + rows
        slots = cache.find(keys)
        here = slots >= 0
        present, missing = np.flatnonzero(here), np.flatnonzero(~here)
        clock.managed()
        if not len(present):
            found = self._read(rows)
            cache.keep(keys, found)
        else:
            found = {name: np.empty((len(rows), t.nbytes), np.uint8) for name, t in self.tensors.items()}
            cache.copy_into(found, present, slots[present])
            if len(missing):
                read = self._read(rows[missing])
                for name, parts in read.items():
                    found[name][missing] = parts
                cache.keep(keys[missing], read)
        clock.managed()
        return found

    def _read(self, rows: Int64Array) -> Rows:
        """Reads rows, distinct and ascending, from the files."""
        together = self._group_rows
        groups = np.unique(rows // together)
        room = {name: np.empty((len(groups), together * t.nbytes), np.uint8) for name, t in self.tensors.items()}
        segments: dict[int, list[Int64Array]] = {}  # file -> (3, n) of each tensor: offsets, addresses, lengths
        for name, tensor in self.tensors.items():
            offsets, lengths = tensor.segments(groups, together)
            addresses = room[name].ctypes.data + np.arange(len(groups)) * room[name].shape[1]
            segments.setdefault(tensor.file, []).append(np.stack((offsets, addresses, lengths)))
        clock, tickets = self.shared.clock, list[Ticket]()
        with self.shared.draining():
            for number, parts in segments.items():
                offsets, addresses, lengths = np.concatenate(parts, axis=1)
                order = np.argsort(offsets, kind="stable")
                tickets.append(
                    self.shared.reader.submit(
                        self.shared.files[number], offsets[order], addresses[order], lengths[order], destination=room
                    )
                )
            clock.managed()
            for ticket in tickets:
                self.shared.wait(ticket)
        clock.waited()
        if together == 1:
            return room
        places = np.searchsorted(groups, rows // together) * together + rows % together
        return {name: room[name].reshape(-1, t.nbytes)[places] for name, t in self.tensors.items()}
