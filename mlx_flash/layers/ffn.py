"""The whole feed-forward network of a sparse model, which a streamed one replaces."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from .activations import Activation


class FFN(nn.Module):
    """`down(f(up(x)))` or `down(f(gate(x), up(x)))`. x: (..., D) -> (..., D).

    names: the checkpoint's names of the matrices, (up, down) or (gate, up, down).
    """

    def __init__(
        self, names: tuple[str, ...], width: int, neurons: int, activation: Activation, bias: bool = False
    ) -> None:
        super().__init__()
        self._names = names
        self._activation = activation
        for name in names[:-1]:
            self[name] = nn.Linear(width, neurons, bias=bias)
        self[names[-1]] = nn.Linear(neurons, width, bias=bias)

    def __call__(self, x: mx.array) -> mx.array:
        *first, down = (self[name] for name in self._names)
        return down(self._activation(*(matrix(x) for matrix in first)))
