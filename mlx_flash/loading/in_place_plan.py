"""Divides a budget for a checkpoint that is run as it is: which of its experts and layers are in memory.

Experts go first: they are read where not all of them fit. A token needs every other weight, so these stay in memory as
long as every layer keeps the fewest experts beside them. Where they do not, whole layers are read as well. The rows of
lookup tables are read unless everything is in memory: a token needs few of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from math import ceil

from ..errors import BudgetError
from ..flash.layer_ring import BUFFERS
from .in_place_model import InPlaceModel
from .layer_weights import spread
from .lookup_tables import Table, kept_bytes
from .plan import ENDLESS, Demand, Plan, UnitCounts

LAYERS = "layers"
KEPT = 2 / 3  # of a layer's experts; slots beyond are better spent on whole layers (bench/results/host.md)
SPARE_READS = 10  # a longer context may add one to so many layers that a token reads


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
    lookups: list[int] = field(default_factory=list)  # every tensor of lookup tables, if all rows are in memory
    rows_kept: int = 0  # rows of lookup tables that are kept at least, if the others are read
    rows_work: int = 0  # the rows of a prompt's chunk, likewise

    @staticmethod
    def of(mixture: InPlaceModel) -> WeightBytes:
        apart = mixture.of_tables().union(*(layer.names() for layer in mixture.layers))
        return WeightBytes(
            outside=[array.nbytes for name, array in mixture.resident() if name not in apart],
            layers=[sum(tensor.nbytes for tensor in layer.tensors) for layer in mixture.layers],
            buffer=max((layer.nbytes for layer in mixture.layers), default=0),
            expert=mixture.expert_bytes,
            expert_layers=len(mixture.switches),
            experts=mixture.experts,
            tables=mixture.table_bytes,
            lookups=[
                table.rows * tensor.nbytes for table in mixture.lookup_tables for tensor in table.tensors.values()
            ],
        )

    def with_rows_read(self, tables: Sequence[Table]) -> WeightBytes:
        """The sizes if the rows of the lookup tables are read."""
        work = sum(table.work_bytes for table in tables)
        return replace(self, lookups=[], rows_kept=kept_bytes(tables), rows_work=work)

    @property
    def resident(self) -> list[int]:
        """The tensors in memory if only experts and rows are streamed; a layer counts as one."""
        return [*self.outside, *self.lookups, *self.layers]

    @property
    def embeddings(self) -> str:
        """The resident weights at either end of a model, for notes."""
        return "output head" if self.rows_kept else "embeddings, output head"

    @property
    def everything(self) -> int:
        """Bytes of all weights."""
        return sum(self.resident) + self.tables + self.all_experts

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
    """A plan for experts, layers and rows of lookup tables.

    expert_slots: number of slots of each layer of experts. pinned: number of layers that are in memory all the time.
    layer_bytes_per_token: bytes of the other layers, which every token reads. proposed_bytes: bytes of the units that
    `bytes_for` counts. parameters_bytes: bytes of all weights of the checkpoint. chunks_at_once: number of a prompt's
    chunks that share a reading of the layers. reads_rows: whether rows of lookup tables are read. rows_saved: memory
    that this saves, or would save, in bytes.
    """

    expert_slots: tuple[int, ...] = ()
    pinned: int = 0
    layer_bytes_per_token: int = 0
    proposed_bytes: int = 0
    parameters_bytes: int = 0
    chunks_at_once: int = 1
    reads_rows: bool = False
    rows_saved: int = 0

    @property
    def spare_slots(self) -> int:
        """Of experts as of any units. A layer without a slot is read for every token, so few of them may go."""
        if self.units.name != LAYERS:
            return super().spare_slots
        return (self.units.per_layer - self.pinned) // SPARE_READS

    def bytes_for(self, share: float) -> int:
        saved = self.rows_saved if share < 1 else 0
        return max(self.smallest, self.everything - saved - int((1 - share) * self.proposed_bytes))


Divided = Callable[[UnitCounts, Demand, int, str, "int | None"], Plan]
"""Makes a plan for units, a demand, the bytes of a slot, a note about resident weights, and a budget."""


def divide_with_tables(
    divided: Divided,
    weights: WeightBytes,
    tables: Sequence[Table],
    demand_of: Callable[[WeightBytes], Demand],
    choices: int,
    budget: int | None,
) -> InPlacePlan:
    """The plan for a budget, which decides whether the rows of lookup tables are read.

    weights: with whole tables. tables: the lookup tables whose rows can be read. demand_of: the demand with every
    weight resident but the experts and the rows that are read. choices: see `divide_in_place`. Raises BudgetError.
    """
    demand = demand_of(weights)
    if not tables:
        return divide_in_place(divided, weights, demand, choices, budget)
    read = weights.with_rows_read(tables)
    demand_read = demand_of(read)
    saved = demand.total - demand_read.total
    smallest = divide_in_place(divided, read, demand_read, choices, ENDLESS).smallest
    try:
        whole = divide_in_place(divided, weights, demand, choices, budget)
    except BudgetError as error:
        everything = error.full_bytes
    else:
        everything = whole.everything
        if whole.layer_bytes_per_token == 0 and all(slots == weights.experts for slots in whole.expert_slots):
            return replace(whole, smallest=min(smallest, whole.smallest), rows_saved=saved)
    try:
        found = divide_in_place(divided, read, demand_read, choices, budget)
    except BudgetError as error:
        full = max(everything, error.smallest_bytes)
        raise BudgetError(str(error), error.smallest_bytes, full, error.units_bytes) from None
    everything = max(everything, found.smallest)
    return replace(found, everything=everything, reads_rows=True, rows_saved=saved)


def with_spare_for_chunks(plan: InPlacePlan, token_bytes: int, chunk: int) -> InPlacePlan:
    """The plan with what it leaves of the budget for more chunks of a prompt at once, at most those of its context.

    token_bytes: memory of each token of a further chunk; 0 if the model's chunks cannot share a reading. chunk: tokens
    of a chunk.
    """
    if not token_bytes:
        return plan
    chunk_bytes = token_bytes * chunk
    more = min(-(-plan.context // chunk) - 1, max(0, plan.budget - plan.total) // chunk_bytes)
    demand = replace(plan.demand, workspace=plan.demand.workspace + more * chunk_bytes)
    return replace(plan, demand=demand, chunks_at_once=1 + more)


def with_spare_for_rows(plan: InPlacePlan, tables: Sequence[Table]) -> InPlacePlan:
    """The plan with what it leaves of the budget for more rows of its lookup tables, and with a note about them.

    Where layers are read, the rest is left to the chunks of a prompt that share a reading of the layers.
    """
    if not plan.reads_rows:
        return plan
    whole = sum(table.nbytes for table in tables)
    spare = 0 if plan.layer_bytes_per_token else max(0, plan.budget - plan.total)
    kept = min(whole, plan.demand.table_rows + spare)
    count = "a lookup table" if len(tables) == 1 else f"{len(tables)} lookup tables"
    note = f"of {count} with {whole / 1e9:.3f} GB; the other rows are read"
    demand, notes = replace(plan.demand, table_rows=kept), replace(plan.notes, table_rows=note)
    return replace(plan, demand=demand, notes=notes)


def divide_in_place(
    divided: Divided, weights: WeightBytes, demand: Demand, choices: int, budget: int | None
) -> InPlacePlan:
    """The plan for a budget.

    demand: with every weight resident but the experts. choices: number of experts that a token names in a layer.
    Raises BudgetError.
    """
    if not weights.expert_layers:
        return _of_layers(divided, weights, demand, 0, budget)
    note = f"attention, routers, shared experts, {weights.embeddings}"
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
        slots = with_whole_layers(plan.slots, weights.experts)
        return _in_place(
            replace(plan, slots=slots),
            smallest=least,
            expert_slots=slots,
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


def with_whole_layers(slots: Sequence[int], experts: int) -> tuple[int, ...]:
    """As many slots in all, spread so that the first layers hold all their experts and the others a share KEPT.

    A layer with all its experts reads nothing and looks nothing up, so no token waits for the device there. Below that
    share, what the other layers read more takes longer than the waits. slots: of each layer. experts: of each layer.
    """
    kept = ceil(KEPT * experts)
    if kept == experts or sum(slots) <= kept * len(slots):
        return tuple(slots)
    whole = (sum(slots) - kept * len(slots)) // (experts - kept)
    if whole == len(slots):
        return tuple(slots)
    each, more = divmod(sum(slots) - whole * experts, len(slots) - whole)
    return (experts,) * whole + (each + 1,) * more + (each,) * (len(slots) - whole - more)


def _of_layers(divided: Divided, weights: WeightBytes, demand: Demand, slots: int, budget: int | None) -> InPlacePlan:
    """The plan for streamed layers, whose experts have `slots` slots in each layer."""
    experts = slots * weights.expert_layers * weights.expert
    demand = replace(demand, resident=demand.resident - sum(weights.layers) + experts)
    note = f"{weights.embeddings}, norms"
    if experts:
        note += f", {slots} of {weights.experts} experts of each layer"
    if not weights.layers:  # the model does not call its layers one by one
        units, slot_bytes = UnitCounts(1, 1, 1, "models"), 1
    else:
        units, slot_bytes = weights.layer_units, weights.buffer
    plan = divided(units, demand, slot_bytes, note, budget)
    held = sum(plan.slots)
    pinned = held if held == units.per_layer else held - BUFFERS
    if weights.layers and pinned < held:
        plan = replace(plan, notes=replace(plan.notes, slots=f": {pinned} stay, the others pass through {BUFFERS}"))
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
