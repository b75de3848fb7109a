"""mlxflash plan: prints how much memory a model needs, and sensible budgets for it. No weights are loaded."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .model_arguments import add_model_arguments, options_of
from .run import run_command
from .terminal import say

if TYPE_CHECKING:
    from ..loading.forecast import Forecast
    from ..loading.plan import Plan
    from ..source.hub_listing import Listing


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlxflash plan",
        description="Prints the memory plan that the other commands would use, and sensible budgets. No weights are "
        "loaded or downloaded: of a repository that is not here, only headers and small files are read. A checkpoint "
        "that needs a conversion must be converted already.",
    )
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def main(arguments: argparse.Namespace) -> None:
    from ..loading.plan import RUN_TO_RUN_BYTES

    made, forecast, download = _planned(arguments)
    points = made.budgets()
    if arguments.json:
        told = {**made.as_dict(), "context": made.context, "slot_share": made.slot_share, "budgets": points}
        if download is not None:
            told["download"] = download
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


def _planned(arguments: argparse.Namespace) -> tuple[Plan, Forecast | None, dict[str, Any] | None]:
    """The plan, the forecast if there is one, and what would be downloaded; None for a model that is here."""
    from ..loading.hub_plan import is_downloaded, plan_before_download
    from ..loading.load import plan_with_forecast

    options, download = options_of(arguments), {}

    def listed(listing: Listing) -> None:
        download.update(listing.as_dict())
        say(listing.describe())

    if arguments.model is None or is_downloaded(arguments.model, arguments.revision):
        return *plan_with_forecast(arguments.model, options, say=say), None
    if (made := plan_before_download(arguments.model, options, listed)) is None:
        raise UsageError(
            f"{arguments.model} is a ReLU model: it runs after a conversion, and its plan depends on that. Download it "
            f"(`mlxflash download {arguments.model}`) and convert it (`mlxflash convert`)."
        )
    return made, None, download


if __name__ == "__main__":
    run_command(make_parser(), main)
