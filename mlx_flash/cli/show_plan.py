"""mlxflash plan: prints what goes where in memory, sensible budgets, and the forecast. No weights are loaded."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from ..errors import FlashError, UsageError
from .model_arguments import add_model_arguments, options_of
from .run import run_command
from .terminal import say

if TYPE_CHECKING:
    from ..loading.forecast import Foresight
    from ..loading.planned import Planned
    from ..source.hub_listing import Listing


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="mlxflash plan",
        description="Prints the memory plan that the other commands would use, and several budgets side by side: what "
        "each keeps in memory, how many tokens per second the forecast is, and when the first token comes. No weights "
        "are loaded or downloaded. Of a repository that is not here, only headers and small files are read, and the "
        "speed of the disk is measured, at most once a day, with a file of 268 MB that is removed again. A checkpoint "
        "that needs a conversion must be converted already.",
    )
    add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")
    return parser


def main(arguments: argparse.Namespace) -> None:
    from ..loading.hub_plan import is_downloaded, planned_before_download
    from ..loading.load import planned_model

    options, download = options_of(arguments), {}

    def listed(listing: Listing) -> None:
        download.update(listing.as_dict())
        say(listing.describe())

    if arguments.model is None or is_downloaded(arguments.model, arguments.revision):
        with planned_model(arguments.model, options, say) as planned:
            _show(planned, planned.foresight, arguments, None)
        return
    with planned_before_download(arguments.model, options, listed) as before:
        if before is None:
            raise UsageError(
                f"{arguments.model} is a ReLU model: it runs after a conversion, and its plan depends on that. "
                f"Download it (`mlxflash download {arguments.model}`) and convert it (`mlxflash convert`)."
            )
        _show(before, _of_its_disk(before.foresight, arguments.model), arguments, download)


def _of_its_disk(foresight: Foresight | None, repository: str) -> Foresight | None:
    """The forecast for the disk that a repository would be on; None if that disk cannot be measured."""
    from ..machine.disk_table import disk_table
    from ..source.hub_listing import free_space

    if foresight is None:
        return None
    try:
        return foresight.of_disk(disk_table(free_space(repository)[0], say))
    except (FlashError, OSError) as error:
        say(f"note: there is no forecast, because the disk cannot be measured: {error}")
        return None


def _show(
    planned: Planned, foresight: Foresight | None, arguments: argparse.Namespace, download: dict[str, Any] | None
) -> None:
    """Prints all of it. download: what would be downloaded; None for a model that is here."""
    from ..loading.budget_choices import CHOSEN, budget_choices, told_of
    from .budget_table import budget_table

    made = planned.plan
    given = None if arguments.context is None else made.context
    choices = budget_choices(made, planned.plan_for, foresight, given)
    forecast = next(choice.forecast for choice in choices if choice.name == CHOSEN)
    if arguments.json:
        told = {**made.as_dict(), "context": made.context, "slot_share": made.slot_share, "budgets": made.budgets()}
        told["choices"] = [choice.as_dict() for choice in choices]
        if download is not None:
            told["download"] = download
        if forecast is not None:
            told["forecast"] = told_of(forecast)
        print(json.dumps(told))
        return
    print(made.describe())
    if forecast is not None:
        print(forecast.describe())
    print("\n".join(["", *budget_table(choices)]))


if __name__ == "__main__":
    run_command(make_parser(), main)
