"""Ctrl-C, kept back for a moment."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def interrupts_later() -> Iterator[None]:
    """What Ctrl-C does within this context, it does at its end: a message between ranks that has begun must end.

    Only the main thread is interrupted, so nothing is done in others. Signals that end the process are not kept back.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler):
        yield
        return
    noted: list[tuple[Any, ...]] = []
    try:
        signal.signal(signal.SIGINT, lambda *given: noted.append(given))
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if noted:
            handler(*noted[-1])
