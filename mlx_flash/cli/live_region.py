"""The last lines of a terminal, redrawn in place: lines that are final scroll up and stay, the others are replaced."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass

from .printable import size_of

# Lines that fit are written without automatic line breaks: a terminal that counts a character as wider than we do then
# cuts a line, instead of breaking it and shifting everything below.
_WRAP, _NO_WRAP = "\x1b[?7h", "\x1b[?7l"


@dataclass(frozen=True)
class StyledLine:
    """A line with its escape sequences, and its width in columns."""

    text: str
    columns: int

    def rows(self, width: int) -> int:
        return max(1, -(-self.columns // width))


class LiveRegion:
    """Writes to standard output, which is a terminal. The cursor waits at the end of the region's last line."""

    def __init__(self, below: Callable[[], int] = lambda: 0) -> None:
        """below: how many rows below the region's end something else has left the cursor since the last call."""
        self._below = below
        self._shown: list[StyledLine] = []
        self._cropped = False

    def draw(self, final: list[StyledLine], live: list[StyledLine]) -> None:
        """Replaces the region: `final` lines become part of the terminal's history, `live` ones may change again.

        Of live lines that are too many for the terminal, the last ones are shown.
        """
        width, height = size_of(sys.stdout)
        kept = len(live)
        rows = 0
        while kept and rows + live[kept - 1].rows(width) < height:
            kept -= 1
            rows += live[kept].rows(width)
        lines = final + live[kept:]
        same = 0
        if not self._cropped and not kept:
            pairs = zip(self._shown, lines, strict=False)
            same = next((i for i, (old, new) in enumerate(pairs) if old != new), min(len(self._shown), len(lines)))
            if len(lines) < len(self._shown):  # The last line is written again, so that the cursor is at its end.
                same = max(0, min(same, len(lines) - 1))
        out = ""
        if same < len(self._shown):
            up = sum(line.rows(width) for line in self._shown[same:]) - 1 + self._below()
            out = "\r" + (f"\x1b[{up}A" if up else "") + "\x1b[J"
        elif same and same < len(lines):
            out = "\r\n"
        out += "\r\n".join(self._written(line, width) for line in lines[same:])
        if final and not live:
            out += "\r\n"
        self._shown, self._cropped = live[kept:], kept > 0
        if out:
            sys.stdout.write(out)
            sys.stdout.flush()

    @staticmethod
    def _written(line: StyledLine, width: int) -> str:
        return line.text if line.columns > width else f"{_NO_WRAP}{line.text}{_WRAP}"
