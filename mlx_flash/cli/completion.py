"""What the Tab key completes in a chat: commands, the names of settings, and paths."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from .chat_settings import ABOUT, SWITCHES
from .command_list import COMMANDS, WITH_PATH

DELIMITERS = " /\n\t"


def complete_with(readline: ModuleType | None) -> None:
    """Makes the Tab key complete, if Python has readline."""
    if readline is None:
        return
    found: list[str] = []

    def complete(_text: str, state: int) -> str | None:
        if state == 0:
            line, start = readline.get_line_buffer()[: readline.get_endidx()], readline.get_begidx()
            # Readline replaces only what follows the last delimiter.
            found[:] = [candidate[start:] for candidate in completions(line)]
        return found[state] if state < len(found) else None

    readline.set_completer_delims(DELIMITERS)
    readline.set_completer(complete)
    readline.parse_and_bind("bind ^I rl_complete" if "libedit" in (readline.__doc__ or "") else "tab: complete")


def completions(line: str) -> list[str]:
    """The lines that a line may become."""
    name, space, rest = line.partition(" ")
    if not name.startswith("/") or "\n" in line:
        return []
    if not space:
        return [f"{known} " if COMMANDS[known].argument else known for known in COMMANDS if known.startswith(name)]
    if name in WITH_PATH:
        return [f"{name} {path}" for path in _paths(rest)]
    if name == "/set":
        setting, space, value = rest.partition(" ")
        if not space:
            return [f"/set {known} " for known in ABOUT if known.startswith(setting)]
        values = [*SWITCHES, "default"] if setting in ("markdown", "thoughts") else ["default"]
        return [f"/set {setting} {known}" for known in values if known.startswith(value)]
    return []


def _paths(typed: str) -> list[str]:
    """The paths that begin with what is typed; a folder's ends with a slash."""
    folder, slash, begin = typed.rpartition("/")
    try:
        where = Path(f"{folder}{slash}" or ".").expanduser()
        names = sorted(os.listdir(where))
    except (OSError, RuntimeError):
        return []
    shown: Callable[[str], str] = lambda name: f"{name}/" if (where / name).is_dir() else name  # noqa: E731
    return [
        f"{folder}{slash}{shown(name)}"
        for name in names
        if name.startswith(begin) and name.isprintable() and (begin or not name.startswith("."))
    ]
