"""Repairs MLX's count of running CPU tasks after tests that make evaluations fail on purpose.

MLX 0.32 counts a task before it hands it to a thread. If an earlier task of that thread has failed, the hand-over
raises and the count stays too high (`CommandEncoder::dispatch`, `StreamThread::enqueue`). At two or more such tasks, an
evaluation of more than ten tasks waits for ever if all of them end before it begins to wait
(`Scheduler::wait_for_one`), which happens on a busy machine. That needs hundreds of failed evaluations in one process,
which only tests have.
"""

from __future__ import annotations

import ctypes
import time
from pathlib import Path

import mlx.core as mx

SYMBOL = "_ZN3mlx4core9scheduler9schedulerEv"  # mlx::core::scheduler::scheduler(); its first member is the count
IDLE_S = 0.5  # running tasks change the count within this time


def _count() -> ctypes.c_int | None:
    """The counter in memory; None if this MLX has no such symbol."""
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
    """Repairs the count and returns the excess: the count that stays the same for a while, in which nothing runs."""
    if COUNT is None or (found := COUNT.value) == 0:
        return 0
    end = time.monotonic() + IDLE_S
    while COUNT.value == found:
        if time.monotonic() > end:
            COUNT.value = 0
            return found
        time.sleep(0.01)
    return 0  # a task is running; a later test repairs the count
