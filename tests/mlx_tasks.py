"""MLX's count of tasks that run on its CPU threads, set right after tests that make evaluations fail on purpose.

MLX 0.32 counts a task before it hands it to a thread; when an earlier task of that thread has failed, the hand-over
raises and nobody takes the count back (`CommandEncoder::dispatch`, `StreamThread::enqueue`). From two on, an evaluation
of more than ten tasks waits for ever if all of them end before it begins to wait (`Scheduler::wait_for_one`), which
happens on a busy machine. Hundreds of evaluations must fail in one process before that: only tests do so.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import mlx.core as mx

SYMBOL = "_ZN3mlx4core9scheduler9schedulerEv"  # mlx::core::scheduler::scheduler(); its first member is the count
IDLE_S = 0.5  # in which tasks that run change it


def _count() -> ctypes.c_int | None:
    """Where it lies; None if this MLX has none there."""
    for library in sorted((Path(mx.__file__).parent / "lib").glob("libmlx.*")):
        try:
            scheduler = getattr(ctypes.CDLL(str(library)), SYMBOL)
        except (OSError, AttributeError):
            continue
        scheduler.restype = ctypes.c_void_p
        count = ctypes.c_int.from_address(scheduler())
        return count if count.value == 0 else None
    return None


COUNT = _count()


def set_right() -> int:
    """Returns how many too many were counted: as many as do not change for a while, in which nothing runs."""
    if COUNT is None or (found := COUNT.value) == 0:
        return 0
    end = time.monotonic() + IDLE_S
    while COUNT.value == found:
        if time.monotonic() > end:
            COUNT.value = 0
            return found
        time.sleep(0.01)
    return 0  # something runs: after a later test
