"""What a terminal can be shown of a text that a model, or a file, may have filled with anything."""

from __future__ import annotations

import os
from typing import TextIO

# Control characters are replaced by their pictures, so that no escape sequence reaches the terminal: it could move the
# cursor, write into the clipboard, or rename the window. The second range has sequences of one character.
_PICTURES: dict[int, str | None] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **dict.fromkeys(range(0x80, 0xA0), "\ufffd"),
    0x0D: None,
}


def printable(text: str) -> str:
    """The text without what a terminal would obey. Lines and tabs stay."""
    return text.translate(_PICTURES)


def for_stream(text: str, stream: TextIO) -> str:
    """The text as it may be written to the stream: `printable` for a terminal, unchanged for a file or a pipe."""
    return printable(text) if stream.isatty() else text


def size_of(stream: TextIO) -> tuple[int, int]:
    """(columns, rows) of the stream's terminal; usual ones for a terminal that does not know, as in some containers."""
    columns, rows = os.get_terminal_size(stream.fileno())
    return columns or 80, rows or 24


def lacks_styles(stream: TextIO) -> str | None:
    """Why the stream cannot show styles: a clause; None if it can."""
    if not stream.isatty():
        return "the output is not a terminal"
    if os.environ.get("TERM", "dumb") == "dumb":
        return "TERM names no terminal with styles"
    return "NO_COLOR is set" if os.environ.get("NO_COLOR") else None
