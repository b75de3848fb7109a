"""The products of a mixture's experts, in two arrangements. The backend decides which of them keeps the same bits.

MLX's CPU backend computes every (token, expert) pair by itself, whatever else is in the call. A call with only some of
the pairs therefore has the zoo's bits. The Metal backend chooses among kernels that round differently, by the number of
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
SORTED_FROM = 64  # a zoo's switch layers sort (token, expert) pairs if there are at least this many


def kernels_vary() -> bool:
    """Whether the device's kernel for a product depends on how many pairs and matrices a call holds."""
    return bool(mx.default_device() != mx.cpu)


def by_pair(inner: Any, x: mx.array, slots: np.ndarray, *rest: mx.array) -> mx.array:
    """Computes every pair by itself, as the switch layer `inner` does. x: (n, D), slots: (n,) -> (n, D)

    inner: a switch layer whose arrays are slots. rest: its further arguments, one number per pair, (n,) each.
    """
    indices = mx.array(slots.astype(np.uint32))[:, None]
    return inner(x, indices, *(each[:, None] for each in rest)).squeeze(-2)


def by_expert(inner: Any, x: mx.array, slots: np.ndarray, *rest: mx.array) -> mx.array:
    """Computes one expert after another, with all its tokens at once. x: (n, D), slots: (n,), grouped -> (n, D)

    inner: a switch layer whose projections are of class Projection. rest: as in `by_pair`. No shape in here depends on
    the number of slots, or on the other experts in the call.
    """
    projections = [child for child in inner.children().values() if isinstance(child, Projection)]
    begins = np.flatnonzero(np.diff(slots, prepend=-1)).tolist()
    ends = [*begins[1:], len(slots)]
    outputs = []
    try:
        for i, j in zip(begins, ends, strict=True):
            for projection in projections:
                projection.alone = int(slots[i])
            outputs.append(by_pair(inner, x[i:j], slots[i:j], *(each[i:j] for each in rest)))
    finally:
        for projection in projections:
            projection.alone = None
    return mx.concatenate(outputs) if len(outputs) > 1 else outputs[0]


class Projection(nn.Module):
    """A projection of a switch layer, over slots. The product is the zoo's own.

    alone: the slot whose matrix all rows are multiplied by, as two plain matrices; None to gather one for each row.
    """

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self._inner = inner
        self.alone: int | None = None

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """x: (..., 1, D), indices: (...) -> (..., 1, O)"""
        if self.alone is not None:
            return _product(self._inner, x.reshape(-1, x.shape[-1]), self.alone).reshape(*x.shape[:-1], -1)
        # Some switch layers sort fewer pairs. For sorted pairs, the Metal backend chooses among kernels.
        return self._gathered(x, indices, sorted_indices and indices.size >= SORTED_FROM)

    def _gathered(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        return self._inner(x, indices, sorted_indices=sorted_indices)  # type: ignore[no-any-return]


def _product(linear: Any, x: mx.array, slot: int) -> mx.array:
    """x: (m, D) -> (m, O), with the matrix in `slot` of a projection."""
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


class Widened(Projection):
    """A projection in 16 bits for MLX's CPU backend, whose `gather_mm` takes only float32. It widens the slots that a
    call uses."""

    def _gathered(self, x: mx.array, indices: mx.array, sorted_indices: bool) -> mx.array:
        numbers = to_numpy(indices)
        slots = np.unique(numbers)
        if len(slots) <= WIDENED_AT_ONCE:
            return self._widened(x, numbers, slots, sorted_indices)
        rows = mx.broadcast_to(x, (*numbers.shape, *x.shape[-2:])).reshape(-1, *x.shape[-2:])  # (n, 1, D)
        flat = numbers.reshape(-1)
        outputs, order = [], []
        for begin in range(0, len(slots), WIDENED_AT_ONCE):
            here = slots[begin : begin + WIDENED_AT_ONCE]
            members = np.flatnonzero((flat >= here[0]) & (flat <= here[-1]))
            members = members[np.argsort(flat[members], kind="stable")]
            y = self._widened(rows[mx.array(members.astype(np.int32))], flat[members], here, True)
            mx.eval(y)
            outputs.append(y)
            order.append(members)
        back = np.argsort(np.concatenate(order)).astype(np.int32)
        return mx.concatenate(outputs)[mx.array(back)].reshape(*numbers.shape, 1, -1)

    def _widened(self, x: mx.array, numbers: np.ndarray, slots: np.ndarray, sorted_indices: bool) -> mx.array:
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
