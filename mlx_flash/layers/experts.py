"""The experts of a mixture-of-experts layer, in slots. The zoo's own products run over slot numbers instead of ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..errors import UnsupportedModelError
from ..flash.experts import ExpertSlots
from ..flash.host_arrays import to_numpy
from .expert_products import SORTED_FROM, Projection, Widened, by_expert, by_pair, is_widened, kernels_vary
from .lookahead import LookAhead
from .routers import Router

EXPERTS_AT_ONCE = 16  # experts of a prompt that are multiplied while as many are read
AHEAD = 0.25  # share of a token's experts that a guess reads, at least one (bench/results/expert-lookahead.md)


def most_positions(choices: int) -> int:
    """The most tokens of a call whose (token, expert) pairs are computed like those of a single token.

    choices: number of experts of a token.
    """
    return max(1, (SORTED_FROM - 1) // choices)


class StreamedExperts(nn.Module):
    """Replaces a zoo's switch layer. x: (..., D), indices: (..., K) -> (..., K, D).

    Every expert that the router chose is used, whatever is in the cache. The computation of a (token, expert) pair does
    not depend on the cache either. For a few tokens it is the same as in the zoo, and for a prompt on MLX's CPU backend
    as well. On Metal, a prompt's products go expert by expert (expert_products.py).
    """

    def __init__(self, inner: nn.Module, units: ExpertSlots) -> None:
        """inner: the layer that this replaces.

        units: its experts, with tensors named `projection.tensor`, or `tensor` for those of the layer itself.
        """
        super().__init__()
        self._inner = inner
        self.units = units
        self._slot_of: mx.array | None = None  # (E,), once all experts are resident
        self._followed = units.held  # the slots whose arrays `inner` has
        self.ahead: LookAhead | None = None
        classes: dict[str, type[Projection]] = {}
        for name, pool in units.pools.items():
            projection, _, tensor = name.rpartition(".")
            (inner[projection] if projection else inner)[tensor] = pool
            if projection:
                classes.setdefault(projection, Projection)
                if is_widened(tensor, pool.dtype):
                    classes[projection] = Widened
        for projection, kind in classes.items():
            inner[projection] = kind(inner[projection])
        for name, child in inner.children().items():
            if name not in classes:  # The model may use it, as its switch layer's.
                self[name] = child

    def look_ahead(self, following: StreamedExperts, router: Router) -> None:
        """Makes this layer guess which experts `following`, the next layer, needs, and read them where that pays.

        The guess applies the next layer's router to this layer's input. This layer's experts and the next attention add
        little to the residual in between, and the two norms are treated as equal.

        router: the next layer's.
        """
        units = following.units
        self.ahead = LookAhead(units, router, lambda scores, needed: likeliest(scores, units, needed.shape[-1]))

    def follow_slots(self) -> None:
        """Takes the arrays of the slots, which are new after `Units.resize`. Experts are then looked up again."""
        if self._followed is self.units.held:
            return
        self._slot_of = None
        for name, pool in self.units.pools.items():
            projection, _, tensor = name.rpartition(".")
            holder = self._inner[projection] if projection else self._inner
            (holder._inner if isinstance(holder, Projection) else holder)[tensor] = pool
        self._followed = self.units.held  # Last, so that an interrupt leaves no layer with some old arrays.

    @property
    def experts(self) -> int:
        return self.units.count

    def __call__(self, x: mx.array, indices: mx.array, *rest: mx.array) -> mx.array:
        """rest: further arguments of the zoo's layer, one number per (token, expert) pair, (..., K) each."""
        many = indices.size >= SORTED_FROM
        units, ahead = self.units, None if many else self.ahead
        units.shared.before_layer(x)
        self.follow_slots()
        expert_by_expert = many and kernels_vary()
        if units.all_resident and not expert_by_expert:  # Then experts no longer move, and no id is read back.
            if self._slot_of is None:
                self._slot_of = mx.array(units.slot_of.astype(np.uint32))
                mx.eval(self._slot_of)
                units.shared.evaluate_guarded()
            return self._inner(x, self._slot_of[indices], *rest)
        guess = ahead.guess(x) if ahead is not None else None
        if guess is not None:
            mx.eval(indices, guess)
        needed = to_numpy(indices)  # the layer's one read-back

        def prefetch() -> None:
            if ahead is not None and guess is not None:
                ahead.prefetch(guess, needed)

        return self.outputs(x, needed, rest, many, prefetch)

    def outputs(
        self,
        x: mx.array,
        needed: np.ndarray,
        rest: Sequence[mx.array],
        many: bool,
        meanwhile: Callable[[], None] = lambda: None,
    ) -> mx.array:
        """The outputs for ids that are on the host: x (..., D), needed (..., K) -> (..., K, D).

        many: whether the call of the model has at least SORTED_FROM pairs. meanwhile: called when the reads have begun.
        """
        units, expert_by_expert = self.units, many and kernels_vary()
        if not many and (slots := units.look_up(needed)) is not None:
            meanwhile()
            y = self._inner(x, mx.array(slots), *rest)
            units.guard(y)
            return y
        experts = np.unique(needed)
        if len(experts) and experts[-1] >= self.experts:  # some routers have a number for "none"
            raise skips_experts(experts[-1], self.experts)
        outputs, order = [], []
        for group in units.use(experts, at_once=EXPERTS_AT_ONCE if many else None, meanwhile=meanwhile):
            if len(group) == len(experts) and not expert_by_expert:
                y = self._inner(x, mx.array(units.slot_of[needed].astype(np.uint32)), *rest)
                units.guard(y)
                return y
            members, y = self._of_group(x, needed, group, expert_by_expert, rest)
            units.guard(y)
            outputs.append(y)
            order.append(members)
        back = np.argsort(np.concatenate(order)).astype(np.int32)
        return mx.concatenate(outputs)[mx.array(back)].reshape(*needed.shape, -1)

    def _of_group(
        self, x: mx.array, needed: np.ndarray, group: np.ndarray, expert_by_expert: bool, rest: Sequence[mx.array]
    ) -> tuple[np.ndarray, mx.array]:
        """The (token, expert) pairs with experts of `group`: their indices (n,), and their outputs (n, D)."""
        pairs, choices = needed.reshape(-1), needed.shape[-1]
        in_group = np.zeros(self.experts, np.bool_)
        in_group[group] = True
        members = np.flatnonzero(in_group[pairs])
        slots = self.units.slot_of[pairs[members]]
        by_slot = np.argsort(slots, kind="stable")
        members, slots = members[by_slot], slots[by_slot]
        tokens = x.reshape(-1, x.shape[-1])[mx.array((members // choices).astype(np.int32))]  # (n, D)
        chosen = [each.reshape(-1)[mx.array(members.astype(np.int32))] for each in rest]  # (n,) each
        return members, (by_expert if expert_by_expert else by_pair)(self._inner, tokens, slots, *chosen)


def skips_experts(chosen: int, experts: int) -> UnsupportedModelError:
    """The error for an expert that a layer does not have. experts: how many it has."""
    return UnsupportedModelError(
        f"the model's router chose expert {chosen}, but its layer has only {experts}. A model whose router may skip "
        "experts cannot be streamed."
    )


def likeliest(scores: np.ndarray, units: ExpertSlots, choices: int) -> np.ndarray:
    """The experts to prefetch, among the `choices` likeliest of each token. scores: float32 (..., E).

    These are the experts in slots, which must stay, and then the likeliest missing ones, which are worth reading. The
    result has at most as many experts as there are slots.
    """
    tokens = scores.reshape(-1, scores.shape[-1])  # (N, E)
    by_rank = np.argsort(-tokens, axis=1)[:, :choices].T.ravel()
    likely = by_rank[np.sort(np.unique(by_rank, return_index=True)[1])] if len(tokens) > 1 else by_rank
    here = units.slot_of[likely] >= 0
    count = max(1, int(AHEAD * choices))
    return np.concatenate((likely[here], likely[~here][:count]))[: units.cache.slots]
