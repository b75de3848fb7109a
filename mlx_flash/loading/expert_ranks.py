"""A mixture's experts over several ranks: what a rank has room for, who holds what, and the layers of a share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import numpy as np

from ..defaults import THREADS
from ..errors import UsageError
from ..flash.experts import ExpertSlots
from ..flash.in_place import InPlaceFiles, TensorParts
from ..flash.system import usable_memory_bytes
from ..layers.expert_shares import ExpertShares
from ..layers.ranked_experts import RankedExperts
from ..source.zoos import MLX_VLM, mlx_vlm_is_installed, zoo_of
from .forecast import experts_rate
from .in_place_model import InPlaceModel, module_at, parent_of
from .in_place_plan import InPlacePlan, WeightBytes
from .memory_needs import InputShape
from .options import LoadOptions
from .plan import MLX_CACHE_BYTES, Demand, Plan, PlanNotes, plan_for_budget
from .rank_questions import this_host
from .rank_shares import Capacity, described, slots_of_layers, units_of_layers, units_of_ranks
from .ranked_loading import Ranks
from .streaming_needs import experts_need, process_bytes, reading_bytes

COPIES = 4  # of the outputs of a call's pairs: in messages, as arrays, one after another, and in the model's order


@dataclass(frozen=True)
class DividedExperts:
    """plan: that of rank 0. counts: for each layer, how many experts each rank holds."""

    plan: InPlacePlan
    counts: list[list[int]]

    @property
    def shares(self) -> list[ExpertShares]:
        return [ExpertShares(counts) for counts in self.counts]


def divide_experts(
    ranks: Ranks, mixture: InPlaceModel, plan: InPlacePlan, choices: int, options: LoadOptions, zoo: str | None
) -> DividedExperts:
    """Asks the other ranks what they offer, and divides the experts.

    plan: rank 0's, as if it were alone. choices: number of experts that a token names. zoo: see `open_in_place`.
    Raises FlashError.
    """
    layers = experts_of_layers(mixture)
    if ranks.group.size > min(layers):
        raise UsageError(f"there are {ranks.group.size} ranks, but a layer has only {min(layers)} experts to share.")
    own = capacity(mixture, sum(plan.expert_slots), plan.budget, choices, options)
    taken = max(0, plan.total - plan.demand.process)
    folder = mixture.files[0].parent
    of_vlm = options.images or MLX_VLM in (zoo, zoo_of(mixture.config))
    more = {"choices": choices, "zoo": zoo, "taken": taken, "mlx-vlm": mlx_vlm_version() if of_vlm else None}
    found = ranks.capacities(own, "experts", folder, **more)
    counts = units_of_layers(layers, units_of_ranks(sum(layers), found))
    slots = tuple(slots_of_layers(own.slots, [each[0] for each in counts]))
    changed: dict[str, Any] = {
        "expert_slots": slots,
        "ranks": tuple(described(ranks.group.names, found, counts, "experts")),
    }
    if not plan.layer_bytes_per_token:
        changed |= {"slots": slots, "notes": replace(plan.notes, slots=", of rank 0's share")}
    return DividedExperts(replace(plan, **changed), counts)


def capacity(mixture: InPlaceModel, slots: int, budget: int, choices: int, options: LoadOptions) -> Capacity:
    """What this rank offers. slots: those of all layers that its plan has. Raises ReadError."""
    alone = slots >= sum(experts_of_layers(mixture))
    rate = 0.0 if alone else experts_rate(mixture, min(choices, slots), options)
    return Capacity(this_host(), budget, slots, rate)


def compare_zoo(theirs: str | None) -> None:
    """theirs: rank 0's version of mlx-vlm; None if it does not build the model. Raises UsageError."""
    if theirs is not None and (own := mlx_vlm_version()) != theirs:
        raise UsageError(f"rank 0 has mlx-vlm {theirs}, which builds the model, and this rank has {own}.")


def mlx_vlm_version() -> str:
    return version("mlx-vlm") if mlx_vlm_is_installed() else "none"


