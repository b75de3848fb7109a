"""Several budgets for one model side by side: what each keeps in memory, and the forecast of its speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from ..defaults import CONTEXT
from ..errors import BudgetError
from .forecast import Forecast, Foresight
from .in_place_plan import LAYERS
from .plan import ENDLESS, Plan

CHOSEN = "chosen"  # the name of the budget that the user gave, or that follows from the free memory


@dataclass(frozen=True)
class BudgetChoice:
    """A budget. name: "smallest", the share of units in memory ("25%"), or CHOSEN. forecast: None if there is none."""

    name: str
    plan: Plan
    forecast: Forecast | None

    @property
    def fits(self) -> bool:
        """Whether that much memory can be had now without swapping."""
        return self.plan.total - self.plan.demand.process <= self.plan.free

    @property
    def in_memory(self) -> str:
        """What is in memory, in words."""
        plan = self.plan
        if plan.slot_share >= 1:
            return "everything"
        if plan.units.name == LAYERS:
            return f"{getattr(plan, 'pinned', 0)} of {plan.units.per_layer} layers"
        return f"{plan.slot_share:.0%} of the {plan.units.name.split()[0]}"

    def as_dict(self) -> dict[str, Any]:
        """As `--json` prints it."""
        plan = self.plan
        told = {"name": self.name, "budget": plan.budget, "total": plan.total, "slot_share": plan.slot_share}
        told |= {"in_memory": self.in_memory, "context": plan.context, "fits_now": self.fits}
        return {**told, "forecast": None if self.forecast is None else told_of(self.forecast)}


def told_of(forecast: Forecast) -> dict[str, Any]:
    """A forecast as `--json` prints it."""
    return {**asdict(forecast), "tokens_per_second": forecast.tokens_per_second}


def budget_choices(
    chosen: Plan, plan_for: Callable[[int, int], Plan], foresight: Foresight | None, context: int | None = None
) -> list[BudgetChoice]:
    """The smallest budget, those that keep shares of the units in memory, and the chosen one, in ascending order.

    Budgets that keep the same in memory as a smaller one are left out. plan_for: makes the plan of a budget. foresight:
    forecasts the speed; None if that cannot be. The first forecast takes a few seconds, the others take less. context:
    in tokens; None for the least that a plan chooses, so that the units get the rest.
    """
    context = min(CONTEXT, chosen.context) if context is None else min(context, chosen.context)
    named = {CHOSEN: chosen}
    for name, size in plan_for(ENDLESS, context).budgets().items():
        if abs(size - chosen.budget) > size // 100:  # Two rows for almost the same budget say nothing.
            named[name] = _plan_for(size, context, plan_for)
    found: list[BudgetChoice] = []
    for name, plan in sorted(named.items(), key=lambda item: item[1].budget):
        choice = BudgetChoice(name, plan, None)
        before = found[-1] if found and name != CHOSEN else None
        if before is None or (before.in_memory, before.plan.context) != (choice.in_memory, plan.context):
            made: Any = plan
            found.append(replace(choice, forecast=None if foresight is None else foresight.of(made)))
    return found


def _plan_for(size: int, context: int, plan_for: Callable[[int, int], Plan]) -> Plan:
    """The plan of a budget. The process may have grown since the smallest one was worked out."""
    try:
        made: Plan = plan_for(size, context)
    except BudgetError as error:
        made = plan_for(error.smallest_bytes, context)
    return made
