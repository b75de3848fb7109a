"""Budgets side by side: which ones, what is said of each, and the table."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from mlx_flash.cli.budget_table import budget_table
from mlx_flash.errors import BudgetError
from mlx_flash.loading.budget_choices import BudgetChoice, budget_choices
from mlx_flash.loading.forecast import Forecast
from mlx_flash.loading.plan import ENDLESS, RUN_TO_RUN_BYTES, Demand, Plan, UnitCounts, plan_for_budget

GB = 10**9
DEMAND = Demand(process=GB // 10, resident=GB, predictors=0, kv_cache=GB // 10, workspace=GB // 10)
UNITS = UnitCounts(layers=40, per_layer=100, least=1, name="experts of each layer")


def planned(budget: int | None, context: int = 2048, free: int = 3 * GB, units: UnitCounts = UNITS) -> Plan:
    return plan_for_budget(DEMAND, units, 4 * 10**6, budget, free, context, prompt_caches=0)


class Scripted:
    """Forecasts from the share of units in memory."""

    def of(self, plan: Any) -> Forecast | None:
        missing = 1 - plan.slot_share
        return Forecast(round(missing * 2e9), missing, 0.05, 0.05 + missing, missing > 0, 3 + 20 * missing, 512)


def test_the_budgets_and_their_table() -> None:
    foresight: Any = Scripted()
    choices = budget_choices(planned(9 * GB), planned, foresight)
    assert [choice.name for choice in choices] == ["smallest", "25%", "chosen", "50%", "100%"]
    assert [choice.fits for choice in choices] == [True, False, False, False, False]
    smallest = choices[0].as_dict()
    assert (smallest["name"], smallest["in_memory"], smallest["fits_now"]) == ("smallest", "1% of the experts", True)
    assert smallest["forecast"]["tokens_per_second"] == pytest.approx(1 / 1.04, rel=0.01)
    lines = budget_table(choices)
    assert lines[:3] == [
        "budgets, each with 4 MiB to spare",
        "  --memory  in memory           context  read/token  tokens/s  first token",
        "    1465MB  1% of the experts      2048     1.98 GB      0.96         23 s  the smallest",
    ]
    assert lines[4].endswith("this plan, more than is free now") and "9000MB  48% of the experts" in lines[4]
    assert lines[6].split()[:7] == ["17305MB", "everything", "2048", "0.00", "GB", "20", "3.0"]
    assert lines[7:] == [
        "first token: after a prompt of 512 tokens, the first one after the start",
        "All experts count as equally likely; texts that use some more often read less.",
    ]


def test_the_context_of_the_budgets() -> None:
    """Units get what a budget has beyond the least context, unless the user gave one."""
    chosen = planned(9 * GB, 8192)
    assert {choice.plan.context for choice in budget_choices(chosen, planned, None)} == {2048, 8192}
    assert {choice.plan.context for choice in budget_choices(chosen, planned, None, 8192)} == {8192}
    assert {choice.plan.context for choice in budget_choices(planned(9 * GB, 64), planned, None)} == {64}


def test_budgets_that_keep_the_same_are_one() -> None:
    all_needed = replace(UNITS, least=100)
    chosen = planned(30 * GB, units=all_needed)
    choices = budget_choices(chosen, lambda size, context: planned(size, context, units=all_needed), None)
    assert [choice.name for choice in choices] == ["smallest", "chosen"]


def test_a_process_that_has_grown_since() -> None:
    grown = replace(DEMAND, process=DEMAND.process + 3 * RUN_TO_RUN_BYTES)

    def plan_for(total: int, context: int = 2048) -> Plan:
        if total == ENDLESS:
            return planned(total, context)
        return plan_for_budget(grown, UNITS, 4 * 10**6, total, 9 * GB, context, prompt_caches=0)

    smallest = budget_choices(planned(9 * GB), plan_for, None)[0]
    assert smallest.name == "smallest" and smallest.plan.budget > planned(9 * GB).smallest
    with pytest.raises(BudgetError):
        plan_for(planned(9 * GB).smallest)


def test_a_table_without_forecasts() -> None:
    choice = BudgetChoice("smallest", planned(2 * GB), None)
    assert budget_table([choice])[1].split() == ["--memory", "in", "memory", "context"]
    with_one = [choice, replace(choice, forecast=Forecast(0, 0.0, 0.05, 0.05, False))]
    lines = budget_table(with_one)
    assert lines[2].split()[-5:-2] == ["?", "?", "?"] and lines[3].split()[-4:-2] == ["20", "?"] and len(lines) == 4


def test_whole_layers_in_words() -> None:
    plan = planned(2 * GB, units=UnitCounts(1, 300, 2, "layers"))
    object.__setattr__(plan, "pinned", 171)
    assert BudgetChoice("25%", plan, None).in_memory == "171 of 300 layers"
