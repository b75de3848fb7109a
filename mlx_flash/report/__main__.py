"""python -m mlx_flash.report: measures a model on this machine, and writes what may be shown to others."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from ..cli.beginning import Terminated
from ..cli.run import program, run_command
from ..cli.terminal import say
from ..errors import FlashError, UsageError

if TYPE_CHECKING:
    from .making import Making


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("report"),
        description="Measures a model on this machine, in ten minutes at most: the machine and its disk, a forecast, "
        "and answers to prompts of 32 and 512 tokens within three memory budgets, each twice. Writes a JSON file and a "
        "short Markdown text for an issue, and lists what they contain. Nothing is sent anywhere, and nothing in them "
        "names you, your machine or a folder. Ctrl-C ends it early and writes what there is.",
    )
    parser.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="folder of a store or a checkpoint, or a Hugging Face id (default: the packaged demo model)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path(), metavar="FOLDER", help="folder for the two files (default: this folder)"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two minutes at most: answers of 32 tokens to one prompt of 32 tokens",
    )
    return parser


def main(arguments: argparse.Namespace) -> int:
    from ..machine.gathered import gathered
    from .making import Making

    folder: Path = arguments.out
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be a folder for the report ({error.strerror}). Choose another --out."
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"{folder} cannot be written to. Choose another --out.")
    making = Making(arguments.model, arguments.quick, say, gathered)
    try:
        making.make()
    except (KeyboardInterrupt, Terminated):
        making.leave_out_rest("interrupted")
        write(making, folder)
        raise
    return write(making, folder)


def write(making: Making, folder: Path) -> int:
    """Writes and prints what there is. Returns the exit code: 1 if no run was finished."""
    from ..source.ssd_writes import write_beside
    from .form import write_report
    from .pasted import ABSENT, CONTENTS, markdown

    if (report := making.report()) is None:
        say("nothing was measured yet, so nothing is written")
        return 1
    text = markdown(report)
    stem = f"mlxflash-report-{time.strftime('%Y%m%d-%H%M%S')}"
    print(text)  # First: it took minutes, and the disk may be full by now.
    try:
        write_report(report, folder / f"{stem}.json")
        write_beside(folder / f"{stem}.md", text.encode())
    except OSError as error:
        raise FlashError(
            f"the report cannot be written to {folder} ({error.strerror}). Its text is printed above. Make room and "
            "run the command again for the JSON file, or choose another --out."
        ) from None
    print(f"written: {folder / stem}.json, {folder / stem}.md")
    for title, each in (("They contain:", CONTENTS), ("They do not contain:", ABSENT)):
        print("\n".join([title, *(f"- {line}" for line in each)]))
    print(
        'Have a look at them, and paste both into a new issue of the repository, with the form "Machine report". '
        "That is how others learn what this machine can do."
    )
    return 0 if report.runs else 1


if __name__ == "__main__":
    run_command(make_parser(), main)
