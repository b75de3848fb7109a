"""python -m mlx_flash.doctor: examines this machine, and says what keeps models from running well and what to do."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from .cli.run import program, run_command


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program("doctor"),
        description="Examines this machine: chip and versions, memory and swap, power, the speed of the disk, "
        "self-tests, and the cache folder. Says what is wrong and what to do about it. It takes about ten seconds. If "
        "no model of at least 268 MB is here to read from, it writes a file of that size to the cache folder and "
        "removes it. Exit code 0: no problem; 1: a problem; 2: wrong usage.",
    )
    parser.add_argument(
        "--model",
        metavar="DIR_OR_ID",
        help="folder of a store or a checkpoint, or a Hugging Face id: examine the disk that it is on (default: the "
        "disk of the Hub's cache)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print all facts as one JSON object; it has names of folders and models"
    )
    return parser


def main(arguments: argparse.Namespace) -> int:
    from .cli.terminal import say
    from .machine.gathered import gathered
    from .machine.hazards import PROBLEM

    folder = None if arguments.model is None else _folder_of(arguments.model)
    say("examining this machine, which takes about ten seconds")
    facts = gathered(folder)
    if arguments.json:
        print(json.dumps(facts))
    else:
        from .cli.facts_view import examined

        print(examined(facts))
    return int(any(finding["level"] == PROBLEM for finding in facts["findings"]))


def _folder_of(model: str) -> Path | None:
    """The folder of a model; None for a repository that was not downloaded. Raises UsageError or CheckpointError."""
    from .cli.terminal import say
    from .errors import ConversionError
    from .source.resolve import find_checkpoint

    try:
        return find_checkpoint(model, fetch=False)
    except ConversionError:
        say(f"note: {model} was not downloaded; `mlxflash plan --model {model}` says whether it would run here")
        return None


if __name__ == "__main__":
    run_command(make_parser(), main)
