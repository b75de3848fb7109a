"""mlxflash plan: prints how much memory a model needs, and sensible budgets for it. No weights are loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from .model_arguments import add_model_arguments, options_of
from .run import run_command
from .terminal import say


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlxflash plan",
        description="Prints the memory plan that the other commands would use, and sensible budgets. No weights are "
        "loaded, and nothing is downloaded. A checkpoint that needs a conversion must be converted already.",
    )
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def main(arguments: argparse.Namespace) -> None:
    from ..loading.load import plan_with_forecast
    from ..loading.plan import RUN_TO_RUN_BYTES

    made, forecast = plan_with_forecast(arguments.model, options_of(arguments), say=say)
    points = made.budgets()
    if arguments.json:
        told = {**made.as_dict(), "context": made.context, "slot_share": made.slot_share, "budgets": points}
        if forecast is not None:
            told["forecast"] = {**asdict(forecast), "tokens_per_second": forecast.tokens_per_second}
        print(json.dumps(told))
        return
    print(made.describe())
    if forecast is not None:
        print(forecast.describe())
    longest = ", all but the smallest for the longest context (--context)" if arguments.context is None else ""
    print(f"budgets (--memory), each with {RUN_TO_RUN_BYTES >> 20} MiB to spare{longest}")
    for name, size in points.items():
        what = "that is enough" if name == "smallest" else f"of the {made.units.name.split()[0]} in memory"
        print(f"  {-(-size // 10**6):>8} MB  {name} {what}")


if __name__ == "__main__":
    run_command(make_parser(), main)
