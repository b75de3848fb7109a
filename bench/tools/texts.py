"""Texts for measurements."""

from __future__ import annotations

from pathlib import Path

from mlx_flash.errors import UsageError


def read_text(path: Path) -> str:
    """Reads a text. Raises UsageError if it cannot be read or has fewer than two words."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --text {path}: {error}") from None
    if len(text.split()) < 2:
        raise UsageError(f"--text {path} has fewer than two words. Choose a longer text.")
    return text
