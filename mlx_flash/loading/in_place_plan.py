"""Divides a budget for a checkpoint that is run as it is: which of its experts and layers are in memory.

Experts go first: they are read where not all of them fit. A token needs every other weight, so these stay in memory as
long as every layer keeps the fewest experts beside them. Where they do not, whole layers are read as well.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ..errors import BudgetError
from ..flash.layer_ring import BUFFERS
from .expert_files import Mixture
from .layer_weights import spread
from .plan import ENDLESS, Demand, Plan, UnitCounts

LAYERS = "layers"


@dataclass(frozen=True)
class WeightBytes:
    """The sizes of a checkpoint's weights, in bytes."""

    outside: list[int]  # every tensor that is never streamed
    layers: list[int]  # every layer's tensors that can be streamed
    buffer: int  # a buffer that holds any of the layers
    expert: int  # one expert
    expert_layers: int
    experts: int  # of each layer
    tables: int  # the experts' vectors, such as biases, which stay in memory

    @staticmethod
    def of(mixture: Mixture) -> WeightBytes:
        in_layers = {name for layer in mixture.layers for name in layer.names()}
        return WeightBytes(
            outside=[array.nbytes for name, array in mixture.resident() if name not in in_layers],
            layers=[sum(tensor.nbytes for tensor in layer.tensors) for layer in mixture.layers],
            buffer=max((layer.nbytes for layer in mixture.layers), default=0),
            expert=mixture.expert_bytes,
            expert_layers=len(mixture.switches),
            experts=mixture.experts,
            tables=mixture.table_bytes,
        )

    @property
    def resident(self) -> list[int]:
        """The tensors in memory if only experts are streamed; a layer counts as one."""
        return [*self.outside, *self.layers]

    @property
    def all_experts(self) -> int:
        return self.expert_layers * self.experts * self.expert

    @property
    def expert_units(self) -> UnitCounts:
        return UnitCounts(self.expert_layers, self.experts, 1, "experts of each layer")

    @property
    def layer_units(self) -> UnitCounts:
        return UnitCounts(1, len(self.layers), min(BUFFERS, len(self.layers)), LAYERS)


@dataclass(frozen=True)
class InPlacePlan(Plan):
    """A plan for experts and layers.

    expert_slots: number of slots of each layer of experts. pinned: number of layers that are in memory all the time.
    layer_bytes_per_token: bytes of the other layers, which every token reads. proposed_bytes: bytes of the units that
    `bytes_for` counts.
    """

    expert_slots: tuple[int, ...] = ()
    pinned: int = 0
    layer_bytes_per_token: int = 0
    proposed_bytes: int = 0

    def bytes_for(self, share: float) -> int:
        return max(self.smallest, self.everything - int((1 - share) * self.proposed_bytes))


Divided = Callable[[UnitCounts, Demand, int, str, "int | None"], Plan]
"""Makes a plan for units, a demand, the bytes of a slot, a note about resident weights, and a budget."""


def divide_in_place(
    divided: Divided, weights: WeightBytes, demand: Demand, choices: int, budget: int | None
) -> InPlacePlan:
    """The plan for a budget.

    demand: with every weight resident but the experts. choices: number of experts that a token names in a layer.
    Raises BudgetError.
    """
    if not weights.expert_layers:
        return _of_layers(divided, weights, demand, 0, budget)
    note = "attention, routers, shared experts, embeddings"
    units, smallest = weights.expert_units, 0
    if len(weights.layers) > BUFFERS:
        smallest = _of_layers(divided, weights, demand, 1, ENDLESS).smallest
    try:
        plan = divided(units, demand, weights.expert, note, budget)
    except BudgetError as error:
        if not smallest:
            raise
        everything = error.full_bytes
    else:
        everything, least = plan.everything, min(plan.smallest, smallest) if smallest else plan.smallest
        return _in_place(
            plan,
            smallest=least,
            expert_slots=plan.slots,
            pinned=len(weights.layers),
            proposed_bytes=weights.all_experts,
        )
    try:
        found = _of_layers(divided, weights, demand, min(max(1, choices), weights.experts), budget)
    except BudgetError:
        try:
            found = _of_layers(divided, weights, demand, 1, budget)
        except BudgetError as error:
            full = max(everything, error.smallest_bytes)
            raise BudgetError(str(error), error.smallest_bytes, full, error.units_bytes) from None
    return replace(found, smallest=smallest, everything=max(everything, smallest))


def _of_layers(divided: Divided, weights: WeightBytes, demand: Demand, slots: int, budget: int | None) -> InPlacePlan:
    """The plan for streamed layers, whose experts have `slots` slots in each layer."""
    experts = slots * weights.expert_layers * weights.expert
    demand = replace(demand, resident=demand.resident - sum(weights.layers) + experts)
    note = "embeddings, output head, norms"
    if experts:
        note += f", {slots} of {weights.experts} experts of each layer"
    if not weights.layers:  # the model does not call its layers one by one
        units, slot_bytes = UnitCounts(1, 1, 1, "models"), 1
    else:
        units, slot_bytes = weights.layer_units, weights.buffer
    plan = divided(units, demand, slot_bytes, note, budget)
    held = sum(plan.slots)
    pinned = held if held == units.per_layer else held - BUFFERS
    return _in_place(
        plan,
        expert_slots=(slots,) * weights.expert_layers,
        pinned=pinned,
        layer_bytes_per_token=sum(size for _, size in spread(weights.layers, pinned)),
        proposed_bytes=weights.all_experts or units.per_layer * slot_bytes,
    )


def _in_place(plan: Plan, **fields: object) -> InPlacePlan:
    values = {name: getattr(plan, name) for name in Plan.__dataclass_fields__}
    return InPlacePlan(**{**values, **fields})  # type: ignore[arg-type]
