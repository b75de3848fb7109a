"""Chooses how many tokens a plan makes room for, if the user names no number."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol, TypeVar

from ..defaults import CONTEXT, KV_STEP_TOKENS, MOST_CONTEXT
from ..errors import BudgetError, UsageError
from .plan import ENDLESS, FREE_SHARE, Demand, Plan

MOST_TRIALS = 8  # contexts that are tried at most, each of which traces the model's graph


AnyPlan = TypeVar("AnyPlan", bound=Plan, covariant=True)


class Divide(Protocol[AnyPlan]):
    """Makes the plan for a demand and a context, with a note for its KV cache. Raises BudgetError."""

    def __call__(self, demand: Demand, context: int, note: str) -> AnyPlan: ...


def plan_context(
    asked: int | str | None,
    positions: int | None,
    demand_at: Callable[[int], Demand],
    divide: Divide[AnyPlan],
    budget: int | None,
    free: int,
) -> AnyPlan:
    """The plan for the context that is asked for, or for one that suits the budget.

    Without a number, the context is at least CONTEXT tokens. It is longer, in steps of KV_STEP_TOKENS up to
    MOST_CONTEXT, as long as it takes no more than the `spare_slots` of the plan for CONTEXT tokens. It never exceeds
    the model's positions. The smallest budget is that of CONTEXT tokens. The budget with which all units are resident
    is that of the longest such context.

    asked: a number, MAX_CONTEXT for all positions, None to choose. positions: the model's, None if it has no limit.
    demand_at: the demand for a context. free: free memory of the machine in bytes, of which a share is used without a
    budget.

    Raises BudgetError, or UsageError for all positions of a model without a limit.
    """
    if isinstance(asked, str):
        if positions is None:
            raise UsageError(
                f"this model's configuration names no positions for a context of {asked!r}. Give a number."
            )
        asked = positions
    if asked is not None:
        context = min(asked, positions or asked)
        note = f", all of the model's positions, fewer than the {asked} asked for" if context < asked else ""
        return divide(demand_at(context), context, note)
    least, most = min(CONTEXT, positions or CONTEXT), min(MOST_CONTEXT, positions or MOST_CONTEXT)
    longest = demand_at(most)  # first, so that the process is measured after the largest graph was traced
    shortest = demand_at(least)
    try:
        everything = divide(longest, most, "").everything
    except BudgetError as error:
        everything = error.full_bytes
    try:
        base = divide(shortest, least, "")
    except BudgetError as error:
        full = max(error.smallest_bytes, everything)
        raise BudgetError(str(error), error.smallest_bytes, full, error.units_bytes) from None

    def total(context: int) -> int:
        demand = demand_at(context)
        try:
            return divide(demand, context, "").demand.total  # with the prompt caches
        except BudgetError:
            return demand.total

    memory = min(budget, ENDLESS) if budget is not None else int(shortest.process + FREE_SHARE * free)
    kept = max(base.units.layers * base.units.least, sum(base.slots) - base.spare_slots)
    context = _longest(total, least, most, memory - kept * base.slot_bytes)
    demand = demand_at(context)
    made = divide(demand, context, _note(context, least, positions, demand.total - shortest.total))
    return replace(made, smallest=base.smallest, everything=max(base.smallest, everything))


def _longest(total: Callable[[int], int], least: int, most: int, limit: int) -> int:
    """The longest context whose demand is at most `limit` bytes: `least`, a multiple of KV_STEP_TOKENS, or `most`.

    A demand grows almost in proportion to the context, so a line between two known ones leads to the limit.
    """
    if total(most) <= limit or total(least) >= limit:
        return most if total(most) <= limit else least
    low, high = least, most
    for _ in range(MOST_TRIALS):
        if high - low <= KV_STEP_TOKENS:
            break
        guess = low + (high - low) * (limit - total(low)) // (total(high) - total(low))
        last = (high - 1) // KV_STEP_TOKENS * KV_STEP_TOKENS
        guess = max(low // KV_STEP_TOKENS * KV_STEP_TOKENS + KV_STEP_TOKENS, guess // KV_STEP_TOKENS * KV_STEP_TOKENS)
        guess = min(guess, last)
        low, high = (guess, high) if total(guess) <= limit else (low, guess)
    return low


def _note(context: int, least: int, positions: int | None, price_bytes: int) -> str:
    """The note on a context that was chosen. price_bytes: what it takes more than `least` tokens."""
    if context == positions:
        price = f"; {least} would save {price_bytes / 1e9:.3f} GB" if context > least else ""
        return f", all of the model's positions{price}"
    price = f"; {least} would save {price_bytes / 1e9:.3f} GB" if context > least else ", the least"
    return f" of the model's {positions}{price} (--context N)" if positions else f"{price} (--context N)"
