"""Reads files from end to end, for the ceiling beside every measurement and for a known state of the disk before it."""

from __future__ import annotations

import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mlx_flash.defaults import THREADS
from mlx_flash.flash.files import ALIGNMENT, round_up
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import Reader, Ticket
from mlx_flash.flash.unit_file import UnitFile

from .report import forget_cached

DISK_STATE = "re-read: every byte was read once before the run, page cache bypassed (O_DIRECT)"
DISK_STATE_BUFFERED = "unknown: this file system does not read past the page cache"
PIECE_BYTES = 64 << 20  # size of one sequential read
RATE_BYTES = 1 << 30  # bytes to read when the rate is measured again


def sequential_rate(paths: Sequence[Path], most: int | None = None) -> dict[str, Any]:
    """Reads files from end to end (or their first `most` bytes) in large pieces, two at a time.

    Returns bytes, seconds, and whether the page cache was bypassed.
    """
    sizes = [min(path.stat().st_size, most or 2**62) for path in paths]
    pools = [AlignedPool(min(PIECE_BYTES, round_up(max(1, *sizes), ALIGNMENT))) for _ in range(2)]
    direct, seconds = True, 0.0
    with (
        Reader(THREADS) as reader,
        tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="reading in sequence", dynamic_ncols=True) as bar,
    ):
        for path, size in zip(paths, sizes, strict=True):
            with UnitFile(path) as file:
                direct = direct and file.direct
                began = time.perf_counter()
                tickets: list[Ticket] = []
                for turn, begin in enumerate(range(0, size, PIECE_BYTES)):
                    if turn >= 2:
                        reader.wait(tickets.pop(0))
                    length = min(PIECE_BYTES, size - begin)
                    tickets.append(
                        reader.submit(file, *(np.array([v]) for v in (begin, pools[turn % 2].address, length)))
                    )
                    bar.update(length)
                for ticket in tickets:
                    reader.wait(ticket)
                seconds += time.perf_counter() - began
    return {"bytes": sum(sizes), "seconds": seconds, "direct": direct}


def prepare(paths: Sequence[Path]) -> dict[str, Any]:
    """Brings the disk into a known state: drops the files from the page cache and reads every byte once past it.

    Returns the `sequential_rate` of this first pass, and "state", its description in tables.
    """
    for path in paths:
        forget_cached(path)
    first = sequential_rate(paths)
    state = DISK_STATE if platform.system() == "Linux" else DISK_STATE.replace("O_DIRECT", "F_NOCACHE")
    return {**first, "state": state if first["direct"] else DISK_STATE_BUFFERED}
