"""How much memory the system has swapped and compressed: counters since its start, of all programs together.

Slots that the system swaps out cost more than the reads that they save, and wear the SSD.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
import warnings
from dataclasses import dataclass, fields

_HOST_VM_INFO64 = 4  # mach/host_info.h
_WORDS = 38  # 32-bit words of the structure's first version, which later systems still fill


@dataclass(frozen=True)
class SwapCounters:
    """Bytes since the start of the system, or between two moments. Compression is told by macOS only."""

    swapped_in: int = 0
    swapped_out: int = 0
    compressed: int = 0
    decompressed: int = 0

    def __sub__(self, before: SwapCounters) -> SwapCounters:
        return SwapCounters(*(getattr(self, f.name) - getattr(before, f.name) for f in fields(self)))

    def __add__(self, other: SwapCounters) -> SwapCounters:
        return SwapCounters(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def line(self) -> str | None:
        """A line for the user, if anything was written to swap."""
        if not self.swapped_out:
            return None
        megabytes = max(1, round(self.swapped_out / 1e6))
        return f"Swap: {megabytes} MB were written to swap while this ran: lower --memory, or close other programs"


_latest = SwapCounters()


def swap_counters() -> SwapCounters:
    """The counters now; zeros where the system does not tell them. If it cannot be asked, as with too many open files,
    those of the last time."""
    global _latest
    with contextlib.suppress(OSError):
        _latest = _on_macos() if sys.platform == "darwin" else _on_linux()
    return _latest


def _on_linux() -> SwapCounters:
    import psutil

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # psutil warns of a kernel that does not count swapping
        swap = psutil.swap_memory()
    return SwapCounters(int(swap.sin), int(swap.sout))


class _VmStatistics64(ctypes.Structure):
    """struct vm_statistics64 of mach/vm_statistics.h, in pages."""

    _fields_ = [
        *((name, ctypes.c_uint32) for name in ("free", "active", "inactive", "wired")),
        *(
            (name, ctypes.c_uint64)
            for name in (
                *("zero_filled", "reactivated", "paged_in", "paged_out", "faults", "copied"),
                *("lookups", "hits", "purged"),
            )
        ),
        *((name, ctypes.c_uint32) for name in ("purgeable", "speculative")),
        *((name, ctypes.c_uint64) for name in ("decompressions", "compressions", "swapins", "swapouts")),
        *((name, ctypes.c_uint32) for name in ("compressor", "throttled", "external", "internal")),
        ("in_compressor", ctypes.c_uint64),
    ]


@functools.cache
def _mach() -> tuple[ctypes.CDLL, int]:
    """The system library, and this host's port, of which every call would make another reference."""
    library = ctypes.CDLL("/usr/lib/libSystem.dylib")
    library.mach_host_self.restype = ctypes.c_uint32
    library.host_statistics64.argtypes = [ctypes.c_uint32, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p]
    return library, library.mach_host_self()


def _on_macos() -> SwapCounters:
    """psutil's counters of macOS include pages of files, so the kernel is asked itself."""
    library, host = _mach()
    found, words = _VmStatistics64(), ctypes.c_uint32(_WORDS)
    if library.host_statistics64(host, _HOST_VM_INFO64, ctypes.byref(found), ctypes.byref(words)):
        return SwapCounters()
    pages = (found.swapins, found.swapouts, found.compressions, found.decompressions)
    return SwapCounters(*(int(count) * mmap.PAGESIZE for count in pages))
