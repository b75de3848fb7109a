"""A store's neurons over several ranks: what a rank has room for, and which run of every layer's blocks it holds."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import mlx.core as mx
import numpy as np

from ..defaults import THREADS
from ..errors import UsageError
from ..flash.files import CHECKSUM_BYTES, Manifest, NeuronLayout
from ..flash.system import READ_ALIGNMENT, usable_memory_bytes
from ..layers.ranked_neurons import NEURONS
from .memory_needs import InputShape
from .options import LoadOptions
from .plan import MIN_SLOTS, MLX_CACHE_BYTES, Demand, Plan, PlanNotes, distribute_slots, make_plan
from .rank_questions import this_host
from .rank_shares import Capacity, described, units_of_layers, units_of_ranks
from .ranked_loading import Ranks
from .streaming_needs import neurons_need, process_bytes, reading_bytes, scratch_bytes
from .unit_rates import RatesOfFiles

BATCHES, BATCH_BYTES = 32, 4 << 20  # of the trial that measures a disk's rate


@dataclass(frozen=True)
class DividedNeurons:
    """counts: how many blocks of every layer each rank holds; the first ones are rank 0's, and so on. need: see
    `distribute_slots`."""

    counts: list[int]
    need: list[float]

    def of(self, rank: int) -> range:
        """The blocks of every layer that a rank holds."""
        return [range(*run) for run in pairwise([0, *accumulate(self.counts)])][rank]

    def slots(self, rank: int, total: int) -> tuple[int, ...]:
        """A rank's slots of each layer. total: of all layers."""
        held = len(self.of(rank))
        return distribute_slots(total, self.need, min(MIN_SLOTS, held), held)


def divide_neurons(
    ranks: Ranks, manifest: Manifest, plan: Plan, need: Sequence[float], folder: Path, options: LoadOptions
) -> tuple[Plan, DividedNeurons]:
    """Asks the other ranks what they offer, and divides the blocks.

    plan: rank 0's, as if it were alone; the plan that is returned has the slots of its share. need: see
    `distribute_slots`. Raises FlashError.
    """
    layout = manifest.layout
    if ranks.group.size > layout.blocks:
        raise UsageError(f"there are {ranks.group.size} ranks, but a layer has only {layout.blocks} blocks to share.")
    own = neuron_capacity(folder, layout, sum(plan.slots), plan.budget, options)
    found = ranks.capacities(own, NEURONS, folder, taken=max(0, plan.total - plan.demand.process))
    wanted = units_of_ranks(layout.layers * layout.blocks, found)
    (counts,) = units_of_layers([layout.blocks], [each / layout.layers for each in wanted])
    divided = DividedNeurons(counts, list(need))
    lines = tuple(described(ranks.group.names, found, [counts] * layout.layers, "blocks of neurons"))
    notes = replace(plan.notes, slots=f"{plan.notes.slots}, of rank 0's share")
    return replace(plan, slots=divided.slots(0, own.slots), notes=notes, ranks=lines), divided


def neuron_capacity(folder: Path, layout: NeuronLayout, slots: int, budget: int, options: LoadOptions) -> Capacity:
    """What this rank offers. slots: those of all layers that its plan has. Raises ReadError."""
    alone = slots >= layout.layers * layout.blocks
    return Capacity(this_host(), budget, slots, 0.0 if alone else _rate(folder, layout, options))


def _rate(folder: Path, layout: NeuronLayout, options: LoadOptions) -> float:
    """Bytes per second of blocks that are read as tokens read them: from anywhere in a layer. Raises ReadError."""
    random = np.random.default_rng(0)
    count = max(1, min(layout.blocks, BATCH_BYTES // layout.block_bytes))
    batches = []
    for layer in random.integers(layout.layers, size=BATCHES):
        blocks = np.sort(random.choice(layout.blocks, count, replace=False))
        offsets = layer * layout.layer_bytes + blocks * layout.block_bytes
        batches.append(np.stack([0 * offsets, offsets, 0 * offsets + layout.block_bytes], axis=1))
    with contextlib.closing(RatesOfFiles([folder / Manifest.neurons_file], options)) as disk:
        return disk.rate("neurons", batches, 1).bytes_per_second


def exchanged_bytes(layout: NeuronLayout, tokens: int, ranks: int) -> int:
    """The memory that a call's exchange takes: its input, its output and that of every rank, as arrays and as the bytes
    of messages."""
    return 2 * (ranks + 2) * tokens * layout.width * mx.float32.size


def plan_of_share(manifest: Manifest, biases: int, options: LoadOptions, sharing: int, taken: int, size: int) -> Plan:
    """The plan of a rank that holds nothing but neurons.

    biases: their bytes. sharing: number of ranks that plan at the same time on this machine. taken: bytes that rank 0
    will allocate on it. size: number of all ranks. Raises BudgetError.
    """
    layout = manifest.layout
    tokens = max(options.prefill_chunk, options.parallel * manifest.decode_tokens)
    need = neurons_need(layout, manifest.decode_tokens)
    calls = [InputShape(count, layout.width, mx.float32.size, 1) for count in (manifest.decode_tokens, tokens)]
    work = exchanged_bytes(layout, tokens, size) + max(map(need, calls))
    aligned = layout.block_bytes % READ_ALIGNMENT == 0
    sums = 2 * layout.layers * layout.blocks * CHECKSUM_BYTES
    work += scratch_bytes(layout) + sums + reading_bytes(options.threads or THREADS, aligned)
    demand = Demand(
        process=process_bytes(),
        resident=biases,
        predictors=0,
        kv_cache=0,
        workspace=MLX_CACHE_BYTES + work,
    )
    free = max(0, usable_memory_bytes() - taken) // sharing
    notes = PlanNotes("biases", "none: rank 0 selects the neurons")
    slot_bytes = layout.block_bytes
    return make_plan(demand, layout, slot_bytes, options.budget, free, 0, True, notes=notes, prompt_caches=0)
