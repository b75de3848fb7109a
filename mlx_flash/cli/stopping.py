"""A stop ends any command: after a grace even if it waits for what never comes, by the thread of stop.c."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import signal
from pathlib import Path

from ..errors import FlashError

GRACE_S = 8.0  # from a stop to an end without waiting; docker and launchd kill after 10 s and more
LIFELINE_S = 5.0  # from the end of standard input to SIGKILL

_told = -1  # the pipe's end that is written: the number of a signal, or 0 for "look at the settings"


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
            "Reinstall mlx-flash-runtime where a C compiler is at hand (xcode-select --install on a Mac)."
        ) from None
    return library


def watch(name: str, codes: dict[signal.Signals, int]) -> None:
    """From now on each of these signals ends the process: at the latest GRACE_S later, with its exit code.

    To be called once, in the main thread, by a process that is a command called `name`. Its own handlers come first,
    and may end it earlier. Raises FlashError.
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
    """Other exit codes, where the process is watched."""
    if _told >= 0:
        for number, code in codes.items():
            _library().mf_stop_code(int(number), code)


def allow_interrupts(count: int) -> None:
    """So many Ctrl-C from now on are not a stop yet, and those before are forgotten."""
    if _told >= 0:
        _library().mf_stop_patience(count)
        _look_again()


def ended(code: int) -> None:
    """The command has ended; what is left of the process, threads that Python waits for, has GRACE_S."""
    if _told >= 0:
        _library().mf_stop_ended(code)
        _look_again()


def _look_again() -> None:
    with contextlib.suppress(BlockingIOError):  # full: it will look
        os.write(_told, b"\0")


def end_with_stdin(grace_seconds: float = LIFELINE_S) -> None:
    """From now on the end of standard input is this process's end: SIGTERM, and SIGKILL after `grace_seconds`.

    The parent holds the writing end and writes nothing; the kernel closes it with the parent, however that ends. A
    process that leads its group takes the group along. Raises FlashError.
    """
    _check(_library().mf_stop_with_stdin(grace_seconds))


def _check(error: int) -> None:
    if error:
        raise FlashError(f"no thread can be started that watches for signals: {os.strerror(error)}.")
