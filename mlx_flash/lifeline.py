"""Ends this process when the one that started it goes away, however it does: nobody can clean up after a SIGKILL.

The parent holds the writing end of this process's standard input and writes nothing. The kernel closes it with the
parent, on every system.
"""

from __future__ import annotations

import os
import signal
import threading
import time

GRACE_SECONDS = 5.0


def end_with_stdin(grace_seconds: float = GRACE_SECONDS) -> None:
    """From now on the end of standard input is this process's end: SIGTERM, and SIGKILL after `grace_seconds`.

    A process that leads its group takes the group along: a conversion that it has started ends, too.
    """
    threading.Thread(target=_watch, args=(grace_seconds,), name="lifeline", daemon=True).start()


def _watch(grace_seconds: float) -> None:
    try:
        while os.read(0, 4096):
            pass
    except OSError:  # closed from the start
        pass
    _signal(signal.SIGTERM)
    time.sleep(grace_seconds)
    _signal(signal.SIGKILL)


def _signal(number: signal.Signals) -> None:
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), number)
    else:
        os.kill(os.getpid(), number)
