"""Describes errors that this package does not raise itself, such as MLX's, in a sentence with a remedy."""

from __future__ import annotations

import platform
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import UsageError
from .cached import REPORT, cache_folder
from .model_kind import error_line

OUT_OF_MEMORY = ("insufficient memory", "outofmemory", "bad_alloc", "[malloc", "unable to allocate", "[metal::malloc]")
PACKAGES = ("mlx-flash-runtime", "mlx", "mlx-lm", "numpy", "transformers")


def foreseen(error: Exception) -> str | None:
    """The sentence for an error that a correct program can meet, such as too little memory; None for other errors."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(mark in text for mark in OUT_OF_MEMORY):
        return f"there is not enough memory: {error_line(error)}. Lower --memory or --context, or close other programs."
    if text.startswith("[metal]"):
        return f"the GPU reports an error: {error_line(error)}. Try again; if that fails too, restart the computer."
    return None


def sentence(error: Exception) -> str:
    """The sentence to show to a user. For an unexpected error it names a file to which the traceback is written."""
    if (known := foreseen(error)) is not None:
        return known
    report = _write_report(error)
    where = f"Its traceback is in {report}" if report is not None else "Its traceback is above"
    return f"unexpected error: {error_line(error)}. {where}. Please report it and what you did."


def _write_report(error: Exception) -> Path | None:
    """Writes the traceback to a file and returns its path; prints it and returns None if that fails.

    The report holds neither arguments nor any text of the user's.
    """
    lines = [f"{name} {_version(name)}" for name in PACKAGES] + [f"Python {platform.python_version()}"]
    lines += [platform.platform(), "", *traceback.format_exception(error)]
    try:
        path = cache_folder() / REPORT
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines), encoding="utf-8", errors="replace")
    except (OSError, UsageError):
        traceback.print_exception(error)
        return None
    return path


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "is not installed"
