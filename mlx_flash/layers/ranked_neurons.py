"""The neurons of a layer over several ranks, each of which holds a run of them.

Rank 0 runs the rest of the model and selects the neurons. It sends their ids and the layer's input to the other ranks.
Every rank returns the sum of its own neurons' outputs, and rank 0 adds the sums in rank order. One machine adds up all
neurons in one product, so the last bits depend on the shares. The other ranks keep nothing between two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..flash.neurons import NeuronSlots
from ..ranks.group import Call, Group
from .activations import Activation
from .neurons import StreamedNeurons
from .rank_results import results_of

NEURONS = "neurons"  # the kind of these calls
SOME, ALL, AHEAD = range(3)  # what a call is for: the named neurons, all of them, or only to read the named ones
NO_IDS = np.empty(0, np.int32)


class RankedNeurons(StreamedNeurons):
    """Rank 0's layer: it holds the layer's first neurons as `StreamedNeurons` does, and calls the other ranks for the
    others. layer: the number by which ranks know this layer. last: whether it is the last one."""

    def __init__(
        self,
        units: NeuronSlots,
        activation: Activation,
        decode_tokens: int,
        bias: bool,
        layer: int,
        last: bool,
        group: Group,
    ) -> None:
        super().__init__(units, activation, decode_tokens, bias)
        self._layer, self._last, self._group = layer, last, group

    def _all(self, x: mx.array) -> mx.array:
        return self._exchange(x, super()._all, ALL, NO_IDS)

    def _sum(
        self,
        x: mx.array,
        ids: np.ndarray,
        mask: mx.array | None,
        activations: mx.array | None,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> mx.array:
        own, others = self._divided(ids)
        compute = super()._sum
        if not len(others) and not self._last:
            return compute(x, own, mask, activations, meanwhile)
        masks = [] if mask is None else [mx.take(mask, mx.array(others), axis=1).astype(x.dtype)]  # (N, n)
        return self._exchange(x, lambda x: compute(x, own, mask, activations, meanwhile), SOME, others, masks)

    def _to_prefetch(self, ids: np.ndarray) -> np.ndarray:
        own, others = self._divided(ids)
        if len(others):
            self._group.tell(NEURONS, others, purpose=AHEAD, layer=self._layer)
        return own

    def _divided(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """This rank's neurons and those of the others, int32."""
        own = np.searchsorted(ids, self.units.neurons)
        return ids[:own], ids[own:].astype(np.int32)

    def _exchange(
        self,
        x: mx.array,
        compute: Callable[[mx.array], mx.array],
        purpose: int,
        ids: np.ndarray,
        masks: Sequence[mx.array] = (),
    ) -> mx.array:
        """The sum of all ranks' outputs for x (N, D): (N, D).

        compute: this rank's output. purpose, ids: of the call of the others. masks: which tokens use which of `ids`, in
        x's type (N, n); none if all do.
        """
        self._group.call(NEURONS, ids, (x, *masks), purpose=purpose, layer=self._layer)
        y = compute(x)
        mx.async_eval(y)
        shapes = [y.shape] * (self._group.size - 1)
        for each in results_of(self._group, self.units.shared.counters, shapes, y.dtype):
            y = y + each
        return y


class NeuronCalls:
    """Another rank's answers to the calls of rank 0. layers: its share of each layer."""

    def __init__(self, layers: Sequence[StreamedNeurons]) -> None:
        self._layers = layers

    def __call__(self, call: Call) -> mx.array | None:
        """Reads the neurons that are missing, and adds up the outputs of this rank's own: (N, D). None if the call is
        only to read. Raises ReadError."""
        number, purpose = call.numbers["layer"], call.numbers["purpose"]
        layer = self._layers[number]
        units = layer.units
        begin, end = np.searchsorted(call.ids, (units.first_neuron, units.first_neuron + units.neurons))
        ids = call.ids[begin:end] - units.first_neuron
        if purpose == AHEAD:
            units.prefetch(ids)
            return None
        x, *masks = call.arrays
        units.shared.before_layer(x)
        if purpose == ALL:
            y = layer._all(x)
        elif not masks:
            y = layer._sum(x, ids, None, None)
        else:
            mask = mx.zeros((len(x), units.neurons), mx.bool_)
            mask[:, mx.array(ids)] = masks[0][:, begin:end] > 0
            y = layer._sum(x, ids, mask, None)
        if number + 1 == len(self._layers):
            mx.eval(y)
            units.shared.verify_unchanged()  # Rank 0 looks at its own files after every token.
        return y
