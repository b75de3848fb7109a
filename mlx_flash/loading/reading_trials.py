"""The options of reading that are tried while a loaded model generates tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import mlx.core as mx

from ..defaults import IO_MODES, THREADS
from ..flash.inflight import SHORTEST_REQUEST, InFlightReads
from ..flash.reader import Reader
from ..flash.trials import Choice, Trial, Trials
from ..source.kept_trials import KeptTrials
from .options import LoadOptions

THREAD_CHOICES = (8, 16, 32)
PIECES = (SHORTEST_REQUEST, 32 << 10, 512 << 10)  # bytes, the default first
FILLS_PAGE_CACHE = 48  # tokens
GUESSES_WRONGLY = 8  # tokens after which a layer knows whether its guesses are mostly wrong


class Looks(Protocol):
    @property
    def ahead(self) -> Any: ...


def reader_for(options: LoadOptions) -> Reader:
    """The reader of a model. If threads are tried, it has as many as are tried; they share the default's memory."""
    if options.threads is not None or not options.trials:
        return Reader(options.threads or THREADS)
    return Reader(THREADS, max(THREAD_CHOICES))


def reading_trials(
    streamer: InFlightReads, layers: Sequence[Looks], options: LoadOptions, folder: Path, share: float, kind: str
) -> Trials:
    """The trials of a model whose units were just made ready.

    streamer: of its layers, with the default choices in effect. folder: the model's. share: of its weights, that are in
    memory. kind: of its units: "experts", "neurons" or "layers".
    """
    trials = []
    if any(layer.ahead is not None for layer in layers):
        guesses = (streamer.look_ahead, not streamer.look_ahead)
        trials.append(Trial("lookahead", guesses, _sets(streamer, "look_ahead"), GUESSES_WRONGLY))
    if kind == "experts":
        trials.append(Trial("overlap", (True, False), _sets(streamer, "overlap")))
    direct = streamer.files[0].direct
    ways = IO_MODES if options.io is None and direct else (IO_MODES[0 if direct else 1],)
    trials.append(Trial("io", ways, lambda way: streamer.read_past_cache(way == "direct"), FILLS_PAGE_CACHE))
    trials[-1].fixed = options.io is not None
    threads = [streamer.reader.threads]
    if options.threads is None:
        threads += [each for each in THREAD_CHOICES if each != threads[0] and each <= streamer.reader.most]
    trials.append(Trial("threads", threads, lambda count: streamer.reader.use_threads(int(count))))
    trials[-1].fixed = options.threads is not None
    if kind == "experts":
        trials.append(Trial("pieces", PIECES, _sets(streamer, "shortest_request")))
    if not options.trials:
        for trial in trials:
            trial.fixed = True
        return Trials(trials)
    kept = KeptTrials(folder, [file.path for file in streamer.files], share, str(mx.default_device()))
    return Trials(trials, kept.read(), kept.write)


def _sets(streamer: InFlightReads, name: str) -> Any:
    def use(choice: Choice) -> None:
        setattr(streamer, name, choice)

    return use
