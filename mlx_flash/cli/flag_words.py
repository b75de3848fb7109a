"""The flags of a command line, for a process that starts later and elsewhere."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def flags_of(words: Sequence[str], make_parser: Callable[[], argparse.ArgumentParser]) -> tuple[str, ...]:
    """The words of a valid command line as `--flag=value`, for a process that starts in another folder.

    The values stay as they were typed, apart from folders, whose paths become absolute. An API key is left out, and
    so is `--print`, which is for this process.
    """
    parser = make_parser()
    for action in parser._actions:
        action.type = action.choices = None  # the texts, not what is made of them
    given = parser.parse_args(words)
    flags = []
    for action in parser._actions:
        value: Any = getattr(given, action.dest, action.default)
        if action.dest in ("api_key", "print") or value == action.default:
            continue
        for text in value if isinstance(value, list) else [value]:
            if "DIR" in str(action.metavar):
                text = _whole(text)
            flags.append(action.option_strings[0] if action.nargs == 0 else f"{action.option_strings[0]}={text}")
    return tuple(flags)


def _whole(text: str) -> str:
    """The absolute path of a folder; a text that does not name one stays as it is."""
    with contextlib.suppress(OSError, RuntimeError, ValueError):  # too long, or ~ of an unknown user
        if (folder := Path(text).expanduser()).is_dir():
            return os.path.abspath(folder)
    return text
