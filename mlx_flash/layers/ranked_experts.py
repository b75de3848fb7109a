"""The experts of a layer over several ranks, each of which holds a share of them.

Rank 0 runs the rest of the model. It reads the ids of a call back, and sends them with the layer's input to the ranks
whose experts they name. Every rank returns the outputs of its own (token, expert) pairs, and rank 0 takes all of them
in the model's own order. Nothing is summed, so the result has the bits of one rank. The other ranks keep nothing
between two calls.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import FlashError
from ..flash.experts import ExpertSlots
from ..flash.host_arrays import to_numpy
from ..ranks.group import Call, Group
from .expert_products import SORTED_FROM
from .expert_shares import ExpertShares
from .experts import StreamedExperts, skips_experts
from .rank_results import results_of

EXPERTS = "experts"  # the kind of these calls


class HeldExperts:
    """The experts of one layer that a rank holds. streamed: their slots, in which ids are places in the share."""

    def __init__(self, streamed: StreamedExperts, shares: ExpertShares) -> None:
        self.streamed, self.shares = streamed, shares

    def outputs(self, x: mx.array, needed: np.ndarray, rest: Sequence[mx.array], members: np.ndarray) -> mx.array:
        """The outputs of this rank's pairs, in their order: (n, O).

        x: (N, D). needed: the ids of all pairs, int (N, K). rest: see `StreamedExperts`, (N, K) each. members: the
        numbers of this rank's pairs, ascending, int (n,), not none.
        """
        choices = needed.shape[-1]
        places, at = self.shares.place[needed.reshape(-1)[members]], mx.array(members.astype(np.int32))
        chosen = [each.reshape(-1)[at] for each in rest]  # (n,) each
        if len(x) == 1:  # as in a call of all pairs
            places, chosen = places[None], [each[None] for each in chosen]
        else:
            x = x[mx.array((members // choices).astype(np.int32))]  # (n, D)
            places, chosen = places[:, None], [each[:, None] for each in chosen]
        return self.streamed.outputs(x, places, chosen, needed.size >= SORTED_FROM).reshape(len(members), -1)


class RankedExperts(StreamedExperts):
    """Rank 0's layer: it holds its share as `StreamedExperts` does, and calls the other ranks for theirs."""

    def __init__(
        self, inner: nn.Module, units: ExpertSlots, layer: int, last: bool, shares: ExpertShares, group: Group
    ) -> None:
        """inner: see `StreamedExperts`. units: the experts of rank 0's share. layer: the number by which ranks know
        this layer. last: whether it is the last one."""
        super().__init__(inner, units)
        self._layer, self._last, self._shares, self._group = layer, last, shares, group
        self._held = HeldExperts(self, shares)

    def __call__(self, x: mx.array, indices: mx.array, *rest: mx.array) -> mx.array:
        self.units.shared.before_layer(x)
        self.follow_slots()
        tokens = x.reshape(-1, x.shape[-1])  # (N, D)
        chosen = [each.reshape(-1, indices.shape[-1]) for each in rest]  # (N, K) each
        mx.eval(indices, tokens, *chosen)  # the layer's one read-back, with all that may be sent
        needed = to_numpy(indices)
        experts = len(self._shares.holder)
        if needed.size and needed.max() >= experts:
            raise skips_experts(int(needed.max()), experts)
        ids = needed.reshape(-1, needed.shape[-1])  # (N, K)
        divided = self._shares.divide(ids.reshape(-1))
        others = [rank for rank in range(1, self._group.size) if self._last or len(divided.members[rank])]
        if others:
            self._group.call(EXPERTS, ids, (tokens, *chosen), others, layer=self._layer)
        rows = []
        if len(own := divided.members[0]):
            rows.append(self._held.outputs(tokens, ids, chosen, own))
            mx.async_eval(rows)
        if others:
            width = rows[0].shape[-1] if rows else None
            shapes = [(count, width if count else None) for count in (len(divided.members[rank]) for rank in others)]
            rows += [row for row in results_of(self._group, self.units.shared.counters, shapes) if len(row)]
            if len({row.dtype for row in rows}) > 1:
                raise FlashError(f"ranks return outputs of different types: {[str(row.dtype) for row in rows]}.")
        return mx.concatenate(rows)[mx.array(divided.back)].reshape(*needed.shape, -1)


class ExpertCalls:
    """Another rank's answers to the calls of rank 0. layers: what this rank holds, in the order of their numbers."""

    def __init__(self, rank: int, layers: Sequence[HeldExperts]) -> None:
        self._rank, self._layers = rank, layers

    def __call__(self, call: Call) -> mx.array:
        """Reads the experts that the call needs and are missing, and computes the outputs of this rank's pairs: (n, O);
        (0, D) if there are none, as may be in the last layer, in which every rank looks at its files.

        Raises ReadError.
        """
        ids, layer, (x, *rest) = call.ids, call.numbers["layer"], call.arrays
        held = self._layers[layer]
        held.streamed.units.shared.before_layer(x)
        held.streamed.follow_slots()
        members = held.shares.divide(ids.reshape(-1)).members[self._rank]
        y = held.outputs(x, ids, rest, members) if len(members) else x[:0]
        if layer + 1 == len(self._layers):
            mx.eval(y)
            held.streamed.units.shared.verify_unchanged()  # Rank 0 looks at its own files after every token.
        return y
