"""The streaming side of a loaded model: `model.flash`."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import mlx.core as mx
import mlx.nn as nn

from ..defaults import PREFILL_TOKENS
from ..flash.files import Manifest
from ..flash.layer_ring import LayerMap
from ..flash.stats import Clock, Counters
from ..flash.swap import SwapCounters
from ..flash.trials import Trials
from ..flash.wiring import Wiring
from ..layers.lookahead import LookAhead
from ..layers.recall import PredictorSetting
from ..layers.shared_reading import SharedReading
from ..source.kept_swaps import remember_swapping
from ..text.draft_depth import MOST_DEPTH
from ..text.generation_config import GenerationConfig
from ..text.image_prompts import ImageProcessor
from .plan import MLX_CACHE_BYTES, Plan
from .ranked_loading import Ranks
from .slot_keeper import SlotKeeper
from .streaming_needs import PROCESS
from .warm_start import WarmStart

if TYPE_CHECKING:
    from ..text.drafts import Drafting


class HasCache(Protocol):
    """Units behind a cache, whose public attributes observers read."""

    @property
    def cache(self) -> Any: ...


class StreamedLayer(Protocol):
    """A layer whose weights stay on the SSD. ahead: its look-ahead at the next layer, if it has one."""

    @property
    def units(self) -> HasCache: ...

    @property
    def ahead(self) -> LookAhead | None: ...


@dataclass
class WholeLayers:
    """The layers of a dense model, as one row of units. cache: which of them are in memory."""

    cache: LayerMap
    ahead: None = None  # the next layer is certain

    @property
    def units(self) -> WholeLayers:
        return self


class AnyStreamer(Protocol):
    """The common interface of the streamers of neurons and of experts."""

    counters: Counters
    clock: Clock
    before_layer: Callable[[mx.array], None]

    def evaluate_guarded(self) -> None: ...

    def verify_unchanged(self) -> None: ...

    def is_lost(self) -> bool: ...

    def close(self) -> None: ...


class _BufferCache:
    """Limits the freed buffers that MLX keeps while a model is loaded, and restores the limit after the last model."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._models = 0
        self._before = 0  # bytes

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Wraps the loading of a model. If that succeeds, `release` must be called when the model is closed."""
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
    predictor: str  # the kind of predictor that selects a token's units, or "router", or "every layer"
    vocabulary: int  # number of tokens that the model knows
    positions: int  # most tokens that the model can attend to, whatever the plan
    manifest: Manifest | None = None  # the store's; None if the checkpoint itself is read
    setting: PredictorSetting | None = None  # a stored predictor's recall and measured quality
    prefill_tokens: int = PREFILL_TOKENS  # of a chunk of a prompt, for which the plan has room
    shared_reading: SharedReading | None = None  # for prompts, where layers are streamed and chunks can share a reading
    defaults: GenerationConfig = field(default_factory=GenerationConfig)  # the sampling that the model's authors chose
    images: ImageProcessor | None = None  # the checkpoint's, if the model was loaded to read images
    most_positions: int = MOST_DEPTH + 1  # most tokens of a call that takes a decoded token's path
    trials: Trials = field(default_factory=Trials)  # of options that do not change the text
    drafting: Drafting | None = None  # how drafts are made; None for none
    folder: Path | None = None  # of the store or the checkpoint
    warm_start: WarmStart | None = None  # keeps the uses of units for the next start
    wiring: Wiring | None = None  # of the weights and slots; None: not measured
    adapter: Path | None = None  # the folder of the adapter that was put into the model
    ranks: Ranks | None = None  # that hold parts of the model besides this process; None for none
    one_conversation: bool = False  # whether other ranks hold the KV cache of the last conversation, and of no other
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while the model computes a token or a chunk
    _closed: bool = False

    def __post_init__(self) -> None:
        self.keeper = SlotKeeper(self.plan, self.layers, self.streamer)
        self.streamer.before_layer = self.keeper.check

    def evaluate_guarded(self) -> None:
        """Evaluates the outputs that still read slots, because MLX cannot do so in another thread. After a chunk of a
        prompt, the last layer's output is not evaluated yet."""
        self.streamer.evaluate_guarded()

    def fix_look_ahead(self, guessing: bool) -> None:
        """Makes every layer guess the next layer's units, or none, and ends the trials that decide about it.

        The text does not depend on it. It is the same as `trials.fix("lookahead", guessing)`.
        """
        self.trials.fix("lookahead", guessing)

    def answered(self, swap: SwapCounters | None = None) -> None:
        """Called at the end of an answer. swap: what the system swapped meanwhile, if it is known."""
        if swap is not None and self.wiring is not None and self.folder is not None and self.wiring.suffers(swap):
            remember_swapping(self.folder)  # The next load of this model wires its memory, if it may.
        if self.warm_start is not None:
            self.warm_start.answered()

    def verify_unchanged(self) -> None:
        """Raises ReadError if a file that units are read from was changed. Other ranks do so by themselves."""
        self.streamer.verify_unchanged()

    def is_lost(self) -> bool:
        """Whether a file that units are read from went away, so that only loading the model again may help."""
        return self.streamer.is_lost()

    def close(self) -> None:
        """Stops the reader's threads, closes the files and keeps the results of trials. The model cannot be used
        afterwards.

        When the last model is closed, MLX again keeps as many freed buffers as before the first one was loaded.
        """
        if self.warm_start is not None:
            self.warm_start.close()
        self.trials.close()
        self.streamer.close()
        if not self._closed:
            self._closed = True
            if self.ranks is not None:
                self.ranks.close()
            if self.wiring is not None:
                self.wiring.close()
            BUFFER_CACHE.release()
            PROCESS.model_closed()


def evaluate_constants(model: Any) -> None:
    """Evaluates every array that a module has, even if it is not a parameter (the frequencies of a scaled rotation).

    An array that is not evaluated can only be evaluated by the thread that made it.
    """
    found: list[mx.array] = []

    def look(value: Any) -> None:
        if isinstance(value, mx.array):
            found.append(value)
        elif isinstance(value, nn.Module):  # the loop below visits it
            return
        elif isinstance(value, dict):
            look(list(value.values()))
        elif isinstance(value, (list, tuple)):
            for each in value:
                look(each)

    for module in model.modules():
        look([dict(module), vars(module)])
    mx.eval(found)
