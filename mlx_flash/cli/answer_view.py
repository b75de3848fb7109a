"""Shows an answer while it is generated: its text, as Markdown if the terminal can, and its thoughts, dimmed."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from ..text.answer_parts import AnswerParts, Part, Text, Thought
from .printable import for_stream, lacks_styles, size_of

if TYPE_CHECKING:
    from .live_region import LiveRegion
    from .markdown_stream import MarkdownStream

DIM, UNDIM = "\x1b[2m", "\x1b[22m"
HIDDEN = "thinking ..."  # stands for thoughts that are not shown
LEAST_PAUSE_S = 0.03  # between two drawings
SHARE = 10  # A drawing is followed by a pause of so many times its duration.


class AnswerView:
    """Prints an answer. The text goes to standard output, thoughts to standard error.

    As a context, it leaves the terminal in order after an error.
    """

    def __init__(
        self,
        parts: AnswerParts | None,
        *,
        markdown: bool = False,
        thoughts: bool = True,
        said: str = "",
        below: Callable[[], int] = lambda: 0,
    ) -> None:
        """parts: None for an answer that is one text. markdown: whether to render the text; only for a terminal.

        thoughts: whether to show them. said: what the model said before, which this answer continues; of Markdown, its
        last block is shown again. below: see LiveRegion.
        """
        self._parts = parts
        self._shows_thoughts = thoughts
        self._thinking = False
        self._dims = lacks_styles(sys.stderr) is None
        self.text = ""
        self.thoughts = ""
        for part in [Text(said)] if parts is None else parts.feed(said):
            self.text += part.text if isinstance(part, Text) else ""
            self.thoughts += part.text if isinstance(part, Thought) else ""
        self._markdown = _MarkdownView(self.text, below) if markdown else None

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, *_: Any) -> None:
        if kind is not None:
            self._end_thoughts()
            if not self._end_block() and self.text and issubclass(kind, Exception):
                print(flush=True)  # The sentence that follows begins a line.

    def add(self, text: str) -> None:
        self._show([Text(text)] if self._parts is None else self._parts.feed(text))

    def finish(self, whole: bool) -> None:
        """Ends the answer and its line. whole: whether the model itself ended it."""
        if self._parts is not None:
            self._show(self._parts.finish(whole))
        self._end_thoughts()
        if not self._end_block():
            print(flush=True)

    def _show(self, parts: list[Part]) -> None:
        for part in parts:
            if isinstance(part, Text):
                self._end_thoughts()
                self.text += part.text
                if self._markdown is None:
                    print(for_stream(part.text, sys.stdout), end="", flush=True)
                else:
                    self._markdown.add(part.text)
            elif isinstance(part, Thought):
                self.thoughts += part.text
                self._begin_thoughts()
                if self._shows_thoughts:
                    self._think(for_stream(part.text, sys.stderr))

    def _begin_thoughts(self) -> None:
        if not self._thinking:
            self._end_block()
            self._thinking = True
            self._think(DIM if self._dims else "")
            if not self._shows_thoughts and sys.stderr.isatty():
                self._think(HIDDEN)

    def _end_thoughts(self) -> None:
        if not self._thinking:
            return
        self._thinking = False
        self._think(UNDIM if self._dims else "")
        if self._shows_thoughts:
            self._think("\n\n")
        elif sys.stderr.isatty():
            self._think("\r" + " " * len(HIDDEN) + "\r")

    def _end_block(self) -> bool:
        """Makes the Markdown so far final. Returns whether the cursor is in the first column afterwards."""
        return self._markdown is not None and self._markdown.end()

    def _think(self, text: str) -> None:
        with contextlib.suppress(OSError):  # Thoughts that cannot be shown must not stop the answer.
            print(text, end="", file=sys.stderr, flush=True)


class _MarkdownView:
    """Draws Markdown as it grows, but spends only a small share of the time on it."""

    def __init__(self, before: str, below: Callable[[], int]) -> None:
        from .live_region import LiveRegion
        from .markdown_stream import MarkdownStream

        self._stream: MarkdownStream = MarkdownStream()
        self._region: LiveRegion = LiveRegion(below)
        self._stream.resume(before)
        self._next = 0.0  # when it may be drawn again

    def add(self, text: str) -> None:
        self._stream.add(text)
        began = time.monotonic()
        if began >= self._next:
            self._draw(ended=False)
            now = time.monotonic()
            self._next = now + max(LEAST_PAUSE_S, SHARE * (now - began))

    def end(self) -> bool:
        return self._draw(ended=True)

    def _draw(self, ended: bool) -> bool:
        final, live = self._stream.lines(size_of(sys.stdout)[0], ended)
        self._region.draw(final, live)
        return bool(final)
