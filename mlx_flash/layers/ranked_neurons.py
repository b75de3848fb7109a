"""The neurons of a layer over several ranks, each of which holds a run of them.

Rank 0 runs the rest of the model and selects the neurons. It sends their ids to the other ranks, and then the layer's
input. Every rank adds up the outputs of its own neurons. The sums are gathered, and rank 0 adds them in rank order. One
machine adds up all neurons in one product, so the last bits depend on the shares. The other ranks keep nothing between
two calls.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np

from ..flash.neurons import NeuronSlots
from ..ranks.group import Call, Group
from .activations import Activation
from .later_interrupts import interrupts_later
from .neurons import StreamedNeurons

NEURONS = "neurons"  # the kind of these calls
SOME, ALL, AHEAD = range(3)  # what a call is for: the named neurons, all of them, or only to read the named ones
NO_IDS = np.empty(0, np.int32)


class RankedNeurons(StreamedNeurons):
    """Rank 0's layer: it holds the layer's first neurons as `StreamedNeurons` does, and calls the other ranks for the
    others. layer: the number by which ranks know this layer."""

    def __init__(
        self, units: NeuronSlots, activation: Activation, decode_tokens: int, bias: bool, layer: int, group: Group
    ) -> None:
        super().__init__(units, activation, decode_tokens, bias)
        self._layer, self._group = layer, group

    def _all(self, x: mx.array) -> mx.array:
        return self._exchange(x, super()._all, ALL, NO_IDS, x)

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
        if not len(others):
            return compute(x, own, mask, activations, meanwhile)
        masks = [] if mask is None else [mx.take(mask, mx.array(others), axis=1).astype(x.dtype)]  # (N, n)
        sent = mx.concatenate([x, *masks], axis=1)
        return self._exchange(x, lambda x: compute(x, own, mask, activations, meanwhile), SOME, others, sent)

    def _to_prefetch(self, ids: np.ndarray) -> np.ndarray:
        own, others = self._divided(ids)
        if len(others):
            self._group.call(NEURONS, others, purpose=AHEAD, layer=self._layer)
        return own

    def _divided(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """This rank's neurons and those of the others, int32."""
        own = np.searchsorted(ids, self.units.neurons)
        return ids[:own], ids[own:].astype(np.int32)

    def _exchange(
        self, x: mx.array, compute: Callable[[mx.array], mx.array], purpose: int, ids: np.ndarray, sent: mx.array
    ) -> mx.array:
        """The sum of all ranks' outputs for x (N, D): (N, D).

        compute: this rank's output. purpose, ids: of the call of the others. sent: x, with their masks beside it.
        """
        group = self._group
        masked = sent.shape[-1] - x.shape[-1]
        with interrupts_later():
            group.call(NEURONS, ids, purpose=purpose, layer=self._layer, tokens=len(x), masked=masked)
            group.spread(sent)
            try:
                y = compute(x)
            except BaseException:  # such as a failed read: the other ranks gather all the same
                group.gather(mx.zeros_like(x))
                raise
            first, *others = group.gather(y)
        for each in others:
            first = first + each
        return first


class NeuronCalls:
    """Another rank's answers to the calls of rank 0. layers: its share of each layer. dtype: of their inputs."""

    def __init__(self, group: Group, layers: Sequence[StreamedNeurons], dtype: mx.Dtype) -> None:
        self._group, self._layers, self._dtype = group, layers, dtype

    def __call__(self, call: Call) -> None:
        """Reads the neurons that are missing, and adds up the outputs of this rank's own. Raises ReadError."""
        layer, purpose = self._layers[call.numbers["layer"]], call.numbers["purpose"]
        units, width = layer.units, layer.units.layout.width
        begin, end = np.searchsorted(call.ids, (units.first_neuron, units.first_neuron + units.neurons))
        ids = call.ids[begin:end] - units.first_neuron
        if purpose == AHEAD:
            units.prefetch(ids)
            return
        columns = call.numbers["masked"]
        x = self._group.receive((call.numbers["tokens"], width + columns), self._dtype)
        units.shared.before_layer(x)
        x, masks = x[:, :width], x[:, width:]
        if purpose == ALL:
            y = layer._all(x)
        elif not columns:
            y = layer._sum(x, ids, None, None)
        else:
            mask = mx.zeros((len(x), units.neurons), mx.bool_)
            mask[:, mx.array(ids)] = masks[:, begin:end] > 0
            y = layer._sum(x, ids, mask, None)
        self._group.gather(y)
