"""The matrices and vectors that stay in memory, as they are written: plain, or quantised as mlx.nn.quantize does it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import mlx.core as mx

from mlx_flash.layers.quantised import companions, matrices_of

Entry = tuple[str, tuple[int, ...], mx.Dtype, Callable[[], mx.array | Iterable[mx.array]]]


class ResidentTensors:
    """tensors: stored name -> (model's name, shape). bits: 16 for plain ones. load: the pieces that the rows of a
    tensor of the model are cut into, by its name.

    Matrices whose rows do not divide into groups stay plain, as do norms and biases.
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
        """What to write, in order, each loaded when its turn comes."""
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
