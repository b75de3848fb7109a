"""Who says which neurons a token needs. Each is called with x: (N, D) and answers (mask, activations).

mask: bool (N, F). activations: (N, F) before the ReLU where they are known anyway, else None.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

KINDS = ("lowrank", "shadow")  # those that a store holds; `exact` and `none` need nothing stored


class Predictor(Protocol):
    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]: ...


class ExactPredictor:
    """The up projection itself, resident. up: (F, D); bias: (F,) or None."""

    def __init__(self, up: mx.array, bias: mx.array | None) -> None:
        self.up = up
        self.bias = bias

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        activations = x @ self.up.T  # (N, D) @ (D, F)
        if self.bias is not None:
            activations = activations + self.bias
        return activations > 0, activations


class LowRankPredictor:
    """The paper's (section 3.1): two thin layers. a: (D, r), b: (r, F), c: (F,); a neuron is chosen if

        x a b + c > threshold

    The threshold is folded into c when it is loaded.
    """

    def __init__(self, a: mx.array, b: mx.array, c: mx.array) -> None:
        self.a, self.b, self.c = a, b, c

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        return (x @ self.a) @ self.b + self.c > 0, None


class ShadowPredictor:
    """The up projection at a few bits: weight, scales, biases of `mx.quantize` over its transpose (D, F).

    A neuron is chosen if the coarse pre-activation x W + c > 0, c being the bias less the threshold. (D, F) is
    grouped along the neurons; on the CPU backend that product is three times faster than the other way up.
    """

    def __init__(
        self, weight: mx.array, scales: mx.array, biases: mx.array, c: mx.array, bits: int, group_size: int
    ) -> None:
        self.weight, self.scales, self.biases, self.c = weight, scales, biases, c
        self.bits = bits
        self.group_size = group_size

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        coarse = mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=False,
            group_size=self.group_size,
            bits=self.bits,
        )
        return coarse + self.c > 0, None
