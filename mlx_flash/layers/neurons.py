"""The streamed feed-forward layer, over selected neurons: y = f(x U^T + b) D + c, or y = f(x G^T, x U^T) D."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..flash.host_arrays import to_numpy
from ..flash.neurons import NeuronSlots
from ..flash.rows import PackedRows, StoredRows
from .activations import Activation
from .lookahead import LookAhead
from .predictors import ExactPredictor, Predictor

# Up to this many tokens, products with quantised rows are faster than dequantising them (bench/results/bits.md).
PACKED_TOKENS = 2


class StreamedNeurons(nn.Module):
    """Replaces a model's MLP. x: (B, T, D) -> (B, T, D).

    Up to `decode_tokens` tokens per sequence take the decode path: the predictor selects the neurons of each position,
    their union is read, and each position computes with its own. Longer calls, and layers without a predictor, use all
    neurons. Sums run over ascending neuron ids in pieces that the store fixes, so the result does not depend on the
    contents of the cache.
    """

    def __init__(self, units: NeuronSlots, activation: Activation, decode_tokens: int, bias: bool) -> None:
        super().__init__()
        layout = units.layout
        if bias:
            self.up_bias = mx.zeros((layout.neurons,))
            self.down_bias = mx.zeros((layout.width,))
        self.units = units
        self._activation = activation
        self.decode_tokens = decode_tokens
        self.predictor: Predictor | None = None
        self.ahead: LookAhead | None = None

    def look_ahead(self, following: StreamedNeurons, norm: nn.Module, following_norm: nn.Module) -> None:
        """Makes this layer guess which neurons `following`, the next layer, needs, and read them where that pays.

        norm, following_norm: the norms whose outputs the two layers take.
        """
        predictor = following.predictor
        if self.predictor is None or predictor is None or (change := norm_change(norm, following_norm)) is None:
            return
        scale, shift = change

        def score(x: mx.array) -> mx.array:
            return predictor(x * scale + shift)[0]  # bool (N, F)

        self.ahead = LookAhead(following.units, score, lambda mask, _: following._to_prefetch(_union(mask)))

    def exact_predictor(self, dtype: mx.Dtype) -> ExactPredictor:
        """A predictor that computes which neurons can be active. Reads the first projection, which it keeps."""
        rows = []
        for _, _, (first, *_) in self.units.whole_bundles():
            rows.append(first.astype(dtype))
            mx.eval(rows)
        matrix = mx.concatenate(rows)
        mx.eval(matrix)  # here, because another thread (such as a server's) cannot evaluate it
        gated = len(self.units.layout.parts) == 3
        return ExactPredictor(matrix, self.up_bias if "up_bias" in self and not gated else None, self._activation)

    def __call__(self, x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
        self.units.shared.before_layer(x)
        if self.predictor is None or x.shape[1] > self.decode_tokens:
            y = self._all(flat)
        else:
            y = self._selected(flat, self.predictor)
        if "down_bias" in self:
            y = y + self.down_bias
        return y.reshape(x.shape)

    def _all(self, x: mx.array) -> mx.array:
        y = mx.zeros_like(x)
        # Closed here: after an exception a traceback would keep the generator, and its read would stay in flight.
        with closing(self.units.pieces()) as pieces:
            for start, stop, rows in pieces:
                known = []
                if isinstance(self.predictor, ExactPredictor):
                    known.append(self.predictor.before(x, start, stop))
                h = self._activation(*known, *self._products(x, rows, slice(start, stop)))  # (N, n)
                y = y + _combine(h, rows[-1])
                mx.eval(y)
        return y

    def _products(self, x: mx.array, rows: StoredRows, ids: slice | mx.array) -> list[mx.array]:
        """Pre-activations (N, n) of neurons `ids`, one array for each part in `rows` but the down rows."""
        products = [_project(x, matrix) for matrix in rows[:-1]]
        if "up_bias" in self and products:
            products[-1] = products[-1] + self.up_bias[ids]
        return products

    def _selected(self, x: mx.array, predictor: Predictor) -> mx.array:
        ahead = self.ahead
        mask, activations = predictor(x)
        guess = ahead.guess(x) if ahead is not None else None
        if guess is not None:
            mx.eval(mask, guess)
        chosen = to_numpy(mask, copy=False)  # the layer's one read-back

        def prefetch() -> None:
            if ahead is not None and guess is not None:
                ahead.prefetch(guess, chosen)

        return self._sum(x, _union(chosen), mask if len(chosen) > 1 else None, activations, prefetch)

    def _sum(
        self,
        x: mx.array,
        ids: np.ndarray,
        mask: mx.array | None,
        activations: mx.array | None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> mx.array:
        """The output of neurons `ids` (ascending), without a bias: (N, D). meanwhile: see `Units.use`.

        mask: bool (N, F), each position's own neurons; None if all have the same. activations: see Predictor.
        """
        y = mx.zeros_like(x)
        for piece, rows in self.units.use(ids, packed=len(x) <= PACKED_TOKENS, meanwhile=meanwhile):
            y = y + self._output(x, piece, rows, mask, activations)
            self.units.guard(y)
        return y

    def _output(
        self, x: mx.array, ids: np.ndarray, rows: StoredRows, mask: mx.array | None, activations: mx.array | None
    ) -> mx.array:
        """What one piece of `_sum` adds."""
        index = mx.array(ids.astype(np.int32))
        known = [] if activations is None else [mx.take(activations, index, axis=1)]  # (N, n)
        h = self._activation(*known, *self._products(x, rows, index))
        if mask is not None:
            h = mx.where(mx.take(mask, index, axis=1), h, 0)
        return _combine(h, rows[-1])

    def _to_prefetch(self, ids: np.ndarray) -> np.ndarray:
        """Those of the guessed neurons `ids` (ascending) that this process reads."""
        return ids


def _project(x: mx.array, rows: mx.array | PackedRows) -> mx.array:
    """(N, D) -> (N, n)"""
    return rows.project(x) if isinstance(rows, PackedRows) else x @ rows.astype(x.dtype).T  # (N, D) @ (D, n)


def _combine(h: mx.array, rows: mx.array | PackedRows) -> mx.array:
    """(N, n) -> (N, D)"""
    return rows.combine(h) if isinstance(rows, PackedRows) else h @ rows.astype(h.dtype)  # (N, n) @ (n, D)


def _union(mask: np.ndarray) -> np.ndarray:
    """Ids of the neurons that any row selects, ascending. mask: bool (N, F)."""
    return np.flatnonzero(mask.any(axis=0) if len(mask) > 1 else mask[0])


def norm_change(norm: nn.Module, following_norm: nn.Module) -> tuple[mx.array, mx.array] | None:
    """(scale, shift), (D,) each, that turn this norm's output into nearly the next one's; None if this norm erases
    numbers that the next one needs.

    An FFN and an attention add little to the residual, so the next layer's norm sees nearly the same input. The norms
    differ only in weights w and biases b. For the same n, x = n w + b here gives
    n w' + b' = x (w' / w) + (b' - b w' / w) there.
    """
    weight = norm.weight.astype(mx.float32)
    if (mx.abs(weight).min() < 1e-3 * mx.abs(weight).max()).item():
        return None
    scale = following_norm.weight / weight
    shift = mx.zeros_like(scale)
    if "bias" in norm:
        shift = following_norm.bias - norm.bias * scale
    scale, shift = scale.astype(norm.weight.dtype), shift.astype(norm.weight.dtype)
    mx.eval(scale, shift)
    return scale, shift
