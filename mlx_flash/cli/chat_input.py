"""What a user types into a chat: questions of one or more lines, and answers to the chat's own questions."""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from ..errors import UsageError
from ..source.cached import HISTORY, cache_folder
from .completion import complete_with
from .history import History
from .printable import printable
from .terminal import Interrupts, say

PROMPT, MORE = ">>> ", "... "
QUOTES = '"""'


def history_file() -> Path:
    try:
        return cache_folder() / HISTORY
    except UsageError:  # There is no home folder; a model named by its folder needs none.
        return Path(os.devnull)


class TypedLines:
    """Iterates over what is typed into the terminal until Ctrl-D.

    A message between lines that begin and end with three quotes has several lines, and so has one whose lines end with
    a backslash.
    """

    def __init__(self, interrupts: Interrupts) -> None:
        self._interrupts = interrupts
        self._history = History(history_file())
        complete_with(self._history.readline)

    def __iter__(self) -> Iterator[str]:
        while True:
            try:
                text = self._message()
            except EOFError:
                print()
                return
            except KeyboardInterrupt:
                print()
                if not self._history.typed_so_far():
                    say("/quit or Ctrl-D leaves the program")
            except UnicodeDecodeError:
                say("that is not valid UTF-8 text.")
            else:
                self._history.add(text)
                yield text

    def edited(self, text: str) -> str | None:
        """The text as the user changes it: in the editor that $VISUAL or $EDITOR names, else on the line.

        None if it was given up. Raises UsageError if the editor cannot be started or fails.
        """
        editor = os.environ.get("VISUAL") or os.environ.get("EDITOR")
        if editor:
            return _in_editor(editor, text, self._interrupts)
        with self._history.offering(text):
            try:
                changed = self._message()
            except (EOFError, KeyboardInterrupt, UnicodeDecodeError):
                print()
                return None
        self._history.add(changed)
        return changed

    def agrees(self, question: str) -> bool:
        try:
            return self._line(f"{printable(question)} [y/N] ").strip().lower() in ("y", "yes")
        except (EOFError, KeyboardInterrupt, UnicodeDecodeError):
            print()
            return False

    def _line(self, prompt: str) -> str:
        with self._interrupts.raising():
            return input(prompt)

    def _message(self) -> str:
        line = self._line(PROMPT)
        before, quotes, after = line.partition(QUOTES)
        # A command may stand before the quotes, as in /system. Pasted lines may begin with quotes of their own.
        if quotes and "\n" not in line and (not before.strip() or before.startswith("/")):
            lines = [after]
            while not lines[-1].rstrip().endswith(QUOTES):
                lines.append(self._line(MORE))
            lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
            text = "\n".join(lines).strip("\n")
            return f"{before} {text}" if text.startswith("/") else f"{before}{text}"  # Quotes are not a command.
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            lines.append(self._line(MORE))
        return "\n".join(lines)


def piped_lines(interrupts: Interrupts) -> Iterator[str]:
    """The lines of standard input."""
    sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
    while True:
        with interrupts.raising():
            line = sys.stdin.readline()
        if not line:
            return
        yield line.rstrip("\r\n")


def _in_editor(editor: str, text: str, interrupts: Interrupts) -> str:
    descriptor, name = tempfile.mkstemp(prefix="question-", suffix=".md")  # with mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(f"{text}\n" if text else "")
        interrupts.renew()
        # Ctrl-C belongs to the editor. A handler, unlike SIG_IGN, is not inherited by it.
        before = signal.signal(signal.SIGINT, lambda *_: None)
        try:
            code = subprocess.call([*shlex.split(editor), name])
        finally:
            signal.signal(signal.SIGINT, before)
            interrupts.renew()
        if code:
            raise UsageError(f"the editor {editor} ended with code {code}, so nothing was changed.")
        return Path(name).read_text(encoding="utf-8").strip("\n")
    except (OSError, ValueError) as error:
        raise UsageError(f"the editor {editor} cannot be used: {error}. $VISUAL or $EDITOR names it.") from None
    finally:
        with contextlib.suppress(OSError):
            os.unlink(name)
