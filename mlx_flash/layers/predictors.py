"""Predictors, which select the neurons that a token needs. Each maps x: (N, D) to (mask, activations).

mask: bool (N, F). activations: (N, F), the output of a resident projection if it is known anyway, else None.
"""

from __future__ import annotations

from typing import Protocol

import mlx.core as mx

from ..errors import FlashError
from .activations import Activation


class Predictor(Protocol):
    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]: ...


class ExactPredictor:
    """Keeps the first projection resident: the gate (F, D) of a gated FFN, else up with its bias (F,) or None."""

    def __init__(self, matrix: mx.array, bias: mx.array | None, activation: Activation) -> None:
        self.matrix = matrix
        self.bias = bias
        self.activation = activation

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        first = self.before(x)
        return self.activation.may_fire(first), first

    def before(self, x: mx.array, start: int = 0, stop: int | None = None) -> mx.array:
        """Pre-activations of neurons start .. stop - 1. x: (N, D) -> (N, stop - start)"""
        first = x @ self.matrix[start:stop].T  # (N, D) @ (D, n)
        return first if self.bias is None else first + self.bias[start:stop]


class LowRankPredictor:
    """The predictor of the paper (LLM in a flash, section 3.1): two thin layers. a: (D, r), b: (r, F), c: (F,).

    A neuron is selected if

        x a b + c > threshold

    The store's c is float32, with the threshold already subtracted.
    """

    def __init__(self, a: mx.array, b: mx.array, c: mx.array) -> None:
        self.a, self.b, self.c = a, b, c

    def score(self, x: mx.array) -> mx.array:
        """x: (N, D) -> (N, F), above 0 where a neuron is selected."""
        return (x @ self.a) @ self.b + self.c

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        return self.score(x) > 0, None


class ImportedPredictor(LowRankPredictor):
    """A predictor as PowerInfer publishes them, with a ReLU between the two layers. h: (r,). A neuron is selected if

    relu(x a + h) b + c > 0
    """

    def __init__(self, a: mx.array, h: mx.array, b: mx.array, c: mx.array) -> None:
        super().__init__(a, b, c)
        self.h = h

    def score(self, x: mx.array) -> mx.array:
        return mx.maximum(x @ self.a + self.h, 0) @ self.b + self.c


class ShadowPredictor:
    """The up projection (of a gated FFN, the gate) at a few bits: weight, scales and biases from `mx.quantize` of its
    transpose W (D, F).

    A neuron is selected if its coarse pre-activation x W + c is above 0. c: float32 (F,), the bias minus the threshold.
    W is grouped along the neurons. On the CPU backend that product is three times as fast as one with W transposed.
    """

    def __init__(
        self, weight: mx.array, scales: mx.array, biases: mx.array, c: mx.array, bits: int, group_size: int
    ) -> None:
        self.weight, self.scales, self.biases, self.c = weight, scales, biases, c
        self.bits = bits
        self.group_size = group_size

    def score(self, x: mx.array) -> mx.array:
        """x: (N, D) -> (N, F), above 0 where a neuron is selected."""
        return self._coarse(x) + self.c

    def __call__(self, x: mx.array) -> tuple[mx.array, mx.array | None]:
        return self.score(x) > 0, None

    def _coarse(self, x: mx.array) -> mx.array:
        return mx.quantized_matmul(
            x,
            self.weight,
            self.scales,
            self.biases,
            transpose=False,
            group_size=self.group_size,
            bits=self.bits,
        )

    def self_test(self) -> None:
        """Compares this device's product of packed bits with that of dequantised numbers, for 1 row and for 8.

        Kernels for this product have been wrong on some GPUs (ml-explore/mlx issue 4201). Raises FlashError.
        """
        words, scales = self.group_size * self.bits // 32, self.scales.shape[1]
        for group in {0, scales - 1}:  # groups of columns; two show an error and take little memory
            weights = mx.dequantize(
                self.weight[:, group * words : (group + 1) * words],
                self.scales[:, group : group + 1],
                self.biases[:, group : group + 1],
                group_size=self.group_size,
                bits=self.bits,
            ).astype(mx.float32)
            for rows in (1, 8):
                x = mx.random.normal((rows, len(self.weight)), key=mx.random.key(rows)).astype(self.scales.dtype)
                expected = x.astype(mx.float32) @ weights
                columns = slice(group * self.group_size, (group + 1) * self.group_size)
                error = mx.abs(self._coarse(x)[:, columns].astype(mx.float32) - expected).max()
                if mx.isfinite(error).item() and (error <= 0.02 * mx.abs(expected).max()).item():
                    continue
                raise FlashError(
                    "self-test failed: products of packed bits are wrong on this device with this version of MLX. "
                    "Use --predictor lowrank or exact, and please report this with the output of `pip show mlx`."
                )
