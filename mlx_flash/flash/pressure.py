"""Whether the system is short of memory, as it says itself. Cheap enough to be asked a few times per second.

macOS has a level (xnu, doc/vm/memorystatus_notify.md; the numbers are those of dispatch_source_create(3)). Linux says
how much memory is available, and which share of the time tasks wait for memory (Documentation/accounting/psi.rst).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from .stalls import stalled_percent
from .sysctl import sysctl_number
from .system import available_memory_bytes, current_memory_bytes

STALLED_PERCENT = 10.0  # of the last ten seconds in which tasks waited for memory
SCARCE = 1 / 4  # share of memory; while more is available, waiting tasks are of a group with a limit of its own


class Level(IntEnum):
    NORMAL = 0
    WARNING = 1
    CRITICAL = 2


@dataclass(frozen=True)
class Pressure:
    """The state of memory.

    available: the bytes that this process can get without swapping. usable: these, and those that it has. Both are None
    if only the level is known, as on macOS, where compressed memory makes such numbers meaningless.
    """

    level: Level
    available: int | None = None
    usable: int | None = None


def memory_pressure() -> Pressure:
    """The state of memory now."""
    if sys.platform == "darwin":
        return Pressure(level_of_macos(_macos_level()))
    available = available_memory_bytes()
    usable = available + current_memory_bytes()
    level = stall_level(_stalls()) if available < SCARCE * usable else Level.NORMAL
    return Pressure(level, available, usable)


def level_of_macos(number: int) -> Level:
    """The level of macOS's number: 1 normal, 2 warning, 4 critical. Any other is taken for normal."""
    return {2: Level.WARNING, 4: Level.CRITICAL}.get(number, Level.NORMAL)


def _macos_level() -> int:
    """The system's number of its level; 0 if it cannot be read."""
    try:
        return sysctl_number("kern.memorystatus_vm_pressure_level")
    except OSError:
        return 0


def stall_level(text: str) -> Level:
    """The level of a pressure file such as /proc/pressure/memory; NORMAL if it is empty."""
    shares = stalled_percent(text)
    if shares.get("full", 0) >= STALLED_PERCENT:
        return Level.CRITICAL
    return Level.WARNING if shares.get("some", 0) >= STALLED_PERCENT else Level.NORMAL


def _stalls() -> str:
    """The pressure file of this process's cgroup (v2), or the machine's; empty if there is none."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
        own = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), "")
        group = Path("/sys/fs/cgroup") / own / "memory.pressure"
        return (group if group.exists() else Path("/proc/pressure/memory")).read_text()
    except OSError:
        return ""
