"""What commands that write text into a terminal share: notes, Ctrl-C, and how far a long prompt is."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from . import stopping
from .beginning import Interrupted, interrupt

WITHOUT_TEMPLATE = "With --ignore-chat-template it is not used."  # after an error of a chat template


def say(text: str) -> None:
    with contextlib.suppress(OSError):  # notes that cannot be shown must not cost the text
        print(text, file=sys.stderr, flush=True)


class Interrupts:
    """The first Ctrl-C asks for a clean end, the second insists; with a `warning` it shows that, the third does."""

    def __init__(self, warning: str | None = None) -> None:
        self._warning = warning
        self.renew()

    def __enter__(self) -> Interrupts:
        self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)
        if self._warning is not None:
            stopping.allow_interrupts(0)

    def renew(self) -> None:
        """Nothing was asked so far."""
        self.asked, self._warned = False, False
        if self._warning is not None:
            stopping.allow_interrupts(2)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Within, Ctrl-C is Python's own KeyboardInterrupt: for waiting, which has no clean end of its own."""
        self.renew()
        try:
            signal.signal(signal.SIGINT, interrupt)
            yield
        finally:
            signal.signal(signal.SIGINT, self._handle)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = True
        elif self._warning is None or self._warned:
            raise Interrupted
        else:
            with contextlib.suppress(OSError, ValueError):  # print might be interrupting itself
                os.write(sys.stderr.fileno(), f"\n{self._warning}\n".encode())
            self._warned = True


class PromptInterrupted(Exception):
    """Ctrl-C while the prompt was being read."""


def progress_line(interrupts: Interrupts) -> Callable[[int, int], None]:
    """Shows how far a long prompt is, on a terminal, after two seconds; also where Ctrl-C is noticed."""
    began = time.monotonic()
    shown = False

    def show(done: int, total: int) -> None:
        nonlocal shown
        if (interrupts.asked or done == total) and shown:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        if interrupts.asked:
            raise PromptInterrupted
        if done < total and sys.stderr.isatty() and time.monotonic() - began > 2:
            shown = True
            print(f"\rprompt: {done} of {total} tokens", end="", file=sys.stderr, flush=True)

    return show


def context_hint(model: Any) -> str:
    """A sentence: what to do about a full context, if anything can be done."""
    if model.flash.plan.context < model.flash.positions:
        return f"A larger --context makes more room, up to {model.flash.positions} tokens."
    return "This model has room for no more."
