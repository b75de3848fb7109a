"""Energy that the system counts and tells without root.

macOS: the energy of a process's own CPU time, from proc_pid_rusage (libproc.h); sys/resource.h has it in
rusage_info_v6, in nanojoules. The GPU's is not in it, and some machines are said to leave the counter unchanged.
Linux: the energy of whole processor packages (/sys/class/powercap), where their counters can be read; usually only root
can.
"""

from __future__ import annotations

import ctypes
import os
import sys
from pathlib import Path
from typing import NamedTuple

from .form import Energy

POWERCAP = Path("/sys/class/powercap")
_FLAVOR, _WORDS, _ENERGY = 6, 58, 2 + 40  # RUSAGE_INFO_V6, its length and ri_energy_nj, in words of 8 bytes


class Counter(NamedTuple):
    """A counter of microjoules that begins again at 0 after `most`; None if it never does."""

    now: int
    most: int | None = None


class EnergyMeter:
    """Counts from its making on. powercap: where Linux keeps the counters of packages."""

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self._powercap = powercap
        self._begin = self._counters()

    def read(self) -> tuple[Energy, float | None]:
        """What is counted, and the joules since the meter was made; None if nothing is counted, or nothing moved."""
        end = self._counters()
        used = 0
        for name, counter in self._begin.items():
            if name not in end:
                return "not available", None
            moved = end[name].now - counter.now
            used += moved if moved >= 0 or counter.most is None else moved + counter.most
        if used <= 0:
            return "not available", None
        return "process CPU" if sys.platform == "darwin" else "processor packages", used / 1e6

    def _counters(self) -> dict[str, Counter]:
        if sys.platform == "darwin":
            return {} if (used := _own_microjoules()) is None else {"process": Counter(used)}
        found = {}
        try:
            for zone in sorted(self._powercap.glob("intel-rapl:[0-9]*")):
                if zone.name.count(":") == 1:  # A zone within a package is counted with it.
                    most = int((zone / "max_energy_range_uj").read_text())
                    found[zone.name] = Counter(int((zone / "energy_uj").read_text()), most)
        except (OSError, ValueError):
            return {}
        return found


def _own_microjoules() -> int | None:
    words = (ctypes.c_uint64 * _WORDS)()
    try:
        failed = ctypes.CDLL("/usr/lib/libproc.dylib").proc_pid_rusage(os.getpid(), _FLAVOR, words)
    except (OSError, AttributeError):
        return None
    return None if failed else int(words[_ENERGY]) // 1000
