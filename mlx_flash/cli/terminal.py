"""Shared by commands that write text to a terminal: notes, Ctrl-C, and the progress of a long prompt."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import termios
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from . import stopping
from .beginning import Interrupted, interrupt
from .printable import for_stream, size_of

WITHOUT_TEMPLATE = "Use --ignore-chat-template to run without it."  # follows an error of a chat template


def say(text: str) -> None:
    """Prints a note. It may have names and texts from files, which a terminal must not obey."""
    with contextlib.suppress(OSError):  # A note that cannot be shown must not stop the command.
        print(for_stream(text, sys.stderr), file=sys.stderr, flush=True)


class Interrupts:
    """Counts Ctrl-C: the first sets `asked`, for a clean end; the second raises Interrupted.

    With a `warning`, the second prints the warning, and the third raises Interrupted.
    """

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
        """Forgets every Ctrl-C so far."""
        self.asked, self._warned = False, False
        self._told = False
        if self._warning is not None:
            stopping.allow_interrupts(2)

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Inside this context Ctrl-C raises KeyboardInterrupt. For waiting, which cannot check `asked`."""
        self.renew()
        try:
            signal.signal(signal.SIGINT, interrupt)
            yield
        finally:
            signal.signal(signal.SIGINT, self._handle)

    def rows_written(self) -> int:
        """The rows by which the warning has moved the cursor down since the last call, on standard error's terminal."""
        told, self._told = self._told, False
        if not told or self._warning is None or not sys.stderr.isatty():
            return 0
        return 1 + -(-len(self._warning) // size_of(sys.stderr)[0])

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        if not self.asked:
            self.asked = True
        elif self._warning is None or self._warned:
            raise Interrupted
        else:
            with contextlib.suppress(OSError, ValueError):  # The signal may have interrupted a `print`, so not `print`.
                os.write(sys.stderr.fileno(), f"\n{self._warning}\n".encode())
            self._warned = self._told = True


@contextlib.contextmanager
def keys_unseen() -> Iterator[None]:
    """Inside this context a terminal does not show the keys that are pressed; the next `input` gets and shows them."""
    try:
        number = sys.stdin.fileno()
        before = termios.tcgetattr(number)
    except (OSError, ValueError, termios.error):  # not a terminal
        yield
        return
    unseen = [*before[:3], before[3] & ~termios.ECHO, *before[4:]]
    termios.tcsetattr(number, termios.TCSADRAIN, unseen)
    try:
        yield
    finally:
        termios.tcsetattr(number, termios.TCSADRAIN, before)


class PromptInterrupted(Exception):
    """Raised by Ctrl-C while the prompt is being read."""


def progress_line(interrupts: Interrupts) -> Callable[[int, int], None]:
    """A callback (tokens done, tokens in all) that shows the progress of a prompt, on a terminal, after two seconds.

    It raises PromptInterrupted if Ctrl-C was pressed.
    """
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
    """A sentence that tells what to do about a full context."""
    if model.flash.plan.context < model.flash.positions:
        return f"A larger --context makes more room, up to {model.flash.positions} tokens."
    return "This is the longest context of this model."
