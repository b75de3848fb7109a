"""Looks at other processes, any of which may end between two looks."""

from __future__ import annotations

import psutil


def runs(process: psutil.Process, word: str) -> bool:
    """Whether its command line has that word; not if it has ended."""
    try:
        return word in process.cmdline()
    except psutil.Error:
        return False


def has_ended(process: psutil.Process) -> bool:
    """Also if nobody has waited for it yet."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
