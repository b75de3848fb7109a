"""What was measured about disks within the last day, kept in the cache folder."""

from __future__ import annotations

import contextlib
import json
import os
import time
from typing import NamedTuple

from ..errors import UsageError
from ..source.cached import DISK_RATES
from ..source.resolve import cache_folder

LIFE_S = 24 * 3600  # a measurement is used for so long


class Rate(NamedTuple):
    """How fast units are read.

    exposed: see `ReadTrial.exposed_share`.
    """

    bytes_per_second: float
    exposed: float


def kept_rates() -> dict[str, Rate]:
    """The rates that were measured within the last day, by name."""
    return {name: rate for name, (rate, _) in _kept().items()}


def keep_rate(name: str, rate: Rate) -> None:
    with contextlib.suppress(OSError, UsageError):  # no folder to write to: the next forecast measures again
        path = cache_folder() / DISK_RATES
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        path.parent.mkdir(parents=True, exist_ok=True)
        all_kept = {**_kept(), name: (rate, time.time())}
        partial.write_text(json.dumps({each: [*kept, measured] for each, (kept, measured) in all_kept.items()}))
        partial.replace(path)


def _kept() -> dict[str, tuple[Rate, float]]:
    """The rates, and when they were measured: seconds since the epoch."""
    found = {}
    with contextlib.suppress(OSError, UsageError, ValueError, TypeError, AttributeError, RecursionError):
        for name, figures in json.loads((cache_folder() / DISK_RATES).read_text()).items():
            bytes_per_second, exposed, measured = map(float, figures)
            if bytes_per_second > 0 and 0 <= exposed <= 1 and 0 <= time.time() - measured < LIFE_S:
                found[name] = Rate(bytes_per_second, exposed), measured
    return found
