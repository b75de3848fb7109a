"""Ctrl-C at a chosen line of the code under test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class InterruptAt:
    """Raises KeyboardInterrupt at the given line that runs in the watched files, counted from 1; 0: never.

    watches: whether lines of the file of this path count. count: lines that ran so far.
    """

    def __init__(self, line: int, watches: Callable[[str], bool]) -> None:
        self.line, self.count = line, 0
        self._watches = watches

    def __enter__(self) -> InterruptAt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, _event: str, _argument: Any) -> Any:
        return self._line if self._watches(frame.f_code.co_filename) else None

    def _line(self, _frame: FrameType, event: str, _argument: Any) -> Any:
        if event == "line":
            self.count += 1
            if self.count == self.line:
                raise KeyboardInterrupt
        return self._line
