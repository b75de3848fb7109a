"""Several budgets for one model as a table."""

from __future__ import annotations

from ..loading.budget_choices import CHOSEN, BudgetChoice
from ..loading.forecast import Forecast
from ..loading.plan import RUN_TO_RUN_BYTES

MARKS = {CHOSEN: "this plan", "smallest": "the smallest"}


def budget_table(choices: list[BudgetChoice]) -> list[str]:
    """The budgets, one a line, after a line that says what they are."""
    forecasts = [choice.forecast for choice in choices if choice.forecast is not None]
    heads = ["--memory", "in memory", "context"]
    if forecasts:
        prompt = max(forecast.prompt_tokens for forecast in forecasts)
        heads += ["read/token", "tokens/s", "first token"]
    rows = [heads, *([*_of_plan(choice), *(_of_forecast(choice.forecast) if forecasts else [])] for choice in choices)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"budgets, each with {RUN_TO_RUN_BYTES >> 20} MiB to spare"]
    for row, marks in zip(rows, ["", *map(_marks, choices)], strict=True):
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)]
        cells[1] = f"{row[1]:<{widths[1]}}"
        lines.append(f"  {'  '.join(cells)}  {marks}".rstrip())
    if any(forecast.first_token_s is not None for forecast in forecasts):
        lines.append(f"first token: after a prompt of {prompt} tokens, the first one after the start")
    if any(forecast.even for forecast in forecasts):
        lines.append("All experts count as equally likely; texts that use some more often read less.")
    return lines


def _of_plan(choice: BudgetChoice) -> list[str]:
    return [f"{-(-choice.plan.budget // 10**6)}MB", choice.in_memory, str(choice.plan.context)]


def _of_forecast(made: Forecast | None) -> list[str]:
    if made is None:
        return ["?", "?", "?"]
    first, rate = made.first_token_s, made.tokens_per_second
    seconds = "?" if first is None else f"{first:.1f} s" if first < 10 else f"{first:.0f} s"
    return [f"{made.bytes_per_token / 1e9:.2f} GB", f"{rate:.2f}" if rate < 1 else f"{rate:.3g}", seconds]


def _marks(choice: BudgetChoice) -> str:
    marks = [MARKS[choice.name]] if choice.name in MARKS else []
    return ", ".join([*marks, *([] if choice.fits else ["more than is free now"])])
