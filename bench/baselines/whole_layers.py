"""The baseline for mixtures of experts: every call reads all experts of every layer from the disk."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.defaults import THREADS
from mlx_flash.flash.in_place import InPlaceFiles, TensorParts
from mlx_flash.flash.pool import AlignedPool
from mlx_flash.flash.reader import Reader, Ticket
from mlx_flash.loading.in_place_model import open_in_place, parent_of
from mlx_flash.loading.plan import MLX_CACHE_BYTES
from mlx_flash.loading.resident_weights import open_files, read_resident


class LayerConveyor:
    """Reads all experts of every layer in turn, again for every call, in long reads. One layer is always being read."""

    def __init__(self, streamer: InPlaceFiles, layers: list[dict[str, TensorParts]]) -> None:
        self.streamer, self.layers = streamer, layers
        sizes = {name: t.nbytes * len(t.offsets) for name, t in layers[0].items()}
        self.memory = [{name: AlignedPool(size) for name, size in sizes.items()} for _ in range(2)]
        self.pools = [{name: self._typed(pools[name], layers[0][name]) for name in pools} for pools in self.memory]
        mx.eval(self.pools)
        self.turn = 0
        self.tickets: list[Ticket] = []

    @staticmethod
    def _typed(pool: AlignedPool, tensor: TensorParts) -> mx.array:
        return pool.array.view(tensor.dtype).reshape(len(tensor.offsets), *tensor.shape)

    def start(self) -> None:
        pools = self.memory[self.turn % 2]
        for name, tensor in self.layers[self.turn % len(self.layers)].items():
            length = tensor.nbytes
            addresses = pools[name].address + np.arange(len(tensor.offsets), dtype=np.int64) * length
            for number in np.unique(tensor.file_of):
                here = tensor.file_of == number
                reader, file = self.streamer.reader, self.streamer.files[number]
                self.tickets.append(reader.submit(file, tensor.offsets[here], addresses[here], length))

    def take(self) -> dict[str, mx.array]:
        """Returns the next layer's tensors. Arrays made from the last ones must be evaluated: memory is reused."""
        if not self.tickets:
            self.start()
        began, counters = time.perf_counter(), self.streamer.counters
        for ticket in self.tickets:
            self.streamer.wait(ticket)
        counters.wait_s += time.perf_counter() - began
        self.tickets = []
        here = self.pools[self.turn % 2]
        self.turn += 1
        self.start()
        return here


class WholeLayer(nn.Module):
    """A switch layer that reads all of its experts from the disk for every call."""

    def __init__(self, inner: Any, conveyor: LayerConveyor) -> None:
        super().__init__()
        self._inner, self._conveyor = inner, conveyor

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        mx.eval(x, indices)  # also evaluates everything computed from the last layer's tensors
        for name, array in self._conveyor.take().items():
            projection, tensor = name.rsplit(".", 1)
            self._inner[projection][tensor] = array
        y: mx.array = self._inner(x, indices)
        mx.eval(y)
        return y


def load_whole_layers(folder: Path) -> tuple[Any, InPlaceFiles]:
    """Loads mlx-lm's model with all layers of experts on a conveyor. Closing the streamer waits for pending reads."""
    mx.set_cache_limit(MLX_CACHE_BYTES)  # as in flash loading
    mixture = open_in_place(folder)
    read_resident(mixture)
    streamer = InPlaceFiles(open_files(mixture.files, direct=True), Reader(THREADS))
    conveyor = LayerConveyor(streamer, list(mixture.switches.values()))
    for path in mixture.switches:
        parent, name = parent_of(mixture.model, path)
        parent[name] = WholeLayer(parent[name], conveyor)
    return mixture.model, streamer
