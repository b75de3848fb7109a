"""Builds the library of shim.c, starts programs under it, and arms it from within such a program."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

from mlx_flash.bench.tools.preload import library_of, preload_with

SOURCE = Path(__file__).with_name("shim.c")
VISIBLE = ("eio", "eof", "eintr", "short", "odd", "late")  # the caller can see these, or they change nothing
SILENT = ("flip", "zero", "misdirect")  # only a checksum sees these
WRITES = ("eio", "enospc", "short")


def library() -> Path:
    """The compiled shim. Needs a C compiler and Linux."""
    return library_of(SOURCE)


def environment(rule: str = "", **changes: str) -> dict[str, str]:
    """The environment of a child under the shim. rule: "kind:calls:skip:count:parameter:path", armed from the start."""
    return {**os.environ, "LD_PRELOAD": preload_with(library()), **({"FAULTS": rule} if rule else {}), **changes}


class Shim:
    """The shim in this process, which must have been started under it."""

    def __init__(self) -> None:
        self._library = ctypes.CDLL(str(library()))
        self._library.faults_arm.argtypes = (ctypes.c_char_p,) * 3 + (ctypes.c_long,) * 3
        self._library.faults_seen.restype = self._library.faults_fired.restype = ctypes.c_long

    def arm(self, kind: str, calls: str, path: Path | str, skip: int = 0, count: int = 1, parameter: int = 0) -> None:
        """Hits `count` calls after the first `skip`. calls: "read", "write" or "sync". path: a part of the file's path.

        parameter: milliseconds for "late", seed for "flip". The kind "" only counts.
        """
        text = (kind.encode(), calls.encode(), os.fspath(path).encode())
        self._library.faults_arm(*text, skip, count, parameter)

    def disarm(self) -> int:
        """Disarms the rule. Returns the number of calls that were hit."""
        self._library.faults_disarm()
        return int(self._library.faults_fired())

    def seen(self) -> int:
        """The number of calls that the rule has matched since it was armed."""
        return int(self._library.faults_seen())
