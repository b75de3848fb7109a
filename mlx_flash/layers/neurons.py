"""The streamed feed-forward layer, over the neurons that matter: y = f(x U^T + b) D + c, or y = f(x G^T, x U^T) D."""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..flash.host_arrays import to_numpy
from ..flash.neurons import NeuronSlots
from ..flash.rows import PackedRows, StoredRows
from .activations import Activation
from .lookahead_trial import LookAheadTrial
from .predictors import ExactPredictor, Predictor

PACKED_TOKENS = 2  # for so few, products with quantised rows are quicker than dequantising them (bench/RESULTS.md)
GUESS_AGAIN = 32  # calls after which a layer that guesses badly tries again


class StreamedNeurons(nn.Module):
    """Takes the place of a model's MLP. x: (B, T, D) -> (B, T, D).

    Up to `decode_tokens` tokens per sequence go the decode way: the predictor names each position's neurons,
    their union is fetched, and each position computes with its own. Longer calls, and layers without a
    predictor, use all neurons. Sums run over ascending neuron ids in pieces that the store fixes, so the
    result does not depend on what the cache holds.
    """

    def __init__(self, stream: NeuronSlots, activation: Activation, decode_tokens: int, bias: bool) -> None:
        super().__init__()
        layout = stream.layout
        if bias:
            self.up_bias = mx.zeros((layout.neurons,))
            self.down_bias = mx.zeros((layout.width,))
        self.units = stream
        self._activation = activation
        self.decode_tokens = decode_tokens
        self.predictor: Predictor | None = None
        self.ahead: LookAhead | None = None

    def look_ahead(
        self, following: StreamedNeurons, norm: nn.Module, following_norm: nn.Module, trial: LookAheadTrial
    ) -> None:
        """From now on, guesses what `following`, the next layer, will need, and starts to read it, where that pays.

        norm, following_norm: the norms whose outputs the two layers take. trial: the model's; the first layer that
        guesses tells it when a token begins.
        """
        if self.predictor is not None:
            self.ahead = LookAhead.of(following, norm, following_norm, trial)

    def settle(self) -> None:
        """Evaluates what still reads this layer's cache; a chunk of a prompt leaves the last layer's output undone."""
        self.units.settle()

    def exact_predictor(self, dtype: mx.Dtype) -> ExactPredictor:
        """One that knows which neurons can be active: it has the first projection, which is read here."""
        rows = []
        for _, _, (first, *_) in self.units.whole_bundles():
            rows.append(first.astype(dtype))
            mx.eval(rows)
        matrix = mx.concatenate(rows)
        mx.eval(matrix)  # here: another thread, as a server has, could not
        gated = len(self.units.layout.parts) == 3
        return ExactPredictor(matrix, self.up_bias if "up_bias" in self and not gated else None, self._activation)

    def __call__(self, x: mx.array) -> mx.array:
        flat = x.reshape(-1, x.shape[-1])  # (N, D)
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
        """Pre-activations (N, n) by all of neurons `ids`' rows but the down rows."""
        products = [_project(x, matrix) for matrix in rows[:-1]]
        if "up_bias" in self and products:
            products[-1] = products[-1] + self.up_bias[ids]
        return products

    def _selected(self, x: mx.array, predictor: Predictor) -> mx.array:
        if self.ahead is not None and self.ahead.leads:
            self.ahead.trial.token()
        mask, activations = predictor(x)
        guess = self.ahead.guess(x) if self.ahead is not None else None
        if guess is not None:
            mx.eval(mask, guess)
        chosen = to_numpy(mask, copy=False)  # the layer's one read-back
        ids = _union(chosen)
        if len(ids):
            self.units.begin(ids)
        if self.ahead is not None and guess is not None:
            self.ahead.following.units.read_ahead(_union(to_numpy(guess, copy=False)))
        packed = len(x) <= PACKED_TOKENS
        y = mx.zeros_like(x)
        for begin in range(0, len(ids), self.units.layout.piece_neurons):
            piece = ids[begin : begin + self.units.layout.piece_neurons]
            index = mx.array(piece.astype(np.int32))
            known = [] if activations is None else [mx.take(activations, index, axis=1)]  # (N, n)
            rows = self.units.gather_stored(piece) if packed else self.units.gather(piece)
            h = self._activation(*known, *self._products(x, rows, index))
            if len(chosen) > 1:
                h = mx.where(mx.take(mask, index, axis=1), h, 0)
            y = y + _combine(h, rows[-1])
            self.units.hold(y)
            if begin + len(piece) < len(ids):
                self.units.settle()  # else the rows of several pieces are in memory at once
        return y


def _project(x: mx.array, rows: mx.array | PackedRows) -> mx.array:
    """(N, D) -> (N, n)"""
    return rows.project(x) if isinstance(rows, PackedRows) else x @ rows.astype(x.dtype).T  # (N, D) @ (D, n)


def _combine(h: mx.array, rows: mx.array | PackedRows) -> mx.array:
    """(N, n) -> (N, D)"""
    return rows.combine(h) if isinstance(rows, PackedRows) else h @ rows.astype(h.dtype)  # (N, n) @ (n, D)


def _union(mask: np.ndarray) -> np.ndarray:
    """Ids that any row chooses, ascending. mask: bool (N, F)."""
    return np.flatnonzero(mask.any(axis=0) if len(mask) > 1 else mask[0])


@dataclass
class LookAhead:
    """A guess of what the next layer will choose, made before this layer's FFN and the next attention have run.

    They add little to the residual, and the next layer's norm sees nearly what this one saw. Norms differ only in
    weights w and biases b: x = n w + b here gives n w' + b' = x (w' / w) + (b' - b w' / w) there, for the same n.
    """

    following: StreamedNeurons
    scale: mx.array  # (D,)
    shift: mx.array  # (D,)
    trial: LookAheadTrial
    leads: bool = False  # tells `trial` when a token begins
    skipped: int = 0  # calls without a guess, since the last one

    @staticmethod
    def of(
        following: StreamedNeurons, norm: nn.Module, following_norm: nn.Module, trial: LookAheadTrial
    ) -> LookAhead | None:
        """None where this norm erases what the next one would need."""
        weight = norm.weight.astype(mx.float32)
        if (mx.abs(weight).min() < 1e-3 * mx.abs(weight).max()).item():
            return None
        scale = following_norm.weight / weight
        shift = mx.zeros_like(scale)
        if "bias" in norm:
            shift = following_norm.bias - norm.bias * scale
        scale, shift = scale.astype(norm.weight.dtype), shift.astype(norm.weight.dtype)
        mx.eval(scale, shift)
        return LookAhead(following, scale, shift, trial)

    def guess(self, x: mx.array) -> mx.array | None:
        """x: (N, D), this layer's input -> bool (N, F) of the next; None where it has no use for one."""
        predictor, stream = self.following.predictor, self.following.units
        if predictor is None or stream.all_resident or not self.trial.guessing:
            return None
        # Where guesses are mostly wrong they are only tried now and then: a layer's first ones may mislead.
        self.skipped += 1
        if stream.vain_early > stream.used_early and self.skipped < GUESS_AGAIN:
            return None
        self.skipped = 0
        return predictor(x * self.scale + self.shift)[0]
