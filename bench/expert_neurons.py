"""Replays which neurons fire inside chosen experts: what slots of experts, neurons or blocks find, and what is read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_flash.flash.slot_cache import HALF_LIFE, SlotCache

from .eviction import WARM_UP
from .ordering import by_frequency, by_pairs, missed, original
from .tools import policies

BLOCKS = (1, 4, 16)  # neurons in a block
SPLITS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)  # share of the memory that the deciding matrices have
COPY_BITS = 3.5  # per weight, of a predictor that is a copy of the deciding matrix; scales and biases included
STORED_BITS = (16, 8.5, 4.5)  # per weight, of the experts themselves

WHOLE = "whole experts"


@dataclass(frozen=True)
class ExpertTrace:
    """The experts that a layer's tokens chose, and the neurons that fired inside them.

    experts: int (T, K). active: bool (T, K, F). count: E. parts: the matrices of an expert, of which the first decides.
    """

    layer: int
    experts: np.ndarray
    active: np.ndarray
    count: int
    parts: int

    @property
    def size(self) -> int:
        """F"""
        return int(self.active.shape[2])

    @property
    def chosen(self) -> np.ndarray:
        """bool (T, E)"""
        mask = np.zeros((len(self.experts), self.count), bool)
        np.put_along_axis(mask, self.experts, True, axis=1)
        return mask

    def of_expert(self, expert: int) -> np.ndarray:
        """The neurons that fired at each use of the expert. bool (uses, F)"""
        return self.active[self.experts == expert]

    def blocks(self, orders: np.ndarray, neurons: int) -> np.ndarray:
        """The blocks of every expert with a neuron that fired, `neurons` in storage order to a block. bool (T, E * B)

        orders: int (E, F), each expert's neurons in storage order.
        """
        stored = np.take_along_axis(self.active, orders[self.experts], axis=2)
        touched = np.logical_or.reduceat(stored, np.arange(0, self.size, neurons), axis=2)  # (T, K, B)
        mask = np.zeros((len(self.experts), self.count, touched.shape[2]), bool)
        mask[np.arange(len(mask))[:, None], self.experts] = touched
        return mask.reshape(len(mask), -1)


# -- the zeros ------------------------------------------------------------------------------------------------


def zeros(trace: ExpertTrace) -> dict[str, float]:
    """What is exactly zero inside chosen experts, and how well an expert's last use predicts this one.

    again: share of the neurons that fire which also fired at the expert's last use. again_by_chance: the same with the
    uses shuffled, which is the effect of popularity alone.
    """
    rng = np.random.default_rng(0)
    again, by_chance, fired = 0, 0, 0
    for expert in range(trace.count):
        uses = trace.of_expert(expert)
        shuffled = rng.permutation(uses)
        again += int((uses[1:] & uses[:-1]).sum())
        by_chance += int((shuffled[1:] & shuffled[:-1]).sum())
        fired += int(uses[1:].sum())
    by_token = trace.active.mean(axis=(1, 2))
    return {
        "layer": trace.layer,
        "zeros": float(1 - trace.active.mean()),
        "zeros_of_the_densest_tenth": float(1 - np.quantile(by_token, 0.9)),
        "again": again / max(1, fired),
        "again_by_chance": by_chance / max(1, fired),
    }


def orders_of(known: ExpertTrace, order: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """Each expert's neurons in storage order, from its uses on calibration text. int (E, F)"""
    return np.stack([order(known.of_expert(expert)) for expert in range(known.count)])


def touched(held_out: list[ExpertTrace], known: list[ExpertTrace]) -> list[dict[str, Any]]:
    """The share of a chosen expert's blocks that have a neuron that fires, by size and storage order; mean of layers.

    The order "at random" is computed: every neuron fires independently, and as often as any other of its layer.
    """
    rows = []
    for neurons in BLOCKS[1:]:
        row: dict[str, Any] = {"neurons": neurons}
        row["at random"] = float(np.mean([1 - (1 - trace.active.mean()) ** neurons for trace in held_out]))
        for name, order in {"original": original, "frequency": by_frequency, "pairs": by_pairs}.items():
            shares = []
            for trace, calibration in zip(held_out, known, strict=True):
                mask = trace.blocks(orders_of(calibration, order), neurons)
                blocks_of_token = trace.experts.shape[1] * mask.shape[1] / trace.count
                shares.append(mask.sum(axis=1).mean() / blocks_of_token)
            row[name] = float(np.mean(shares))
        rows.append(row)
    return rows


