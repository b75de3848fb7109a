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


def hold(bytes_per_second: int) -> None:
    """Holds the reads of this process, which was started with the library, at a rate. 0 ends that."""
    ctypes.CDLL(str(library())).paced_set(ctypes.c_int64(bytes_per_second))
