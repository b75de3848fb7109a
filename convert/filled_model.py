"""The model that runs the calibration text, filled with the store's weights layer by layer."""

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

HEAD = "lm_head."  # the output matrix of an untied model, which is large


class FilledModel:
    """A model that reads its weights from the partial store when they are needed.

    Vectors, and matrices before the layers, are read at the beginning. Embeddings are compared with their checksums
    once; later, single rows are read on request. The matrices of a layer are read when the layer runs, and the output
    matrix after all layers are freed.
    """

    def __init__(self, outline: StorePlan, path: Path, open_file: Callable[[Path], StoredTensors]) -> None:
        """path: the store's resident weights. open_file: opens it with the checksums of the bytes written."""
        self.outline = outline
        self._open = partial(open_file, path)
        stored = self._open()
        group_size, bits = outline.resident.group_size, outline.resident.bits
        # _stored_as: the model's name -> the store's name, for weights that are not read yet. _matrices: the names that
        # are matrices. _prefixes: id of a layer -> prefix of its weights' names.
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
        """Reads the weights after the layers."""
        self._fill(self._stored_as)

    def _fill(self, names: Iterable[str]) -> None:
        """Reads weights, compares them with their checksums and gives them to the model. names: the model's names."""
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
            elif name not in self._matrices:  # Matrices are converted to float32 where they are used.
                weight = weight.astype(mx.float32)
            named.append((name, weight))
        self.outline.model.load_weights(named, strict=False)

    def host_ffn(self, layer: int) -> calibrate.NumpyFFN:
        """The FFN of the current layer; nothing else refers to its weights. Also reads the layer's other weights."""
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
        """The matrix with the values that a reader of the store uses (quantised, if the store is)."""
        if not self.outline.layout.quantised:
            return NumpyMatrix(rows)
        return PackedNumpyMatrix(
            *quantised(self.outline.layout, rows), self.outline.layout.group_size, self.outline.layout.bits
        )
