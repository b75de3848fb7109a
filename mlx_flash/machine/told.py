"""Facts that a machine may refuse to tell. Such a fact is None, and `unknown` says why, so that an odd machine never
ends in a traceback."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import FlashError
from ..flash.plain_files import reason_of
from ..source.children import child_environment

EVERYTHING = "everything"  # stands in `unknown` for a part that told nothing at all
CHILD_S = 120.0  # seconds after which a part that runs in a process of its own is ended

Facts = dict[str, Any]


def told(asked: Mapping[str, Callable[[], Any]]) -> Facts:
    """Calls each function. Returns {name: what it returned} and "unknown": {name: reason} for those that failed.

    A function fails by any exception. Its fact is None then.
    """
    facts: Facts = {}
    unknown: dict[str, str] = {}
    for name, ask in asked.items():
        try:
            facts[name] = ask()
        except Exception as error:  # whatever a library raises on a system that its authors did not have
            facts[name], unknown[name] = None, _why(error)
    return {**facts, "unknown": unknown}


def part(gather: Callable[[], Facts]) -> Facts:
    """What `gather` returns, or {"unknown": {EVERYTHING: reason}} if it fails."""
    try:
        return gather()
    except Exception as error:
        return nothing(_why(error))


def nothing(reason: str) -> Facts:
    """A part that told nothing."""
    return {"unknown": {EVERYTHING: reason}}


def from_child(module: str, *arguments: str, seconds: float = CHILD_S) -> Facts:
    """What `python -m mlx_flash.machine.MODULE` prints: one JSON object, on its last line.

    MLX and the system's own libraries may end a process on a machine that they do not expect. So what calls them runs
    in a process of its own.
    """
    command = [sys.executable, "-m", f"{__package__}.{module}", *arguments]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=seconds, env=child_environment(), stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        return nothing(f"no answer within {seconds:.0f} seconds")
    except OSError as error:
        return nothing(f"no process can be started for it: {reason_of(error)}")
    try:
        facts = json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        return nothing(f"its process ended {_how(done.returncode)}{_last_line(done.stderr)}")
    return facts if isinstance(facts, dict) else nothing("its process answered something else")


def _why(error: Exception) -> str:
    """An error's first words, in one line, with its kind if that is not one of the system's or of this package."""
    text = reason_of(error)[:200]
    if isinstance(error, OSError):
        return text if error.filename is None else f"{text}: {os.fsdecode(error.filename)}"
    return text if isinstance(error, FlashError) or text == type(error).__name__ else f"{text} ({type(error).__name__})"


def _how(code: int) -> str:
    if code >= 0:
        return f"with code {code}"
    try:
        return f"by {signal.Signals(-code).name}"
    except ValueError:
        return f"by signal {-code}"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return f": {lines[-1].strip()[:200]}" if lines else ""
