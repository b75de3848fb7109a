"""How fast a disk gives random pieces, by size and by how many are read at once: as it was measured within a day."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..flash.undisturbed import Undisturbed
from ..source.cached import cache_folder
from .disk_probe import AT_ONCE, SIZES, probe
from .kept_rates import Rate, keep_rates, kept_rates

DiskTable = Mapping[tuple[int, int], float]
"""(bytes of a piece, pieces at once) -> bytes per second."""


def disk_table(folder: Path, say: Callable[[str], None] = lambda _: None) -> DiskTable:
    """The rates of the disk that a folder is on, or will be. They are measured if they were not within the last day,
    which takes about five seconds and writes a file for that time. say: called before that.

    Raises FlashError or OSError.
    """
    here = next(each for each in (folder, *folder.parents) if each.exists())
    device = os.stat(here).st_dev
    names = {
        (size, at_once): f"{size} bytes, {at_once} at once, of disk {device}" for at_once in AT_ONCE for size in SIZES
    }
    kept = kept_rates()
    if all(name in kept for name in names.values()):
        return {key: kept[name].bytes_per_second for key, name in names.items()}
    say(f"measuring how fast the disk of {here} reads, with a file that is removed again")
    cache = cache_folder()
    same = cache.exists() and os.stat(cache).st_dev == device
    with Undisturbed() as time:
        measured = probe(None, cache if same else here)["rates"]
    table = {(rate["piece_bytes"], rate["at_once"]): float(rate["bytes_per_second"]) for rate in measured}
    if time.held:
        keep_rates({names[key]: Rate(rate, 1.0) for key, rate in table.items()})
    return table


def rate_in(table: DiskTable, piece_bytes: float, at_once: float) -> float:
    """Bytes per second for pieces of any size, between those of the table on logarithmic scales; at either end of the
    table its last rate."""
    sizes, depths = (sorted({key[axis] for key in table}) for axis in (0, 1))
    by_depth = [
        np.interp(np.log(piece_bytes), np.log(sizes), np.log([table[size, depth] for size in sizes]))
        for depth in depths
    ]
    return float(np.exp(np.interp(np.log(at_once), np.log(depths), by_depth)))
