"""The resident matrices and vectors in their stored form: plain, or quantised in the same way as mlx.nn.quantize."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_flash.layers.quantised import companions, matrices_of

Entry = tuple[str, tuple[int, ...], mx.Dtype, Callable[[], mx.array | Iterable[mx.array]]]


class ResidentTensors:
    """The tensors of `model.safetensors`, plain or quantised.

    tensors: stored name -> (model's name, shape). bits: 16 for plain ones. load: yields the rows of a tensor in pieces,
    given the model's name of it.

    Norms and biases stay plain, and so do matrices whose rows do not divide into groups.
    """

    def __init__(
        self,
        model: Any,
        tensors: dict[str, tuple[str, tuple[int, ...]]],
        bits: int,
        group_size: int,
        dtype: mx.Dtype,
        load: Callable[[str], Iterable[mx.array]],
    ) -> None:
        self.tensors, self.bits, self.group_size, self.dtype, self.load = tensors, bits, group_size, dtype, load
        matrices = matrices_of(model) if bits < 16 else {}
        self.packed = {
            name for name, (source, shape) in tensors.items() if source in matrices and not shape[-1] % group_size
        }
        self._last: tuple[str, tuple[mx.array, ...]] | None = None

    def entries(self) -> list[Entry]:
        """The entries to write, in order. Each one is loaded only when it is written."""
        entries: list[Entry] = []
        for name, (source, shape) in sorted(self.tensors.items()):
            if name not in self.packed:
                entries.append((name, shape, self.dtype, partial(self.load, source)))
                continue
            groups = (*shape[:-1], shape[-1] // self.group_size)
            words = (*shape[:-1], shape[-1] * self.bits // 32)
            names = name, *companions(name)
            kinds = (words, mx.uint32), (groups, self.dtype), (groups, self.dtype)
            for i, (own, (dims, dtype)) in enumerate(zip(names, kinds, strict=True)):
                entries.append((own, dims, dtype, partial(self._quantised, source, i)))
        return entries

    def _quantised(self, source: str, part: int) -> mx.array:
        """The packed numbers (0), the scales (1) or the biases (2) of a matrix."""
        if self._last is None or self._last[0] != source:
            self._last = None
            pieces = []
            for rows in self.load(source):
                pieces.append(mx.quantize(rows, group_size=self.group_size, bits=self.bits))
                mx.eval(pieces[-1])
            self._last = source, tuple(mx.concatenate(list(each)) for each in zip(*pieces, strict=True))
        return self._last[1][part]
