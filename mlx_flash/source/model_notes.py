"""Where the cache folder keeps something about a model, and whether the model's files are still the same."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from .cached import cache_folder


def note_path(kind: str, model: Path, suffix: str) -> Path:
    """The file about the model in a folder. kind: the folder in the cache folder. Raises UsageError."""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.name).strip("-._")[:60] or "model"
    return cache_folder() / kind / f"{name}-{hashlib.sha256(os.fsencode(model)).hexdigest()[:12]}{suffix}"


def state_of(files: Iterable[Path]) -> str:
    """A digest of the files' names, sizes and times. Raises OSError."""
    states = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(files)]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()
