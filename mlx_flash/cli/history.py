"""Lines typed into a terminal: editing by Python's readline, and a history kept in a file."""

from __future__ import annotations

import contextlib
import os
from importlib import import_module
from pathlib import Path
from types import ModuleType

LINES = 1000


class History:
    """Written line by line, not by readline: GNU's and libedit, which macOS has, differ in their files.

    Where Python was built without readline, there is neither editing nor a history.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.readline: ModuleType | None = None
        with contextlib.suppress(ImportError):
            self.readline = import_module("readline")  # here: `input` uses it from then on
        if self.readline is None:
            return
        self.readline.set_auto_history(False)
        if "libedit" not in (self.readline.__doc__ or ""):
            self.readline.parse_and_bind("set enable-bracketed-paste on")  # lines pasted at once are one question
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace").splitlines()
            for line in lines[-LINES:]:
                self.readline.add_history(line)
            if len(lines) > 2 * LINES:
                self._write("".join(f"{line}\n" for line in lines[-LINES:]), os.O_TRUNC)

    def add(self, line: str) -> None:
        """Remembers it, here and for later; a file that cannot be written costs only the later."""
        line = " ".join(line.splitlines())
        if self.readline is None or not line.strip():
            return
        length = self.readline.get_current_history_length()
        if length and self.readline.get_history_item(length) == line:
            return
        self.readline.add_history(line)
        with contextlib.suppress(OSError):
            self._write(f"{line}\n", os.O_APPEND)

    def typed_so_far(self) -> str:
        """The line as it stood when Ctrl-C came."""
        return "" if self.readline is None else self.readline.get_line_buffer()

    def _write(self, text: str, how: int) -> None:
        """The file is the user's alone, as what one asks is."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | how, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
