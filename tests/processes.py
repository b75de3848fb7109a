"""Checks on other processes, which may end at any time."""

from __future__ import annotations

import psutil


def runs(process: psutil.Process, word: str) -> bool:
    """Whether the process's command line has that word. False if it has ended."""
    try:
        return word in process.cmdline()
    except psutil.Error:
        return False


def has_ended(process: psutil.Process) -> bool:
    """Whether the process has ended, even if it is still a zombie."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
