"""The model that a conversion runs its calibration text through, filled with the store's weights layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_flash.flash.host_arrays import to_numpy
from mlx_flash.flash.stored_tensors import StoredTensors
from mlx_flash.layers.quantised import companions, matrices_of

from . import calibrate
from .neuron_file import quantised
from .numpy_matrix import FileEmbedding, NumpyMatrix, PackedFileEmbedding, PackedNumpyMatrix
from .store_plan import StorePlan

HEAD = "lm_head."  # the output matrix of an untied model, a large one


class FilledModel:
    """Vectors, and matrices before the layers, are read when this is made.

    The rows of embeddings are read when they are asked for, after all of them were compared with their checksums
    once; a layer's matrices at its turn, the output matrix when the layers are gone.
    """

    def __init__(self, outline: StorePlan, path: Path, open_file: Callable[[Path], StoredTensors]) -> None:
        """path: of the store's resident weights, and what opens it, with the checksums of what was written."""
        self.outline = outline
        self._open = partial(open_file, path)
        stored = self._open()
        group_size, bits = outline.resident.group_size, outline.resident.bits
        # The model's names of what it does not have yet -> the store's; which of these are matrices; and what the names
        # of a layer's weights begin with, by the id of the layer.
        self._stored_as = {name: stored for stored, (name, _) in outline.resident.tensors.items()}
        for parent_name, parent in list(self.outline.model.named_modules()):
            for key, child in list(parent.items()):
                if isinstance(child, nn.Embedding):
                    weight = self._stored_as.pop(".".join(filter(None, (parent_name, key, "weight"))))
                    names = [weight, *companions(weight)] if weight in outline.resident.packed else [weight]
                    stored.compare(names)
                    dtypes = [stored.arrays[name].dtype for name in names]
                    parts = [
                        FileEmbedding(path, name, stored.entries[name], dtype)
                        for name, dtype in zip(names, dtypes, strict=True)
                    ]
                    parent[key] = parts[0] if len(parts) == 1 else PackedFileEmbedding(parts, group_size, bits)
        packed = {name for name, stored in self._stored_as.items() if stored in outline.resident.packed}
        if packed:
            nn.quantize(
                self.outline.model, group_size, bits, class_predicate=lambda name, _: f"{name}.weight" in packed
            )
        self._matrices = packed | (matrices_of(self.outline.model).keys() & self._stored_as.keys())
        layers = {id(layer) for layer in self.outline.model.layers}
        self._prefixes = {id(m): f"{name}." for name, m in self.outline.model.named_modules() if id(m) in layers}
        later = (*self._prefixes.values(), HEAD)
        self._fill(name for name in self._stored_as if name not in self._matrices or not name.startswith(later))

    def fill_rest(self) -> None:
        """What comes after the layers."""
        self._fill(self._stored_as)

    def _fill(self, names: Iterable[str]) -> None:
        """Gives the model weights, read and compared with their checksums. names: the model's."""
        stored = self._open()
        named = []
        for name in list(names):
            source = self._stored_as.pop(name)
            weight = stored.take(source)
            is_packed = source in self.outline.resident.packed
            if is_packed:
                named += [
                    (own, stored.take(other)) for own, other in zip(*map(companions, (name, source)), strict=True)
                ]
            elif name not in self._matrices:  # a matrix is widened where it is used
                weight = weight.astype(mx.float32)
            named.append((name, weight))
        self.outline.model.load_weights(named, strict=False)

    def host_ffn(self, layer: int) -> calibrate.NumpyFFN:
        """That of the layer whose turn it is; the layer gets its other weights here. Nothing else refers to them."""
        prefix = self._prefixes[id(self.outline.model.layers[layer])]
        self._fill(name for name in self._stored_as if name.startswith(prefix))
        *matrices, down = (self._host_matrix(rows) for rows in self.outline.layer_rows(layer))
        up_bias, down_bias = (
            to_numpy(self.outline.load(name), np.float32)
            if name in self.outline.original
            else np.zeros(size, np.float32)
            for name, size in zip(self.outline.family.biases_of(layer), down.shape, strict=True)
        )
        return calibrate.NumpyFFN(self.outline.activation, tuple(matrices), up_bias, down, down_bias)

    def _host_matrix(self, rows: mx.array) -> NumpyMatrix:
        """With the numbers that a reader of the store multiplies with."""
        if not self.outline.layout.quantised:
            return NumpyMatrix(rows)
        return PackedNumpyMatrix(
            *quantised(self.outline.layout, rows), self.outline.layout.group_size, self.outline.layout.bits
        )
