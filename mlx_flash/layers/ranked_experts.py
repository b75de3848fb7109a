"""The experts of a layer over several ranks, each of which holds a share of them.

Rank 0 runs the rest of the model. It reads the ids of a call back, sends them to the other ranks, and then the layer's
input. Every rank computes the outputs of its own (token, expert) pairs, and pads them to the rows of the rank that has
the most. All outputs are gathered, and rank 0 takes them in the model's own order. Nothing is summed, so the result has
the bits of one rank. The other ranks keep nothing between two calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import UnsupportedModelError
from ..flash.experts import ExpertSlots
from ..flash.host_arrays import to_numpy
from ..ranks.group import Call, Group
from .expert_products import SORTED_FROM
from .expert_shares import DividedPairs, ExpertShares
from .experts import StreamedExperts, skips_experts
from .later_interrupts import interrupts_later

EXPERTS = "experts"  # the kind of these calls
DTYPES = (mx.float32, mx.float16, mx.bfloat16)  # a call names them by number


class HeldExperts:
    """The experts of one layer that a rank holds. streamed: their slots, in which ids are places in the share."""

    def __init__(self, streamed: StreamedExperts, shares: ExpertShares, rank: int) -> None:
        self.streamed, self.shares, self.rank = streamed, shares, rank
        self._form: tuple[int, mx.Dtype] | None = None

    def outputs(self, x: mx.array, needed: np.ndarray, rest: Sequence[mx.array], divided: DividedPairs) -> mx.array:
        """The outputs of this rank's pairs, in their order, and zeros: (most, O).

        x: (N, D). needed: the ids of all pairs, int (N, K). rest: see `StreamedExperts`, (N, K) each.
        """
        members, choices = divided.members[self.rank], needed.shape[-1]
        missing = divided.most - len(members)
        if not len(members):
            return self.zeros(x, rest, divided)
        places, at = self.shares.place[needed.reshape(-1)[members]], mx.array(members.astype(np.int32))
        chosen = [each.reshape(-1)[at] for each in rest]  # (n,) each
        if len(x) == 1:  # as in a call of all pairs
            places, chosen = places[None], [each[None] for each in chosen]
        else:
            x = x[mx.array((members // choices).astype(np.int32))]  # (n, D)
            places, chosen = places[:, None], [each[:, None] for each in chosen]
        y = self.streamed.outputs(x, places, chosen, needed.size >= SORTED_FROM).reshape(len(members), -1)
        self._form = y.shape[-1], y.dtype
        return y if not missing else mx.concatenate([y, mx.zeros((missing, y.shape[-1]), y.dtype)])

    def zeros(self, x: mx.array, rest: Sequence[mx.array], divided: DividedPairs) -> mx.array:
        """What a rank without a pair adds. The arguments are those of `outputs`."""
        if self._form is None:  # An array has its shape and type before it is evaluated, and this one never is.
            y = self.streamed.of_slots(x[:1], mx.zeros((1, 1), mx.uint32), *(each[:1, :1] for each in rest))
            self._form = y.shape[-1], y.dtype
        return mx.zeros((divided.most, self._form[0]), self._form[1])


class RankedExperts(StreamedExperts):
    """Rank 0's layer: it holds its share as `StreamedExperts` does, and calls the other ranks for theirs."""

    def __init__(self, inner: nn.Module, units: ExpertSlots, layer: int, shares: ExpertShares, group: Group) -> None:
        """inner: see `StreamedExperts`. units: the experts of rank 0's share. layer: the number by which ranks know
        this layer."""
        super().__init__(inner, units)
        self._layer, self._shares, self._group = layer, shares, group
        self._held = HeldExperts(self, shares, 0)

    def __call__(self, x: mx.array, indices: mx.array, *rest: mx.array) -> mx.array:
        self.units.shared.before_layer(x)
        self.follow_slots()
        needed = to_numpy(indices)  # the layer's one read-back
        experts = len(self._shares.holder)
        if needed.size and needed.max() >= experts:
            raise skips_experts(int(needed.max()), experts)
        ids = needed.reshape(-1, needed.shape[-1])  # (N, K)
        tokens, chosen = x.reshape(-1, x.shape[-1]), [each.reshape(ids.shape) for each in rest]
        divided = self._shares.divide(ids.reshape(-1))
        if len(divided.members[0]) == needed.size:
            rows = self._held.outputs(tokens, ids, chosen, divided)
        else:
            with interrupts_later():
                rows = self._exchange(tokens, ids, chosen, divided)
        return rows[mx.array(divided.back)].reshape(*needed.shape, -1)

    def _exchange(self, x: mx.array, ids: np.ndarray, rest: Sequence[mx.array], divided: DividedPairs) -> mx.array:
        """The outputs of all ranks, in rank order: (ranks * most, O). The arguments are those of `outputs`."""
        group, held = self._group, self._held
        kinds = {f"rest{number}": number_of(each.dtype) for number, each in enumerate(rest)}
        group.call(EXPERTS, ids, layer=self._layer, width=x.shape[-1], dtype=number_of(x.dtype), **kinds)
        for each in (x, *rest):
            group.spread(each)
        try:
            y = held.outputs(x, ids, rest, divided)
        except BaseException:  # such as a failed read: the other ranks gather all the same
            group.gather(held.zeros(x, rest, divided))
            raise
        return group.gather(y).reshape(-1, y.shape[-1])


class ExpertCalls:
    """Another rank's answers to the calls of rank 0. layers: what this rank holds, in the order of their numbers."""

    def __init__(self, group: Group, layers: Sequence[HeldExperts]) -> None:
        self._group, self._layers = group, layers

    def __call__(self, call: Call) -> None:
        """Reads the experts that the call needs and are missing, and computes the outputs of this rank's pairs.

        Raises ReadError.
        """
        ids, numbers, group = call.ids, call.numbers, self._group
        held = self._layers[numbers["layer"]]
        x = group.receive((len(ids), numbers["width"]), DTYPES[numbers["dtype"]])
        kinds: list[Any] = [numbers[name] for name in sorted(numbers) if name.startswith("rest")]
        rest = [group.receive(ids.shape, DTYPES[kind]) for kind in kinds]
        held.streamed.units.shared.before_layer(x)
        held.streamed.follow_slots()
        y = held.outputs(x, ids, rest, held.shares.divide(ids.reshape(-1)))
        if numbers["layer"] + 1 == len(self._layers):
            held.streamed.units.shared.verify_unchanged()  # Rank 0 looks at its own files after every token.
        group.gather(y)


def number_of(dtype: mx.Dtype) -> int:
    """The number of a type in DTYPES. Raises UnsupportedModelError."""
    if dtype not in DTYPES:
        raise UnsupportedModelError(f"a layer of experts takes {dtype}, which is not sent to other ranks.")
    return DTYPES.index(dtype)
