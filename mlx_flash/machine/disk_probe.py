"""How fast the disk gives random pieces of a file, by their size and by how many are read at once.

The reads go past the page cache, by the reader that models are read with. Pieces that are in the page cache are left
out, because macOS gives those from memory even to such reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
import os
import sys
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ..errors import FlashError
from ..flash.reader import Reader, Ticket
from ..flash.system import sync_to_disk
from ..flash.unit_file import UnitFile
from ..source.cached import PROBE
from ..source.ssd_writes import PROBES, count_written
from .told import Facts

SIZES = (16 << 10, 128 << 10, 1 << 20, 4 << 20)  # bytes of a piece
AT_ONCE = (1, 4, 16)  # pieces that are on their way together: threads of the reader
SECONDS = 0.25  # for each size and number
OWN_BYTES = 256 << 20  # of the file that is written where no other is named
SPARE_BYTES = 1 << 30  # of the disk, which stay free
LEAST_PIECES = 16  # not in the page cache; with fewer, all pieces count
_LEAST_S, _MOST_BYTES = 0.01, 16 << 20  # a batch of reads takes so long, or has so many bytes


def probe(file: Path | None, folder: Path, seconds: float | None = None) -> Facts:
    """Measures the disk with an existing file, or with one that is written to `folder` for it and then removed.

    Returns rates: a list of {"piece_bytes", "at_once", "bytes_per_second", "reads"}; direct: whether the reads went
    past the page cache; cached_share: the share of the file that the page cache held; written_bytes: what was written
    for it; file_bytes. Pieces of more than 1 MiB are read in several requests, as models' are.

    seconds: for each rate; None for SECONDS. Raises FlashError or OSError.
    """
    seconds = SECONDS if seconds is None else seconds
    with contextlib.ExitStack() as stack:
        own = file is None
        path = stack.enter_context(_own_file(folder)) if file is None else file
        opened = stack.enter_context(UnitFile(path))
        resident = _resident_pages(path, opened.size)
        rates = []
        for at_once in AT_ONCE:
            with Reader(at_once) as reader:
                for size in SIZES:
                    offsets = _pieces(size, opened.size, resident)
                    if len(offsets):
                        nbytes, reads, took = _measured(reader, opened, offsets, size, at_once, seconds)
                        rate = {"bytes_per_second": round(nbytes / took), "reads": reads}
                        rates.append({"piece_bytes": size, "at_once": at_once, **rate})
        return {
            "rates": rates,
            "direct": opened.direct,
            "cached_share": None if resident is None else float(resident.mean()),
            "written_bytes": opened.size if own else 0,
            "file_bytes": opened.size,
            "unknown": {},
        }


@contextlib.contextmanager
def _own_file(folder: Path) -> Iterator[Path]:
    """A file of random bytes, which is removed at the end. Raises FlashError or OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    state = os.statvfs(folder)
    if (free := state.f_bavail * state.f_frsize) < OWN_BYTES + SPARE_BYTES:
        raise FlashError(f"{folder} has only {free / 1e9:.1f} GB free, too little for a test file")
    with tempfile.NamedTemporaryFile(dir=folder, prefix=PROBE) as file:
        random = np.random.default_rng()
        if sys.platform == "darwin":
            import fcntl

            with contextlib.suppress(OSError):
                fcntl.fcntl(file.fileno(), fcntl.F_NOCACHE, 1)
        for _ in range(OWN_BYTES >> 24):
            file.write(random.bytes(1 << 24))
        file.flush()
        count_written(PROBES, OWN_BYTES)
        sync_to_disk(file.fileno())
        if sys.platform == "linux":
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(file.name)


def _resident_pages(path: Path, size: int) -> np.ndarray | None:
    """For each page of a file, whether the page cache holds it: bool (pages,). None if the system does not tell."""
    mincore = getattr(ctypes.CDLL(None), "mincore", None)
    if mincore is None or not size:
        return None
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
        pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        address, states = ctypes.c_void_p(_address_of(memory)), ctypes.c_void_p(pages.ctypes.data)
        failed = mincore(address, ctypes.c_size_t(size), states)
    return None if failed else (pages & 1).astype(bool)


def _pieces(size: int, file_bytes: int, resident: np.ndarray | None) -> np.ndarray:
    """Offsets of pieces in random order, int64 (n,). Every second one is left out, so that no two are neighbours, which
    the reader would read together."""
    offsets = np.arange(0, file_bytes - size + 1, 2 * size, dtype=np.int64)
    if resident is not None and len(offsets):
        before = np.concatenate([[0], np.cumsum(resident)])
        last = -(-(offsets + size) // mmap.PAGESIZE)
        uncached = offsets[before[last] == before[offsets // mmap.PAGESIZE]]
        offsets = uncached if len(uncached) >= LEAST_PIECES else offsets
    return np.random.default_rng().permutation(offsets)


def _measured(
    reader: Reader, file: UnitFile, offsets: np.ndarray, size: int, at_once: int, seconds: float
) -> tuple[int, int, float]:
    """(bytes, reads, seconds) of reading pieces in turn, with two batches on their way, so that threads never wait."""
    most = max(at_once, min(len(offsets) // 2, _MOST_BYTES // size))
    turns = itertools.count()
    begin, count, reads = 0, min(at_once, most), 0
    pending: deque[tuple[Ticket, int]] = deque()
    with mmap.mmap(-1, 2 * most * size) as memory:
        memory.write(bytes(len(memory)))  # so that every page is in memory already
        address = _address_of(memory)
        began = time.perf_counter()
        while (now := time.perf_counter() - began) < seconds or not reads:
            while len(pending) < 2:
                chosen = np.sort(offsets[(begin + np.arange(count)) % len(offsets)])
                addresses = address + (next(turns) % 2 * most + np.arange(count)) * size
                pending.append((reader.submit(file, chosen, addresses, size, destination=memory), count))
                begin += count
            ticket, done = pending.popleft()
            reader.wait(ticket)
            reads += done
            if time.perf_counter() - began - now < _LEAST_S:
                count = min(2 * count, most)
        took = time.perf_counter() - began
        for ticket, _ in pending:
            reader.wait(ticket)
    return reads * size, reads, took


def _address_of(memory: mmap.mmap) -> int:
    """Where a mapping begins. It can be closed afterwards, since nothing that shows its memory is left."""
    return int(np.frombuffer(memory, np.uint8).ctypes.data)
