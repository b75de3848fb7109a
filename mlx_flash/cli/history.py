"""Lines typed into a terminal: editing by Python's readline, and a history kept in a file."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

LINES = 1000


class History:
    """Line editing, and a history that is kept in a file.

    The file is written line by line, not by readline: GNU readline and macOS's libedit use different file formats.
    If Python was built without readline, there is neither editing nor a history.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.readline: ModuleType | None = None
        with contextlib.suppress(ImportError):
            self.readline = import_module("readline")  # `input` uses it once it is imported.
        if self.readline is None:
            return
        self.readline.set_auto_history(False)
        if "libedit" not in (self.readline.__doc__ or ""):
            self.readline.parse_and_bind("set enable-bracketed-paste on")  # Lines pasted together are one question.
            self.readline.parse_and_bind(r'"\e\C-m": "\C-v\C-j"')  # Alt-Return puts a line break into the line.
        with contextlib.suppress(OSError):
            lines = path.read_text(errors="replace").splitlines()
            for line in lines[-LINES:]:
                self.readline.add_history(line)
            if len(lines) > 2 * LINES:
                self._write("".join(f"{line}\n" for line in lines[-LINES:]), os.O_TRUNC)

    def add(self, line: str) -> None:
        """Adds the line to the history of this session, and to the file if that can be written."""
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
        """The text on the line when Ctrl-C was pressed."""
        return "" if self.readline is None else self.readline.get_line_buffer()

    @contextlib.contextmanager
    def offering(self, text: str) -> Iterator[None]:
        """Inside this context the next line begins with a text, which can be edited."""
        readline = self.readline
        if readline is None:
            yield
            return

        def insert() -> None:
            readline.set_startup_hook(None)
            readline.insert_text(text)

        readline.set_startup_hook(insert)
        try:
            yield
        finally:
            readline.set_startup_hook(None)

    def _write(self, text: str, how: int) -> None:
        """Writes to the file, which only the user can read: questions are private."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | how, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8", errors="replace") as file:
            file.write(text)
