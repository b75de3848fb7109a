"""Memory, pressure and swap now."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

import psutil

from ..flash.stalls import stalled_percent
from ..flash.sysctl import swap_usage, sysctl_number
from .told import Facts, told

# bsd/sys/kern_memorystatus.h: the levels of kern.memorystatus_vm_pressure_level.
LEVELS = {1: "normal", 2: "warning", 4: "critical"}
# Share of the last ten seconds in which some task waited for memory (Linux, /proc/pressure/memory).
SOME_WAIT, MUCH_WAIT = 0.01, 0.1


def memory_state() -> Facts:
    """total_bytes, free_bytes (what can be allocated without swapping, under all limits), swap_total_bytes,
    swap_used_bytes, pressure ("normal", "warning" or "critical"), limit_free_bytes (what the memory cgroups of this
    process leave; None without a limit), open_files (the limit of this process, None without one)."""
    return told(
        {
            "total_bytes": lambda: int(psutil.virtual_memory().total),
            "free_bytes": _free_bytes,
            "swap_total_bytes": lambda: _swap()[0],
            "swap_used_bytes": lambda: _swap()[1],
            "pressure": _pressure,
            "limit_free_bytes": _limit_free_bytes,
            "open_files": _open_files,
        }
    )


def _free_bytes() -> int:
    free, limit = int(psutil.virtual_memory().available), _limit_free_bytes()
    return free if limit is None else min(free, limit)


def _limit_free_bytes() -> int | None:
    if sys.platform != "linux":
        return None
    from ..flash.system import cgroup_free_bytes  # imports MLX

    free = cgroup_free_bytes(Path("/proc/self/cgroup").read_text(), Path("/sys/fs/cgroup"))
    # A group of version 1 without a limit tells a huge number.
    return None if free is None or free >= psutil.virtual_memory().total else free


def _swap() -> tuple[int, int]:
    if sys.platform == "darwin":
        return swap_usage()
    state = psutil.swap_memory()
    return int(state.total), int(state.used)


def _pressure() -> str:
    if sys.platform == "darwin":
        return LEVELS[sysctl_number("kern.memorystatus_vm_pressure_level")]
    waited = pressure_share(Path("/proc/pressure/memory").read_text())
    return "normal" if waited < SOME_WAIT else "warning" if waited < MUCH_WAIT else "critical"


def pressure_share(text: str) -> float:
    """The share of the last ten seconds in which some task waited for memory. text: of /proc/pressure/memory."""
    shares = stalled_percent(text)
    if "some" not in shares:
        raise ValueError("it has no line of that kind")
    return shares["some"] / 100


def _open_files() -> int | None:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if hard == resource.RLIM_INFINITY else hard
