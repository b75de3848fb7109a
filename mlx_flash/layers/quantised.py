"""Resident matrices in 4 or 8 bits: MLX's own quantised modules where their products are fast, else widened ones."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..flash.host_arrays import to_numpy

PIECE_NUMBERS = 4 << 20  # numbers that are dequantised at once


def matrices_of(model: Any) -> dict[str, nn.Module]:
    """The modules that can be quantised (linear layers and embeddings), by the name of their weight."""
    return {
        f"{name}.weight": module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Embedding))
    }


def companions(weight: str) -> tuple[str, str]:
    """The names of the scales and the biases that belong to a quantised weight."""
    module = weight.removesuffix(".weight")
    return f"{module}.scales", f"{module}.biases"


def widen(packed: mx.array, scales: mx.array, biases: mx.array, group_size: int, bits: int) -> mx.array:
    """The numbers (n, m) in float32, evaluated. Made in pieces, because `mx.dequantize` takes twice its result.

    packed: uint32 (n, m * bits / 32); scales, biases: (n, m / group_size).
    """
    columns = packed.shape[1] * 32 // bits
    result = mx.zeros((packed.shape[0], columns))
    mx.eval(result, packed, scales, biases)
    target = to_numpy(result, copy=False)
    step = max(1, PIECE_NUMBERS // columns)
    for begin in range(0, len(target), step):
        rows = slice(begin, begin + step)
        scale, bias = (part[rows].astype(mx.float32) for part in (scales, biases))
        numbers = mx.dequantize(packed[rows], scale, bias, group_size=group_size, bits=bits)
        target[rows] = to_numpy(numbers, copy=False)
    return result
