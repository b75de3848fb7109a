"""Measures how fast a file is read, in large pieces at random places, as streamed weights are."""

from __future__ import annotations

import time

import numpy as np

from .reader import Reader, Ticket
from .requests import MERGE_BYTES
from .unit_file import UnitFile

SECONDS = 0.5
PIECES = 32  # of a batch; two batches are in flight, so that the disk never waits


def disk_rate(file: UnitFile, reader: Reader) -> float | None:
    """Bytes per second of reads from `file`; None if it is too short to tell.

    Reading the same place twice would measure a cache, so no piece is read twice. Raises ReadError.
    """
    pieces = file.size // MERGE_BYTES // PIECES * PIECES
    if pieces < 4 * PIECES:
        return None
    places = np.random.default_rng(0).permutation(pieces)
    buffer = np.zeros(2 * PIECES * MERGE_BYTES + file.alignment, np.uint8)
    address = buffer.ctypes.data + -buffer.ctypes.data % file.alignment
    batches = places.reshape(-1, PIECES)

    def begin(turn: int) -> Ticket:
        targets = address + (turn % 2 * PIECES + np.arange(PIECES)) * MERGE_BYTES
        return reader.submit(file, np.sort(batches[turn]) * MERGE_BYTES, targets, MERGE_BYTES, destination=buffer)

    pending, read, started = [begin(0)], 0, time.perf_counter()
    for turn in range(1, len(batches)):
        pending.append(begin(turn))
        reader.wait(pending.pop(0))
        read += PIECES * MERGE_BYTES
        if time.perf_counter() - started > SECONDS:
            break
    seconds = time.perf_counter() - started
    for ticket in pending:
        reader.wait(ticket)
    return read / seconds
