"""The experts of a mixture-of-experts layer, in slots: mlx-lm's own products over slot numbers instead of ids."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..flash.experts import ExpertSlots
from ..flash.host_arrays import to_numpy
from .expert_products import Widened, by_expert, by_pair, is_widened, kernels_vary
from .lookahead_trial import LookAheadTrial

SORTED_FROM = 64  # (token, expert) pairs from which mlx-lm's switch layers sort them
EXPERTS_AT_ONCE = 16  # of a prompt, multiplied while as many are read
AHEAD = 0.25  # of the experts that a token uses, as many are read on a guess; at least one (bench/RESULTS.md)


class StreamedExperts(nn.Module):
    """Takes the place of a `SwitchGLU` or `SwitchMLP` of mlx-lm. x: (..., D), indices: (..., K) -> (..., K, D).

    The router has chosen: every expert that it named is used, whatever is in the cache. How a (token, expert) pair is
    computed never depends on the cache either. For a few tokens it is computed as in mlx-lm, and so it is for a prompt
    on MLX's CPU backend; on Metal a prompt's products go expert by expert (expert_products.py).
    """

    def __init__(self, inner: nn.Module, stream: ExpertSlots) -> None:
        """inner: the layer whose place this takes. stream: its tensors are named `projection.tensor`, as inner's."""
        super().__init__()
        self._inner = inner
        self.units = stream
        self._slot_of: mx.array | None = None  # (E,), once all experts are resident
        self.ahead: LookAhead | None = None
        for name, pool in stream.pools.items():
            projection, tensor = name.rsplit(".", 1)
            inner[projection][tensor] = pool
            if is_widened(tensor, pool.dtype):
                inner[projection] = Widened(inner[projection])

    def look_ahead(self, following: StreamedExperts, router: nn.Module, trial: LookAheadTrial, leads: bool) -> None:
        """From now on, guesses what `following`, the next layer, will need, and starts to read it, where that pays.

        router: of the next layer, x (..., D) -> scores (..., E). trial: the model's. leads: whether this layer tells it
        when a token begins.
        """
        self.ahead = LookAhead(following.units, router, trial, leads)

    @property
    def experts(self) -> int:
        return self.units.experts

    def settle(self) -> None:
        """Evaluates what still reads this layer's slots."""
        self.units.settle()

    def __call__(self, x: mx.array, indices: mx.array) -> mx.array:
        many = indices.size >= SORTED_FROM
        stream, ahead = self.units, None if many else self.ahead
        expert_by_expert = many and kernels_vary()
        if ahead is not None and ahead.leads:
            ahead.trial.token()
        if stream.all_resident and not expert_by_expert:  # then nothing moves any more, and nobody needs to know
            if self._slot_of is None:
                self._slot_of = mx.array(stream.cache.slot_of.astype(np.uint32))
                mx.eval(self._slot_of)
                stream.settle()
            return self._inner(x, self._slot_of[indices])
        scores = ahead.scores(x) if ahead is not None else None
        if scores is not None:
            mx.eval(indices, scores)
        needed = to_numpy(indices)  # the layer's one read-back
        stream.settle()  # as a rule evaluated by that already; kept, every layer's output of a chunk would add up
        experts = np.unique(needed)
        stream.use(experts)
        rounds = self.rounds(experts, needed.size)

        def guess() -> None:
            if ahead is not None and scores is not None:
                ahead.begin(to_numpy(scores), needed.shape[-1])

        if len(rounds) > 1 or expert_by_expert:
            return self._in_rounds(x, needed, rounds, guess, expert_by_expert)
        stream.begin(experts)
        guess()
        stream.land(experts)
        y = self._inner(x, mx.array(stream.cache.slot_of[needed].astype(np.uint32)))
        stream.hold(y)
        return y

    def rounds(self, experts: np.ndarray, pairs: int) -> list[np.ndarray]:
        """`experts` in groups that are multiplied one after the other, each while the next one is read: those that are
        here first. A group and the next one fit into the slots, if there is more than one of them."""
        cache = self.units.cache
        here = cache.slot_of[experts] >= 0
        present, missing = experts[here], experts[~here]
        half = max(1, cache.slots // 2)
        if len(experts) > cache.slots:
            by_turn = np.concatenate((present, missing))
            return [by_turn[i : i + half] for i in range(0, len(by_turn), half)]
        at_once = len(missing) if pairs < SORTED_FROM else min(half, EXPERTS_AT_ONCE)
        groups = [missing[i : i + at_once] for i in range(0, len(missing), max(1, at_once))]
        return [present, *groups] if len(present) else groups

    def _in_rounds(
        self,
        x: mx.array,
        needed: np.ndarray,
        rounds: list[np.ndarray],
        guess: Callable[[], None],
        expert_by_expert: bool,
    ) -> mx.array:
        """Group by group, the next one read meanwhile. guess: called when the last one is on its way."""
        stream, cache = self.units, self.units.cache
        pairs, choices = needed.reshape(-1), needed.shape[-1]
        rows = x.reshape(-1, x.shape[-1])  # (N, D)
        turn_of = np.zeros(cache.slot_of.shape, np.int64)
        for turn, group in enumerate(rounds):
            turn_of[group] = turn
        turns = turn_of[pairs]
        outputs, order = [], []
        stream.begin(rounds[0])
        for turn, group in enumerate(rounds):
            stream.land(group)
            following = rounds[turn + 1] if turn + 1 < len(rounds) else np.empty(0, group.dtype)
            overlaps = 0 < len(following) <= cache.slots - len(group)
            if overlaps:
                stream.begin(following, keep=group)
                if turn + 2 == len(rounds):
                    guess()
            members = np.flatnonzero(turns == turn)
            slots = cache.slot_of[pairs[members]]
            by_slot = np.argsort(slots, kind="stable")
            members, slots = members[by_slot], slots[by_slot]
            tokens = rows[mx.array((members // choices).astype(np.int32))]  # (n, D)
            if expert_by_expert:
                y = by_expert(self._inner, tokens, slots)
            else:
                y = by_pair(self._inner, tokens, slots, sorted_indices=pairs.size >= SORTED_FROM)
            if len(rounds) > 1:
                mx.eval(y)
            else:
                stream.hold(y)
            outputs.append(y)
            order.append(members)
            if len(following) and not overlaps:
                stream.begin(following)
        back = np.argsort(np.concatenate(order)).astype(np.int32)
        return mx.concatenate(outputs)[mx.array(back)].reshape(*needed.shape, -1)


@dataclass
class LookAhead:
    """A guess of what the next layer's router will choose, by that router on this layer's input.

    This layer's experts and the next attention add little to the residual in between; the norms are taken as equal.
    """

    stream: ExpertSlots  # of the next layer
    router: nn.Module
    trial: LookAheadTrial
    leads: bool  # tells `trial` when a token begins

    def scores(self, x: mx.array) -> mx.array | None:
        """x: (..., D), this layer's input -> float32 (..., E) of the next; None where there is no use for them."""
        if self.stream.all_resident or not self.trial.guessing:
            return None
        scores: mx.array = self.router(x).astype(mx.float32)
        return scores

    def begin(self, scores: np.ndarray, choices: int) -> None:
        """Starts to read the likeliest of what is missing among the `choices` likeliest of each token."""
        tokens = scores.reshape(-1, scores.shape[-1])  # (N, E)
        by_rank = np.argsort(-tokens, axis=1)[:, :choices].T.ravel()
        likeliest = by_rank[np.sort(np.unique(by_rank, return_index=True)[1])] if len(tokens) > 1 else by_rank
        here = self.stream.cache.slot_of[likeliest] >= 0
        count = max(1, int(AHEAD * choices))
        self.stream.read_ahead(likeliest[~here][:count], keep=likeliest[here])
