"""Which models ran while the system swapped their memory, kept in the cache folder for a month."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

from ..errors import UsageError
from .cached import SWAPS, cache_folder
from .ssd_writes import read_small, write_small

LIFE_S = 30 * 24 * 3600
MOST_MODELS = 64


def swapped_lately(folder: Path) -> bool:
    """Whether the system swapped while the model in `folder` ran, within the last month."""
    return str(folder.resolve()) in _kept()


def remember_swapping(folder: Path) -> None:
    """Notes that the system swapped while the model in `folder` ran. Does nothing if nothing can be written."""
    with contextlib.suppress(OSError, UsageError, UnicodeError):
        path = cache_folder() / SWAPS
        kept = {**_kept(), str(folder.resolve()): time.time()}
        newest = sorted(kept.items(), key=lambda item: item[1])[-MOST_MODELS:]
        write_small(path, json.dumps(dict(newest)))


def _kept() -> dict[str, float]:
    """The models, and when it was noted: seconds since the epoch."""
    with contextlib.suppress(UsageError, ValueError, TypeError, OverflowError):
        found = {name: float(noted) for name, noted in read_small(cache_folder() / SWAPS).items()}
        return {name: noted for name, noted in found.items() if 0 <= time.time() - noted < LIFE_S}
    return {}
