"""Holds the reads of a process at a fixed rate, by the preloaded library of paced.c. Needs a C compiler and Linux."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .preload import library_of, preload_with

SOURCE = Path(__file__).with_name("paced.c")


def library() -> Path:
    return library_of(SOURCE)


@contextmanager
def preloaded() -> Iterator[None]:
    """Inside this context, child processes are started with the library. Their reads are not paced yet."""
    before = os.environ.get("LD_PRELOAD", "")
    os.environ["LD_PRELOAD"] = preload_with(library())
    try:
        yield
    finally:
        os.environ["LD_PRELOAD"] = before


def paced_environment(bytes_per_second: int) -> dict[str, str]:
    """The variables with which a process and all its children read at that rate, each for itself; 0 as the disk is."""
    return {"LD_PRELOAD": preload_with(library()), "PACED_BYTES_PER_SECOND": str(bytes_per_second)}


def hold(bytes_per_second: int, latency_s: float = 0.0, only_direct: bool = False) -> None:
    """Holds the reads of this process, which was started with the library, at a rate. 0 ends that.

    latency_s: seconds that every read takes at least. only_direct: let reads through the page cache pass.
    """
    rate, latency_ns = ctypes.c_int64(bytes_per_second), ctypes.c_int64(round(latency_s * 1e9))
    ctypes.CDLL(str(library())).paced_set(rate, latency_ns, ctypes.c_int(only_direct))
