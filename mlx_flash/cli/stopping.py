"""Makes sure that a stop ends a command. After a grace period, a thread of stop.c ends even a process that hangs."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
from pathlib import Path

from ..errors import FlashError

GRACE_S = 8.0  # from a stop to a forced end; docker and launchd kill after 10 s or more
LIFELINE_S = 5.0  # from the end of standard input to SIGKILL

_told = -1  # the pipe's writing end. A byte is the number of a signal, or 0 for "read the settings again".


@functools.cache
def _library() -> ctypes.CDLL:
    path = Path(__file__).with_name("_stop.so")
    try:
        library = ctypes.CDLL(str(path))
        library.mf_stop_watch.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_char_p]
        library.mf_stop_with_stdin.argtypes = [ctypes.c_double]
    except (OSError, AttributeError) as error:
        raise FlashError(
            f"The compiled {path.name} is missing or cannot be used ({error}). "
            "Install a C compiler (xcode-select --install on a Mac) and reinstall mlx-flash-runtime."
        ) from None
    return library


def watch(name: str, codes: dict[signal.Signals, int]) -> None:
    """Makes each of these signals end the process within GRACE_S, with the signal's exit code.

    Call it once, in the main thread, from the process of the command `name`. The process's own handlers run first and
    may end it earlier. Raises FlashError.
    """
    global _told
    library = _library()
    reading, _told = os.pipe()
    os.set_blocking(_told, False)
    message = f"{name}: ended without waiting for what had not answered {GRACE_S:g} s after the stop\n"
    _check(library.mf_stop_watch(reading, int(GRACE_S * 1000), message.encode()[:500]))
    set_codes(codes)
    signal.set_wakeup_fd(_told, warn_on_full_buffer=False)


def set_codes(codes: dict[signal.Signals, int]) -> None:
    """Changes the exit codes, if `watch` was called."""
    if _told >= 0:
        for number, code in codes.items():
            _library().mf_stop_code(int(number), code)


def allow_interrupts(count: int) -> None:
    """Does not count the next `count` Ctrl-C as a stop, and forgets the earlier ones."""
    if _told >= 0:
        _library().mf_stop_patience(count)
        _look_again()


def ended(code: int) -> None:
    """Says that the command has ended. Threads that Python still waits for have GRACE_S left."""
    if _told >= 0:
        _library().mf_stop_ended(code)
        _look_again()


def _look_again() -> None:
    with contextlib.suppress(BlockingIOError):  # The pipe is full, so the thread will wake anyway.
        os.write(_told, b"\0")


def end_with_stdin(grace_seconds: float = LIFELINE_S) -> None:
    """Ends this process when its standard input ends: by SIGTERM, then by SIGKILL after `grace_seconds`.

    The parent holds the writing end and writes nothing; the kernel closes it when the parent ends, for any reason. If
    this process leads its process group, the whole group is ended. Raises FlashError.
    """
    _check(_library().mf_stop_with_stdin(grace_seconds))


def _check(error: int) -> None:
    if error:
        raise FlashError(f"the thread that watches for signals cannot be started: {os.strerror(error)}.")
