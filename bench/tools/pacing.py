"""Holds the reads of a process at a fixed rate, by the preloaded library of paced.c. Needs a C compiler and Linux."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SOURCE = Path(__file__).with_name("paced.c")


@functools.cache
def library() -> Path:
    """The compiled library, built once per version of its source."""
    source = SOURCE.read_bytes()
    target = Path(tempfile.gettempdir()) / f"paced-{os.getuid()}-{hashlib.sha256(source).hexdigest()[:12]}.so"
    if not target.exists():
        made = target.with_suffix(f".{os.getpid()}")
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(made), str(SOURCE), "-ldl", "-lpthread"], check=True)
        made.replace(target)
    return target


@contextmanager
def preloaded() -> Iterator[None]:
    """Inside this context, child processes are started with the library. Their reads are not paced yet."""
    before = os.environ.get("LD_PRELOAD", "")
    os.environ["LD_PRELOAD"] = f"{library()}:{before}" if before else str(library())
    try:
        yield
    finally:
        os.environ["LD_PRELOAD"] = before


def hold(bytes_per_second: int) -> None:
    """Holds the reads of this process, which was started with the library, at a rate. 0 ends that."""
    ctypes.CDLL(str(library())).paced_set(ctypes.c_int64(bytes_per_second))
