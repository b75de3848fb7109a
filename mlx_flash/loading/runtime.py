"""What a loaded model streams with: `model.flash`."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ..flash.files import Manifest
from ..flash.stats import Counters
from ..flash.units import Units
from ..layers.lookahead import LookAhead
from ..layers.recall import PredictorSetting
from ..text.generation_config import GenerationConfig
from .plan import MLX_CACHE_BYTES, Plan


class StreamedLayer(Protocol):
    """A layer whose weights stay on the SSD. ahead: its look-ahead at the next layer, if it has one."""

    @property
    def units(self) -> Units: ...

    @property
    def ahead(self) -> LookAhead | None: ...


class AnyStreamer(Protocol):
    """What the streamers of neurons and of experts have in common."""

    counters: Counters

    def evaluate_guarded(self) -> None: ...

    def verify_unchanged(self) -> None: ...

    def close(self) -> None: ...


class _BufferCache:
    """How many freed buffers MLX keeps: few while a model of ours is loaded, what it was before once none is."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models = 0
        self._before = 0  # bytes

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Around the loading of a model. If that succeeds, `release` must follow when the model is closed."""
        with self._lock:
            before = mx.set_cache_limit(MLX_CACHE_BYTES)
            if not self._models:
                self._before = before
            self._models += 1
        try:
            yield
        except BaseException:
            self.release()
            raise

    def release(self) -> None:
        with self._lock:
            self._models -= 1
            if not self._models:
                mx.set_cache_limit(self._before)


BUFFER_CACHE = _BufferCache()


@dataclass
class Runtime:
    plan: Plan
    streamer: AnyStreamer
    layers: Sequence[StreamedLayer]
    predictor: str  # who says which units a token needs: the kind of predictor in use, or "router"
    vocabulary: int  # tokens that the model knows
    positions: int  # tokens that it can look back on, whatever is planned
    manifest: Manifest | None = None  # of the store; None where the checkpoint itself is read
    setting: PredictorSetting | None = None  # of a stored predictor: its recall, and what it was measured to do
    defaults: GenerationConfig = field(default_factory=GenerationConfig)  # how the model is sampled by its authors
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while the model computes a token or a chunk
    _closed: bool = False

    def evaluate_guarded(self) -> None:
        """Evaluates what still reads slots, because MLX cannot do so in another thread; a chunk of a prompt leaves the
        last layer's output undone."""
        self.streamer.evaluate_guarded()

    def fix_look_ahead(self, guessing: bool) -> None:
        """From now on every layer guesses what the next one needs, or none does: no trial decides.

        The text does not depend on it.
        """
        for layer in self.layers:
            if layer.ahead is not None:
                layer.ahead.trial.fix(guessing)

    def verify_unchanged(self) -> None:
        """Raises ReadError if someone has written into the files that units are read from."""
        self.streamer.verify_unchanged()

    def close(self) -> None:
        """Stops the reader's threads and closes the files. The model cannot be used afterwards.

        With the last model that is closed MLX keeps as many freed buffers again as before the first one was loaded.
        """
        self.streamer.close()
        if not self._closed:
            self._closed = True
            BUFFER_CACHE.release()


def evaluate_constants(model: Any) -> None:
    """Evaluates every array that a module has, parameter or not: the frequencies of a scaled rotation, for instance.

    What is not evaluated can only be evaluated by the thread that made it.
    """
    found: list[mx.array] = []

    def look(value: Any) -> None:
        if isinstance(value, mx.array):
            found.append(value)
        elif isinstance(value, nn.Module):  # it has its own turn
            return
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for each in value:
                look(each)

    for module in model.modules():
        look([dict(module), vars(module)])
    mx.eval(found)
