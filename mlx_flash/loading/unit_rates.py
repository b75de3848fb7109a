"""How fast a model's units will be read: as its own files are read, or as the disk that it will be on reads."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..defaults import THREADS
from ..flash.disk_rate import ReadTrial
from ..flash.reader import Reader
from ..flash.requests import MERGE_BYTES
from ..flash.undisturbed import Undisturbed
from ..machine.disk_table import DiskTable, rate_in
from ..machine.kept_rates import Rate, keep_rates, kept_rates
from .options import LoadOptions
from .resident_weights import open_files


class UnitRates(Protocol):
    """What tells how fast units are read."""

    def rate(
        self,
        kind: str,
        batches: Sequence[np.ndarray],
        in_flight: int,
        compute: Callable[[], object] | None = None,
    ) -> Rate:
        """kind: of the units. batches, in_flight: see `ReadTrial`. compute: what runs beside the reads; None for
        nothing. Raises ReadError."""
        ...

    def close(self) -> None: ...


class RatesOfFiles:
    """Measures how fast units are read from their files, or remembers what was measured within the last day."""

    def __init__(self, files: Sequence[Path], options: LoadOptions) -> None:
        self._files = open_files(files, options.io != "buffered")
        self._reader = Reader(options.threads or THREADS)
        state, way = os.stat(files[0]), "direct" if self._files[0].direct else "buffered"
        self._name = f"{state.st_dev}-{state.st_ino}-{state.st_size}, {way}, {self._reader.threads} threads"

    def rate(
        self,
        kind: str,
        batches: Sequence[np.ndarray],
        in_flight: int,
        compute: Callable[[], object] | None = None,
    ) -> Rate:
        name = f"{kind} of {self._name}"
        if (rate := kept_rates().get(name)) is None:
            trial = ReadTrial(self._files, self._reader, batches)
            with Undisturbed() as time:
                measured = trial.rate(in_flight)
                rate = Rate(measured, 1.0 if compute is None else trial.exposed_share(measured, compute))
            if time.held:
                keep_rates({name: rate})
        return rate

    def close(self) -> None:
        self._reader.close()
        for file in self._files:
            file.close()


class RatesOfDisk:
    """Works out from the rates of a disk how fast the units of a checkpoint would be read that is not on it yet.

    Nothing is tried beside the reads, so computing counts as waiting for them.
    """

    def __init__(self, table: DiskTable, options: LoadOptions) -> None:
        self._table, self._threads = table, options.threads or THREADS

    def rate(
        self,
        kind: str,
        batches: Sequence[np.ndarray],
        in_flight: int,
        compute: Callable[[], object] | None = None,
    ) -> Rate:
        seconds, nbytes = 0.0, 0
        for batch in batches:
            lengths = batch[:, 2][batch[:, 2] > 0]
            requests = int((-(-lengths // MERGE_BYTES)).sum()) * in_flight
            at_once = max(1, min(self._threads, requests))
            for length, count in zip(*np.unique(lengths, return_counts=True), strict=True):
                seconds += count * length / rate_in(self._table, float(length), at_once)
            nbytes += int(lengths.sum())
        return Rate(nbytes / seconds, 1.0)

    def close(self) -> None:
        pass
