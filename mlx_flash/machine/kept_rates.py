"""What was measured about disks within the last day, kept in the cache folder."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import UsageError
from ..source.cached import DISK_RATES, cache_folder
from ..source.ssd_writes import read_small, write_small

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


def keep_rates(rates: Mapping[str, Rate]) -> None:
    with contextlib.suppress(OSError, UsageError):  # no folder to write to: the next forecast measures again
        all_kept = {**_kept(), **{name: (rate, time.time()) for name, rate in rates.items()}}
        text = json.dumps({each: [*kept, measured] for each, (kept, measured) in all_kept.items()})
        write_small(cache_folder() / DISK_RATES, text)


def _kept() -> dict[str, tuple[Rate, float]]:
    """The rates, and when they were measured: seconds since the epoch."""
    found = {}
    for name, figures in _entries().items():
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            bytes_per_second, exposed, measured = map(float, figures)
            if 1 <= bytes_per_second < math.inf and 0 <= exposed <= 1 and 0 <= time.time() - measured < LIFE_S:
                found[name] = Rate(bytes_per_second, exposed), measured
    return found


def _entries() -> dict[str, Any]:
    with contextlib.suppress(UsageError):
        return read_small(cache_folder() / DISK_RATES)
    return {}
