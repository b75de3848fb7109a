"""What a loaded model streams with: `model.flash`."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from .flash.files import Manifest
from .layers.recall import Setting
from .plan import Plan
from .stats import Counters


class AnyStreamer(Protocol):
    """What the streamers of neurons and of experts have in common."""

    counters: Counters

    def verify_unchanged(self) -> None: ...

    def close(self) -> None: ...


class StreamedLayer(Protocol):
    def settle(self) -> None: ...


@dataclass
class Runtime:
    plan: Plan
    streamer: AnyStreamer
    layers: Sequence[StreamedLayer]
    predictor: str  # who says which units a token needs: the kind of predictor in use, or "router"
    vocabulary: int  # tokens that the model knows
    positions: int  # tokens that it can look back on, whatever is planned
    manifest: Manifest | None = None  # of the store; None where the checkpoint itself is read
    setting: Setting | None = None  # of a stored predictor: its recall, and what it was measured to do
    lock: threading.Lock = field(default_factory=threading.Lock)  # held while the model computes a token or a chunk

    def settle(self) -> None:
        """Evaluates what still reads slots; a chunk of a prompt leaves the last layer's output undone."""
        for layer in self.layers:
            layer.settle()

    def verify_unchanged(self) -> None:
        """Raises ReadError if someone has written into the files that units are read from."""
        self.streamer.verify_unchanged()

    def close(self) -> None:
        """Stops the reader's threads and closes the files. The model cannot be used afterwards."""
        self.streamer.close()