def exchange_bytes(mixture: InPlaceModel, options: LoadOptions, choices: int) -> int:
    """The memory that the outputs of a call take beside those of one rank alone."""
    calls = [largest_call(tensors, options, choices) for tensors in mixture.switches.values()]
    return max(COPIES * call.tokens * call.choices * call.width * call.item_bytes for call in calls)


def largest_call(tensors: dict[str, TensorParts], options: LoadOptions, choices: int) -> InputShape:
    """At least the input of a prompt's chunk, or of all answers' tokens. tensors: of a layer, see `InPlaceModel`."""
    floats = [tensor.dtype.size for tensor in tensors.values() if mx.issubdtype(tensor.dtype, mx.floating)]
    item_bytes = mx.float32.size if mx.default_device() == mx.cpu else max(floats, default=mx.float16.size)
    width = max(tensor.shape[0] for tensor in tensors.values() if tensor.shape)  # of the layer, or within an expert
    return InputShape(max(options.prefill_chunk, options.parallel), width, item_bytes, choices)


def plan_of_share(mixture: InPlaceModel, options: LoadOptions, choices: int, sharing: int, taken: int) -> Plan:
    """The plan of a rank that holds nothing but experts.

    sharing: number of ranks that plan at the same time on this machine. taken: bytes that rank 0 will allocate on it.
    Raises BudgetError.
    """
    drops_late, layers = mx.default_device() != mx.cpu, mixture.switches.values()
    work = max(experts_need(tensors, drops_late)(largest_call(tensors, options, choices)) for tensors in layers)
    work += exchange_bytes(mixture, options, choices)
    demand = Demand(
        process=process_bytes(),
        resident=mixture.table_bytes,
        predictors=0,
        kv_cache=0,
        workspace=MLX_CACHE_BYTES + work + reading_bytes(options.threads or THREADS, aligned=False),
    )
    weights = WeightBytes.of(mixture)
    free = max(0, usable_memory_bytes() - taken) // sharing
    notes = PlanNotes("experts' vectors", "none: rank 0's router chooses")
    units, budget = weights.expert_units, options.budget
    return plan_for_budget(demand, units, weights.expert, budget, free, 0, notes=notes, prompt_caches=0)


def stream_shares(
    mixture: InPlaceModel, shared: InPlaceFiles, divided: DividedExperts, ranks: Ranks, options: LoadOptions
) -> None:
    """Replaces every switch layer of rank 0's model with one that calls the other ranks."""
    shares, slots = divided.shares, divided.plan.expert_slots
    for number, (path, module, units) in enumerate(held_of(mixture, shared, shares, 0, slots, options.window)):
        parent, name = parent_of(mixture.model, path)
        last = number + 1 == len(shares)
        parent[name] = RankedExperts(module, units, number, last, shares[number], ranks.group)


def held_of(
    mixture: InPlaceModel,
    shared: InPlaceFiles,
    shares: Sequence[ExpertShares],
    rank: int,
    slots: Sequence[int],
    window: int | None,
) -> Iterator[tuple[str, Any, ExpertSlots]]:
    """Yields (path in the model, the zoo's module, the rank's share of its experts) of every layer of experts.

    slots: of each layer.
    """
    for (path, tensors), of_layer, count in zip(mixture.switches.items(), shares, slots, strict=True):
        units = ExpertSlots(shared, parts_of_experts(tensors, of_layer.of(rank)), count, window, path)
        shared.layers[path] = tensors  # Errors name experts by their ids in the model.
        yield path, module_at(mixture.model, path), units


def parts_of_experts(tensors: dict[str, TensorParts], experts: np.ndarray) -> dict[str, TensorParts]:
    """The places of some of a layer's experts, int (n,)."""
    return {
        name: replace(tensor, file_of=tensor.file_of[experts], offsets=tensor.offsets[experts])
        for name, tensor in tensors.items()
    }


def experts_of_layers(mixture: InPlaceModel) -> list[int]:
    return [len(next(iter(tensors.values())).offsets) for tensors in mixture.switches.values()]
