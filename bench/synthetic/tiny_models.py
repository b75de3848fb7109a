"""Models of many layers that compute next to nothing, so that a token's time is the host's share of it.

Each has a twin with everything in memory: of a mixture of experts, the model that mlx-lm loads; of neurons, the same
model with whole FFNs, as mlx-lm builds them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.defaults import THREADS
from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.flash.neurons import NeuronSlots
from mlx_flash.flash.reader import Reader
from mlx_flash.loading.in_place_model import open_in_place
from mlx_flash.loading.load import load
from mlx_flash.loading.resident_weights import open_files

from .mixture_checkpoint import Shape, write_mixture
from .neuron_store import write_store

LAYERS = 48  # as many as Qwen3-30B-A3B has
MIXTURE = Shape("qwen3_moe", LAYERS, 64, 64, 128, 8, 2, 1, 32, {"group_size": 64, "bits": 4}, True)
NEURONS = (256, LAYERS, 2)  # hidden size, layers, heads
BUDGET = "4GB"  # more than enough


@dataclass
class Twins:
    """A streamed model and its twin with everything in memory. layers: the streamed ones, each with `units`."""

    model: Any
    twin: Any
    layers: Sequence[Any]
    close: Callable[[], None]

    @property
    def shared(self) -> Any:
        return self.layers[0].units.shared


def tiny_mixture(folder: Path, layers: int, slots: int | None) -> Twins:
    """Opens the mixture in `folder`, which is written first if it is not there. slots: of each layer; None for all.

    No layer guesses what the next one needs.
    """
    from mlx_lm.utils import load_model

    if not folder.exists():
        write_mixture(folder, MIXTURE, layers, mx.float32, seed=0)
    mixture = open_in_place(folder)
    shared = InPlaceFiles(open_files(mixture.files, direct=False), Reader(THREADS))
    mixture.stream_experts(shared, [slots or MIXTURE.experts] * layers, None)
    mx.eval(mixture.model.parameters())
    streamed = mixture.streamed_experts()
    for layer in streamed:
        layer.ahead = None
    if slots is None:
        for layer in streamed:
            list(layer.units.use(np.arange(layer.units.count)))
    return Twins(mixture.model, load_model(folder)[0], streamed, shared.close)


def tiny_neurons(folder: Path, layers: int, slots: float | None) -> Twins:
    """Opens the store in `folder`, which is written first if it is not there. slots: share of each layer's blocks that
    have one; None for all. No layer guesses what the next one needs."""
    from mlx_flash.models.opt import MLP

    if not folder.exists():
        hidden, _, heads = NEURONS
        write_store(folder, (hidden, layers, heads), vocabulary=4096)
    model, _ = load(folder, memory=BUDGET, io="buffered")
    twin, _ = load(folder, memory=BUDGET, io="buffered")
    for layer, streamed in zip(twin.model.decoder.layers, twin.flash.layers, strict=True):
        parts = [rows for _, _, rows in streamed.units.whole_bundles()]
        up, down = (mx.concatenate(list(rows)) for rows in zip(*parts, strict=True))
        layer.mlp = MLP(twin.args)
        layer.mlp.fc1.weight, layer.mlp.fc2.weight = up, mx.contiguous(down.T)
        layer.mlp.fc1.bias, layer.mlp.fc2.bias = streamed.up_bias, streamed.down_bias
        mx.eval(layer.mlp.parameters())
    twin.flash.close()
    model.flash.fix_look_ahead(False)
    for streamed in model.flash.layers:
        units = streamed.units
        streamed.ahead = None
        if slots is not None:
            streamed.units = NeuronSlots(units.shared, units.layer, round(slots * units.count), units.parts, None)
    return Twins(model, twin, model.flash.layers, model.flash.close)
