"""Gemma 3n's feed-forward layers: their shapes, and the rule by which a sparse one chooses its neurons.

y = down(gelu(max(0, g - c)) * up(x)) with g = gate(x) and c = mean(g) + z * deviation(g), where z is the normal
quantile of the share that stays at zero. A neuron whose gate is at most c adds exactly zero. All gates of a token are
needed for c, so the gate is resident.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import mlx.core as mx
import mlx.nn as nn

SPARSITY = 0.95


@dataclass(frozen=True)
class LayerShape:
    """A model's decoder layers.

    sparse: how many of the `layers` choose their neurons. others: numbers in a layer's matrices beside the FFN's.
    head: numbers in the output head, which is in memory.
    """

    layers: int
    sparse: int
    width: int
    neurons: int
    others: int
    head: int


_OTHERS = 2 * 2048 * 2048 + 2 * 2048 * 512 + 2 * 2048 * 64 + 2 * 2048 * 256  # attention, LAuReL, per-layer input
_HEAD = 262400 * 2048
SHAPES = {
    "e4b": LayerShape(35, 10, 2048, 16384, _OTHERS, _HEAD),
    "e2b": LayerShape(30, 10, 2048, 8192, _OTHERS, _HEAD),
    "tiny": LayerShape(4, 2, 256, 512, 4 * 256 * 256, 4096 * 256),
}


def cutoff(gates: mx.array, sparsity: float = SPARSITY) -> mx.array:
    """The number c above which a gate is active. gates: (N, F) -> (N, 1)"""
    mean, deviation = mx.mean(gates, axis=-1, keepdims=True), mx.std(gates, axis=-1, keepdims=True)
    return mean + deviation * NormalDist().inv_cdf(sparsity)


class TopKActivation:
    """h = gelu(max(0, g - c)) * u, from g - c and u."""

    def __call__(self, above: mx.array, up: mx.array) -> mx.array:
        return nn.gelu_approx(mx.maximum(above, 0)) * up


def other_outputs(found: mx.array, expected: mx.array, exact: mx.array) -> dict[str, float]:
    """Compares outputs (D,) of the same numbers in another order of summation.

    differ: share of outputs with other bits. error: largest difference. own, theirs: largest distance of `found` and
    `expected` from `exact`, the result in float64. All relative to the largest output.
    """
    largest = _number(mx.abs(expected).max())
    far = {"error": (found, expected), "own": (found, exact), "theirs": (expected, exact)}
    distances = {name: _number(mx.abs(one - other).max()) / largest for name, (one, other) in far.items()}
    return {"differ": _number((found != expected).astype(mx.float32).mean()), **distances}


def _number(value: mx.array) -> float:
    return float(value.item())  # type: ignore[arg-type]  # not complex