# -- the ways to hold them in memory ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Reads:
    """What a way reads for each (token, expert) pair, P in all.

    whole: bool (P,), whether the expert is read whole. deciding: bool (P,), whether its deciding matrix is read.
    blocks: float (P,), the share of its blocks that is read, each with `parts_of_block` parts of `neurons` neurons.
    found: the share of the neurons that fire of which every part is in memory.
    """

    way: str
    parts: int
    neurons: int
    parts_of_block: int
    whole: np.ndarray
    deciding: np.ndarray
    blocks: np.ndarray
    found: float

    @property
    def bytes(self) -> float:
        """The bytes read, of the bytes of a token's experts."""
        parts = self.deciding.mean() + self.blocks.mean() * self.parts_of_block
        return float(self.whole.mean() + parts / self.parts)


def whole(trace: ExpertTrace, share: float) -> Reads:
    """Slots hold experts."""
    missing = missed(trace.chosen, max(1, round(share * trace.count)))
    pairs = of_pairs(trace, missing)[:, 0]
    return Reads(WHOLE, trace.parts, 1, 0, pairs, pairs & False, pairs * 0.0, found(trace, missing))


def known_beforehand(trace: ExpertTrace, orders: np.ndarray, neurons: int, share: float, way: str) -> Reads:
    """Slots hold blocks of whole neurons, and which neurons fire is known before any is read."""
    needed = trace.blocks(orders, neurons)
    missing = missed(needed, max(1, int(share * needed.shape[1])))
    blocks = of_pairs(trace, missing).mean(axis=1)
    served = found(trace, None, missing, orders, neurons)
    return Reads(way, trace.parts, neurons, trace.parts, blocks < 0, blocks < 0, blocks, served)


def exact(trace: ExpertTrace, orders: np.ndarray, neurons: int, share: float, split: float, way: str) -> Reads:
    """Deciding matrices have slots of their own, and are read whole; other slots hold blocks of the other matrices.

    split: the share of the memory that the deciding matrices have.
    """
    needed = trace.blocks(orders, neurons)
    deciding_slots, block_slots = slots_of(share, split, trace.count, needed.shape[1], trace.parts)
    undecided = missed(trace.chosen, deciding_slots)
    missing = missed(needed, block_slots)
    blocks = of_pairs(trace, missing).mean(axis=1)
    served = found(trace, undecided, missing, orders, neurons)
    pairs = of_pairs(trace, undecided)[:, 0]
    return Reads(way, trace.parts, neurons, trace.parts - 1, pairs & False, pairs, blocks, served)


def slots_of(share: float, split: float, experts: int, blocks: int, parts: int) -> tuple[int, int]:
    """The slots for deciding matrices and for blocks that fit into `share` of all experts' bytes, at least one each.

    What the deciding matrices do not fill is the blocks'.
    """
    deciding = min(experts, int(split * share * experts * parts))
    left = share * parts - deciding / experts  # in matrices of every expert
    return max(1, deciding), max(1, min(blocks, int(left / (parts - 1) * blocks)))


def best_split(known: list[ExpertTrace], share: float) -> float:
    """The split that reads the fewest bytes on calibration text, neuron by neuron."""
    plain = [orders_of(trace, original) for trace in known]

    def cost(split: float) -> float:
        return sum(exact(t, order, 1, share, split, "").bytes for t, order in zip(known, plain, strict=True))

    return min(SPLITS, key=cost)


