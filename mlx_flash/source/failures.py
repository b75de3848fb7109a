"""Errors that this package does not raise itself, MLX's among them, in a sentence with a remedy."""

from __future__ import annotations

import platform
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..errors import UsageError
from .cached import REPORT
from .model_kind import error_line
from .resolve import cache_folder

OUT_OF_MEMORY = ("insufficient memory", "outofmemory", "bad_alloc", "[malloc", "unable to allocate", "[metal::malloc]")
PACKAGES = ("mlx-flash-runtime", "mlx", "mlx-lm", "numpy", "transformers")


def foreseen(error: Exception) -> str | None:
    """The sentence for what may happen on a sound machine with a sound program; None for anything else."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or any(mark in text for mark in OUT_OF_MEMORY):
        return f"there is not enough memory: {error_line(error)}. Lower --memory or --context, or close other programs."
    if text.startswith("[metal]"):
        return f"the GPU reports an error: {error_line(error)}. Try again; if it stays, restart the computer."
    return None


def sentence(error: Exception) -> str:
    """What to tell a user. The traceback of what nobody foresaw is written to a file, which the sentence names."""
    if (known := foreseen(error)) is not None:
        return known
    report = _write_report(error)
    where = f"Its traceback is in {report}" if report is not None else "Its traceback is above"
    return f"an error that should not happen: {error_line(error)}. {where}: please report it, with what you did."


def _write_report(error: Exception) -> Path | None:
    """Where the traceback was written; None if that failed and it was printed. No arguments, no text of a user's."""
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
