"""Writes docs/commands.md, a table of every command's flags, from the parsers: `python tests/flag_tables.py`."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

from mlx_flash.cli import run
from mlx_flash.cli.main import COMMANDS

PAGE = Path(__file__).parents[1] / "docs" / "commands.md"
MODULES = {  # the commands that have flags of their own
    "generate": "mlx_flash.generate",
    "chat": "mlx_flash.chat",
    "server": "mlx_flash.server.__main__",
    "service": "mlx_flash.service.__main__",
    "launch": "mlx_flash.launch",
    "plan": "mlx_flash.cli.show_plan",
    "download": "mlx_flash.download",
    "convert": "mlx_flash.convert.__main__",
    "check": "mlx_flash.check",
    "report": "mlx_flash.report.__main__",
    "cache": "mlx_flash.cache",
    "doctor": "mlx_flash.doctor",
}


def flags_of(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """(flag with its argument, help) of every flag but --help, in order."""
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        takes = action.metavar or (
            f"{{{','.join(map(str, action.choices))}}}" if action.choices else action.dest.upper()
        )
        takes = " ".join(takes) if isinstance(takes, tuple) else takes
        if not action.option_strings:
            flag = takes
        elif action.nargs == 0:
            flag = ", ".join(action.option_strings)
        else:
            flag = f"{', '.join(action.option_strings)} {takes}" + (" ..." if action.nargs in ("+", "*") else "")
        values = {**vars(action), "prog": parser.prog}
        yield flag, (action.help or "") % values


def page() -> str:
    lines = [
        "# Commands and their flags",
        "",
        "Each is a word of `mlxflash`, and a module that `python -m mlx_flash.COMMAND` runs, except `plan`. Two more",
        "words are missing here: `mlxflash bench COMMAND --help` and `mlxflash app --help` print their flags. This",
        "page is written by `python tests/flag_tables.py`, from the parsers; a test compares the two.",
    ]
    before = run.started_as
    for name, module in MODULES.items():
        run.started_as = f"mlxflash {name}"
        parser = import_module(module).make_parser()
        lines += ["", f"## mlxflash {name}", "", " ".join((parser.description or COMMANDS[name][1]).split()), ""]
        lines += ["| flag | what it does |", "|---|---|"]
        lines += [f"| `{flag}` | {text} |" for flag, text in flags_of(parser)]
    run.started_as = before
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
