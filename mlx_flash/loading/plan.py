"""The memory plan: what goes where in memory. It is computed before anything is allocated, printed, and kept to."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from decimal import Decimal

from ..errors import BudgetError, UsageError
from ..flash.files import NeuronLayout

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
SHARES = (0.25, 0.5)  # of the units, for the budgets that a plan proposes
FREE_SHARE = 0.7  # share of the free memory that is used if no budget is given
MOST_CONTEXTS = 3  # further contexts that the prompt caches hold by default, if the budget allows it
UNITS_PER_CACHE = 9  # bytes of units for each byte of prompt caches, so that these get a tenth of both
UNITS_PER_GRAMMAR = 3  # the same until they have room for structured answers
GRAMMAR_BYTES = 20 << 20  # of one structured answer's lexer; at most 17 MB were seen (bench/results/grammar.md)
GRAMMAR_BYTES_PER_TOKEN = 800  # of the vocabulary; at most 760 were measured
MLX_CACHE_BYTES = 32 << 20  # freed buffers that MLX may keep
RUN_TO_RUN_BYTES = 4 << 20  # difference of the process's measured size from one run to the next
ENDLESS = 2**62  # bytes; in effect no limit
SPARE = 3  # one of so many slots may go for a longer context
MIN_SLOTS = 16  # blocks per layer: fewer would make every selection a sequence of tiny rounds


def parse_memory(text: str | int, name: str = "memory") -> int:
    """Bytes of "6GB" (1e9), "6GiB" (2**30), "500MB", or of an int, which is bytes already.

    Raises UsageError, which calls the size by `name`.
    """
    if isinstance(text, int):
        if text < 0:
            raise UsageError(f"{name} is {text} bytes, expected a positive number.")
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    unit = match[2].upper() if match else ""
    unit += "B" if unit in ("K", "M", "G") else ""
    if match is None or unit not in UNITS:
        raise UsageError(f"{name} is {text!r}, expected a number with a unit, such as 6GB, 500MB or 6GiB.")
    return int(Decimal(match[1]) * UNITS[unit])


@dataclass(frozen=True)
class Demand:
    """The memory that a model needs apart from slots, in bytes."""

    process: int  # size of the process now
    resident: int
    predictors: int
    kv_cache: int
    workspace: int
    prompt_caches: int = 0  # for the contexts of earlier conversations
    grammars: int = 0  # of structured answers, which take it from the prompt caches, so it is not in the total
    drafts: int = 0  # what drafts tokens, and what a pass with them takes beyond that of one token
    table_rows: int = 0  # rows that are kept of lookup tables whose rows are read
    parallel: int = 1  # number of contexts that the KV cache has room for
    adapter: int = 0  # the weights that an adapter adds

    @property
    def total(self) -> int:
        weights = self.resident + self.adapter + self.predictors + self.table_rows
        return self.process + weights + self.kv_cache + self.prompt_caches + self.drafts + self.workspace

    @property
    def context_bytes(self) -> int:
        """The KV cache of one context."""
        return self.kv_cache // self.parallel


def grammar_bytes(vocabulary: int, parallel: int = 1) -> int:
    """The memory that structured answers of a model take. vocabulary: number of tokens. parallel: answers at once."""
    return GRAMMAR_BYTES_PER_TOKEN * vocabulary + parallel * GRAMMAR_BYTES


@dataclass(frozen=True)
class PlanNotes:
    """The notes beside the figures of a plan."""

    resident: str = "attention, embeddings, norms"
    predictors: str = ""
    slots: str = ""  # appended to the note that all plans have
    kv_cache: str = ""  # likewise
    drafts: str = ""
    table_rows: str = ""  # empty if no rows of tables are read
    adapter: str = ""


@dataclass(frozen=True)
class UnitCounts:
    """The units that slots hold."""

    layers: int
    per_layer: int
    least: int  # fewest slots of a layer
    name: str  # "... of 64 <name>"


@dataclass(frozen=True)
class Plan:
    """A memory plan. Sizes are in bytes."""

    budget: int
    demand: Demand
    units: UnitCounts
    slots: tuple[int, ...]  # number of slots of each layer
    slot_bytes: int
    context: int  # tokens
    notes: PlanNotes
    free: int  # free memory of the machine when the plan was made
    smallest: int  # smallest budget for this model
    everything: int  # budget with which all units are resident
    ranks: tuple[str, ...] = ()  # for several ranks, a line about each one's share

    @property
    def slots_bytes(self) -> int:
        return sum(self.slots) * self.slot_bytes

    @property
    def slot_share(self) -> float:
        """The share of all blocks that fit into slots."""
        return sum(self.slots) / (self.units.layers * self.units.per_layer)

    @property
    def spare_slots(self) -> int:
        """How many slots may go for a longer context, if the user names none."""
        return sum(self.slots) // SPARE

    @property
    def total(self) -> int:
        return self.demand.total + self.slots_bytes

    def bytes_for(self, share: float) -> int:
        """The budget with which this share of the units is resident, or the smallest budget if that is larger."""
        units = self.units.layers * self.units.per_layer * self.slot_bytes
        return max(self.smallest, self.everything - int((1 - share) * units))  # The prompt caches get no more there.

    def budgets(self) -> dict[str, int]:
        """Budgets worth a choice, in bytes: the smallest, and those with a share of the units in memory ("25%")."""
        shares = {f"{share:.0%}": self.bytes_for(share) for share in SHARES}
        return {"smallest": self.smallest, **shares, "100%": self.everything}

    def as_dict(self) -> dict[str, int]:
        """Bytes by kind, as `--json` prints them."""
        return {
            "budget": self.budget,
            "total": self.total,
            "process": self.demand.process,
            "resident_weights": self.demand.resident,
            "adapter": self.demand.adapter,
            "predictors": self.demand.predictors,
            "slots": self.slots_bytes,
            "table_rows": self.demand.table_rows,
            "kv_cache": self.demand.kv_cache,
            "prompt_caches": self.demand.prompt_caches,
            "drafts": self.demand.drafts,
            "workspace": self.demand.workspace,
        }

    def describe(self) -> str:
        least, most = min(self.slots), max(self.slots)
        each = f"{least}" if least == most else f"by need {least} to {most}"
        slots = f"{each} of {self.units.per_layer} {self.units.name} ({self.slot_share:.0%}){self.notes.slots}"
        rows = [
            ("process", self.demand.process, "interpreter and libraries, measured"),
            ("resident weights", self.demand.resident, self.notes.resident),
            *([("adapter", self.demand.adapter, self.notes.adapter)] if self.demand.adapter else []),
            ("predictors", self.demand.predictors, self.notes.predictors),
            ("slots", self.slots_bytes, slots),
            ("KV cache", self.demand.kv_cache, f"{self._tokens}{self.notes.kv_cache}"),
            ("prompt caches", self.demand.prompt_caches, self._caches_note()),
            *([("drafts", self.demand.drafts, self.notes.drafts)] if self.demand.drafts else []),
            ("work space", self.demand.workspace, "pieces on their way, activations"),
            ("total", self.total, f"of {self.budget / 1e9:.3f} GB"),
        ]
        if self.notes.table_rows:
            rows.insert(4, ("table rows", self.demand.table_rows, self.notes.table_rows))
        lines = [f"  {name:<17}{size / 1e9:8.3f} GB  {note}".rstrip() for name, size, note in rows]
        if (wanted := self.total - self.demand.process) > self.free:
            lines.append(
                f"note: {wanted / 1e9:.2f} GB of this are not allocated yet, but only {self.free / 1e9:.2f} GB are "
                "free, so the system will have to swap. Close other programs, or choose a smaller --memory (without "
                "it, the budget is a share of the free memory)."
            )
        return "\n".join(["memory plan", *lines, *self.ranks])

    @property
    def _tokens(self) -> str:
        each = f"{self.context} tokens"
        return each if self.demand.parallel == 1 else f"{each} for each of {self.demand.parallel} answers"

    def _caches_note(self) -> str:
        demand = self.demand
        if not demand.prompt_caches:
            return "none: only the last conversation is kept"
        if not demand.kv_cache:
            return "earlier conversations"
        return f"about {demand.prompt_caches * self.context // demand.context_bytes} tokens of earlier conversations"


def _with_caches(smallest: int, wanted: int, most: int, grammars: int) -> int:
    """The budget of `wanted` bytes without prompt caches, at least `smallest`, with their share, at most `most`.

    grammars: bytes of structured answers. `_share_of` is the inverse.
    """
    more = max(0, wanted - smallest)
    return smallest + more + min(most, max(more // UNITS_PER_CACHE, min(grammars, more // UNITS_PER_GRAMMAR)))


def _share_of(beyond: int, grammars: int) -> int:
    """The prompt caches' share of what a budget has beyond the smallest one, so that this one has none.

    It is a tenth, or a quarter as long as that is not enough for structured answers, which take `grammars` bytes.
    """
    return max(beyond // (UNITS_PER_CACHE + 1), min(grammars, beyond // (UNITS_PER_GRAMMAR + 1)))


def blocks_needed(shares: Sequence[float], layout: NeuronLayout) -> list[float]:
    """The share of each layer's blocks that a token needs, from the share of its neurons. A block is needed if any of
    its neurons is."""
    sound = [min(1.0, max(1e-3, share)) for share in shares]  # a manifest may hold any number
    return [1 - (1 - share) ** layout.neurons_per_block for share in sound]


def distribute_slots(total: int, need: Sequence[float], least: int, most: int) -> tuple[int, ...]:
    """Slots of each layer in proportion to `need`, each within [least, most], `total` in all or as many as fit.

    Every layer then keeps the blocks of about the same number of tokens.
    """
    total = min(total, most * len(need))
    low, high = 0.0, most / min(need)
    for _ in range(64):  # bisects for the scale at which the sum is `total`, or a little less
        scale = (low + high) / 2
        fits = sum(_bounded(scale * n, least, most) for n in need) <= total
        low, high = (scale, high) if fits else (low, scale)
    slots = [_bounded(low * n, least, most) for n in need]
    while left := total - sum(slots):  # rounding down leaves less than one for each layer
        for layer in [i for i, count in enumerate(slots) if count < most][:left]:
            slots[layer] += 1
    return tuple(slots)


def _bounded(value: float, least: int, most: int) -> int:
    return max(least, min(most, int(value)))


def make_plan(
    demand: Demand,
    layout: NeuronLayout,
    slot_bytes: int,
    budget: int | None,
    free: int,
    context: int,
    selects: bool,
    need: Sequence[float] | None = None,
    notes: PlanNotes = PlanNotes(),
    prompt_caches: int | None = None,
) -> Plan:
    """The plan of a model whose neurons are streamed.

    selects: False if every token uses all neurons, which works without slots.
    need: share of each layer's blocks that a token needs; None if it is the same in every layer.
    notes: the notes beside the figures.
    prompt_caches: bytes for earlier conversations; None for a share of the budget.
    Raises BudgetError.
    """
    least = min(MIN_SLOTS, layout.blocks) if selects else 0
    units = UnitCounts(layout.layers, layout.blocks, least, "blocks of each layer's neurons")
    return plan_for_budget(demand, units, slot_bytes, budget, free, context, need, notes, prompt_caches)


def plan_for_budget(
    demand: Demand,
    units: UnitCounts,
    slot_bytes: int,
    budget: int | None,
    free: int,
    context: int,
    need: Sequence[float] | None = None,
    notes: PlanNotes = PlanNotes(),
    prompt_caches: int | None = None,
) -> Plan:
    """Divides a budget. Without one, it divides FREE_SHARE of the free memory, but no more than the model can use.

    need: the slots of each layer are in proportion to it; None for the same number in every layer.
    notes: the notes beside the figures.
    prompt_caches: bytes for the contexts of earlier conversations. None for a tenth of what the budget has beyond the
    smallest one (or more for structured answers, `_share_of`), and for what all units leave of it, but no more than
    MOST_CONTEXTS further contexts take, or structured answers.
    Raises BudgetError, which names the smallest budget that suffices.
    """
    most_caches = max(MOST_CONTEXTS * demand.context_bytes, demand.grammars) if prompt_caches is None else 0
    demand = replace(demand, prompt_caches=prompt_caches or 0)
    smallest = demand.total + units.layers * units.least * slot_bytes
    all_units = demand.total + units.layers * units.per_layer * slot_bytes
    # Rounded up, so that the figure can be typed back and suffices in another process.
    smallest_mb = -(-(smallest + RUN_TO_RUN_BYTES) // 10**6)
    if budget is None:
        budget = int(demand.process + FREE_SHARE * free)
        budget = min(max(budget, smallest), all_units + most_caches)
        found = f"{free / 1e9:.2f} GB are free. Close other programs"
        most = demand.process + free
    else:
        budget = min(budget, ENDLESS)
        found = f"the memory budget is {budget / 1e6:.0f} MB. Give more (--memory {{}}MB)"
        most = budget
    at_most = _with_caches(smallest_mb * 10**6, all_units + RUN_TO_RUN_BYTES, most_caches, demand.grammars)
    if smallest > most:
        if smallest - demand.prompt_caches <= most:
            found += ", or lower --prompt-cache"
        if smallest - demand.kv_cache <= most:
            found += ", or lower --context"
        if demand.parallel > 1:
            found += f", or lower --parallel, which is {demand.parallel}"
        raise BudgetError(
            f"this model needs at least {smallest_mb}MB "
            f"({demand.process / 1e6:.0f} MB process, {demand.resident / 1e6:.0f} MB resident weights, "
            f"{demand.predictors / 1e6:.0f} MB predictors, "
            + (f"{demand.table_rows / 1e6:.0f} MB table rows, " if demand.table_rows else "")
            + f"{demand.kv_cache / 1e6:.0f} MB KV cache, "
            + (f"{demand.prompt_caches / 1e6:.0f} MB prompt caches, " if demand.prompt_caches else "")
            + (f"{demand.drafts / 1e6:.0f} MB drafts, " if demand.drafts else "")
            + f"{demand.workspace / 1e6:.0f} MB work space, {(smallest - demand.total) / 1e6:.0f} MB fewest slots, "
            f"{RUN_TO_RUN_BYTES / 1e6:.0f} MB to spare); {found.format(smallest_mb)}.",
            smallest_mb * 10**6,
            at_most,
            units.layers * units.per_layer * slot_bytes,
        )
    caches = max(_share_of(max(0, budget - smallest_mb * 10**6), demand.grammars), budget - all_units)
    demand = replace(demand, prompt_caches=demand.prompt_caches + max(0, min(caches, most_caches)))
    total = (budget - demand.total) // slot_bytes
    slots = distribute_slots(total, need or [1.0] * units.layers, units.least, units.per_layer)
    return Plan(budget, demand, units, slots, slot_bytes, context, notes, free, smallest_mb * 10**6, at_most)