def found(
    trace: ExpertTrace,
    missing_experts: np.ndarray | None,
    missing_blocks: np.ndarray | None = None,
    orders: np.ndarray | None = None,
    neurons: int = 1,
) -> float:
    """The share of the neurons that fire of which every part is in memory, after the warm-up.

    missing_experts: bool (T, E). missing_blocks: bool (T, E * B), with the orders and the neurons to a block.
    """
    here = trace.active.copy()  # (T, K, F)
    if missing_experts is not None:
        here &= ~np.take_along_axis(missing_experts, trace.experts, axis=1)[:, :, None]
    if missing_blocks is not None and orders is not None:
        absent = missing_blocks.reshape(len(trace.experts), trace.count, -1)
        absent = absent[np.arange(len(absent))[:, None], trace.experts]  # (T, K, B)
        place = np.argsort(orders, axis=1)[trace.experts] // neurons  # each neuron's block, (T, K, F)
        here &= ~np.take_along_axis(absent, place, axis=2)
    after = counted(len(here))
    return float(here[after].sum() / max(1, trace.active[after].sum()))


def of_pairs(trace: ExpertTrace, missing: np.ndarray) -> np.ndarray:
    """The missing units of every (token, expert) pair after the warm-up. bool (T, E * B) -> bool (P, B)"""
    of_expert = missing.reshape(len(missing), trace.count, -1)
    pairs = of_expert[np.arange(len(missing))[:, None], trace.experts]  # (T, K, B)
    return pairs[counted(len(missing))].reshape(-1, of_expert.shape[2])


def counted(tokens: int) -> slice:
    """The tokens after the warm-up, because caches begin empty."""
    return slice(min(WARM_UP, tokens // 2), None)


def compare(held_out: list[ExpertTrace], known: list[ExpertTrace], share: float) -> tuple[list[Reads], float]:
    """What every way reads in the same memory, `share` of all experts' bytes; means over the layers.

    Also returns the split of `exact`, which is chosen on calibration text.
    """
    split = best_split(known, share)
    ways: dict[str, list[Reads]] = {}

    def add(reads: Reads) -> None:
        ways.setdefault(reads.way, []).append(reads)

    for trace, calibration in zip(held_out, known, strict=True):
        add(whole(trace, share))
        orders = orders_of(calibration, by_pairs)
        for neurons in BLOCKS:
            what = "neurons" if neurons == 1 else f"blocks of {neurons}"
            add(exact(trace, orders, neurons, share, split, f"{what}, deciding matrix read whole"))
            add(known_beforehand(trace, orders, neurons, share, f"{what}, known beforehand"))
        for bits in STORED_BITS:
            left = share - COPY_BITS / bits / trace.parts
            if left > 0:
                add(known_beforehand(trace, orders, 1, left, by_copy(bits)))
    return [together(rows) for rows in ways.values()], split


def by_copy(bits: float) -> str:
    """The name of the way that knows the neurons by a copy, of experts stored in `bits` with their scales."""
    return f"neurons, known by a copy, of {bits:g} bits"


def together(rows: list[Reads]) -> Reads:
    """The reads of all layers."""
    return replace(
        rows[0],
        whole=np.concatenate([row.whole for row in rows]),
        deciding=np.concatenate([row.deciding for row in rows]),
        blocks=np.concatenate([row.blocks for row in rows]),
        found=float(np.mean([row.found for row in rows])),
    )


def by_rule(held_out: list[ExpertTrace], share: float) -> dict[str, dict[str, float]]:
    """Misses, of what a token needs, of three eviction rules, for slots of experts and of neurons: unit -> rule."""
    result: dict[str, dict[str, float]] = {}
    for unit in ("expert", "neuron"):
        misses: dict[str, list[float]] = {}
        for trace in held_out:
            mask = trace.chosen if unit == "expert" else trace.blocks(orders_of(trace, original), 1)
            units = mask.shape[1]
            slots = max(1, round(share * units))
            sets = [np.flatnonzero(row) for row in mask]
            after = counted(len(mask))
            needed = mask[after].sum()
            rules = {
                "least recent": policies.run(policies.least_recent(units, slots), sets),
                f"fading {HALF_LIFE}": policies.run(SlotCache(units, slots), sets),
                "clairvoyant": policies.clairvoyant(mask, slots),
            }
            for rule, of_token in rules.items():
                misses.setdefault(rule, []).append(float(of_token[after].sum() / max(1, needed)))
        result[unit] = {rule: float(np.mean(shares)) for rule, shares in misses.items()}
    return result
