"""The products of a mixture's experts, in two arrangements. The backend decides which of them keeps the same bits.

MLX's CPU backend computes every (token, expert) pair by itself, whatever else is in the call. A call with only some of
the pairs therefore has mlx-lm's bits. The Metal backend chooses among kernels that round differently, by the number of
pairs in a call and by the number of matrices in the weight array. Here both depend on the memory budget: the weight
array is the slots, and a call holds the experts that were read together. On Metal, a prompt's products therefore go
expert by expert. Each product has two plain matrices, whose shapes depend on the prompt alone (docs/metal.md).
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..flash.host_arrays import to_numpy

SIXTEEN_BITS = (mx.float16, mx.bfloat16)
WIDENED_AT_ONCE = 16  # most experts that are in memory in 32 bits, beside their slots


def kernels_vary() -> bool:
    """Whether the device's kernel for a product depends on how many pairs and matrices a call holds."""
    return bool(mx.default_device() != mx.cpu)


def by_pair(inner: Any, x: mx.array, slots: np.ndarray, sorted_indices: bool) -> mx.array:
    """Computes every pair by itself, like mlx-lm's switch layers. x: (n, D), slots: (n,), ascending -> (n, D)

    inner: a `SwitchGLU` or `SwitchMLP` whose arrays are slots. sorted_indices: mlx-lm's flag for this many pairs.
    """
    x, indices = x[:, None], mx.array(slots.astype(np.uint32))  # (n, 1, D)
    if "fc1" in inner:
        hidden = inner.activation(inner.fc1(x, indices, sorted_indices))
        return inner.fc2(hidden, indices, sorted_indices).squeeze(1)
    up, gate = inner.up_proj(x, indices, sorted_indices), inner.gate_proj(x, indices, sorted_indices)
    return inner.down_proj(inner.activation(up, gate), indices, sorted_indices).squeeze(1)


def by_expert(inner: Any, x: mx.array, slots: np.ndarray) -> mx.array:
    """Computes one expert after another, with all its tokens at once. x: (n, D), slots: (n,), grouped -> (n, D)

    No shape in here depends on the number of slots, or on the other experts in the call.
    """
    begins = np.flatnonzero(np.diff(slots, prepend=-1)).tolist()
    ends = [*begins[1:], len(slots)]
    outputs = [_expert(inner, x[i:j], int(slots[i])) for i, j in zip(begins, ends, strict=True)]
    return mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]


def _expert(inner: Any, x: mx.array, slot: int) -> mx.array:
    """(m, D) -> (m, D)"""
    if "fc1" in inner:
        return _product(inner.fc2, inner.activation(_product(inner.fc1, x, slot)), slot)
    up, gate = _product(inner.up_proj, x, slot), _product(inner.gate_proj, x, slot)
    return _product(inner.down_proj, inner.activation(up, gate), slot)


def _product(linear: Any, x: mx.array, slot: int) -> mx.array:
    """x: (m, D) -> (m, O), with the matrix in `slot` of a `SwitchLinear` or `QuantizedSwitchLinear`."""
    if "scales" not in linear:
        y = x @ linear.weight[slot].T  # (m, D) @ (D, O)
    else:
        weight, scales, biases = linear.weight, linear.scales, linear.get("biases")
        settings: Any = {"group_size": linear.group_size, "bits": linear.bits, "mode": linear.mode, "transpose": True}
        scale = getattr(linear, "global_scale", None)
        if scale is None:
            bias = None if biases is None else biases[slot]
            y = mx.quantized_matmul(x, weight[slot], scales[slot], bias, **settings)
        else:  # `quantized_matmul` does not take a scale of a whole matrix; such matrices have no biases
            one, first = slice(slot, slot + 1), mx.zeros((1,), mx.uint32)
            settings |= {"rhs_indices": first, "global_scale": scale[one]}
            y = mx.gather_qmm(x[None], weight[one], scales[one], **settings)[0]
    return y + linear.bias[slot] if "bias" in linear else y


def is_widened(tensor: str, dtype: mx.Dtype) -> bool:
    """Whether a projection's tensor is widened for a product: MLX's CPU backend has `gather_mm` only in float32.

    tensor: its name in the projection. 16-bit scales belong to packed weights, which are not widened.
    """
    return tensor == "weight" and dtype in SIXTEEN_BITS and mx.default_device() == mx.cpu


class Widened(nn.Module):
    """A 16-bit `SwitchLinear` for MLX's CPU backend, whose `gather_mm` takes only float32. It widens the slots that a
    call uses."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self._inner = inner

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x: (..., 1, D), indices: (...) -> (..., 1, O)"""
        numbers = to_numpy(indices)
        slots = np.unique(numbers)
        if len(slots) <= WIDENED_AT_ONCE:
            return self._product(x, numbers, slots, sorted_indices)
        rows = mx.broadcast_to(x, (*numbers.shape, *x.shape[-2:])).reshape(-1, *x.shape[-2:])  # (n, 1, D)
        flat = numbers.reshape(-1)
        outputs, order = [], []
        for begin in range(0, len(slots), WIDENED_AT_ONCE):
            here = slots[begin : begin + WIDENED_AT_ONCE]
            members = np.flatnonzero((flat >= here[0]) & (flat <= here[-1]))
            members = members[np.argsort(flat[members], kind="stable")]
            y = self._product(rows[mx.array(members.astype(np.int32))], flat[members], here, True)
            mx.eval(y)
            outputs.append(y)
            order.append(members)
        back = np.argsort(np.concatenate(order)).astype(np.int32)
        return mx.concatenate(outputs)[mx.array(back)].reshape(*numbers.shape, 1, -1)

    def _product(self, x: mx.array, numbers: np.ndarray, slots: np.ndarray, sorted_indices: bool) -> mx.array:
        """numbers: (...), slot numbers out of `slots`. slots: (n,), ascending."""
        weight = mx.take(self._inner.weight, mx.array(slots), axis=0).astype(mx.float32)
        y = mx.gather_mm(
            x.astype(mx.float32),
            weight.swapaxes(-1, -2),
            rhs_indices=mx.array(np.searchsorted(slots, numbers).astype(np.uint32)),
            sorted_indices=sorted_indices,
        )
        if "bias" in self._inner:
            y = y + mx.expand_dims(self._inner.bias[mx.array(numbers)], -2)
        return y.astype(x.dtype)
