"""python worker.py JOB SEED RUNS FOLDER: runs one job of campaign.py in a process that was started under the shim."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the helpers of the other tests

import converting  # type: ignore[import-not-found]  # found beside this file
import disturbing  # type: ignore[import-not-found]
import reading  # type: ignore[import-not-found]

JOBS: dict[str, Callable[[random.Random, int, Path], None]] = {
    "decode": reading.decode,
    "decode-silent": partial(reading.decode, silent=True),
    "load": reading.loading,
    "load-silent": partial(reading.loading, silent=True),
    "serve": reading.serve,
    "convert-checkpoint": converting.checkpoint_reads,
    "convert-partial": converting.partial_reads,
    "convert-write": converting.writes,
    "convert-sync": converting.syncs,
    "kill": converting.kill,
    "interrupt": disturbing.interrupt,
    "change": disturbing.change,
}

if __name__ == "__main__":
    job, seed, runs, folder = sys.argv[1:]
    JOBS[job](random.Random(f"{job} {seed}"), int(runs), Path(folder))
