"""python -m mlx_flash.bench COMMAND: measurements that anyone can run again."""

from __future__ import annotations

import argparse
from importlib import import_module

from mlx_flash.commands import run_command

COMMANDS = (
    "naive-vs-flash",
    "steps",
    "memory",
    "prompts",
    "reads",
    "blocks",
    "windows",
    "predictors",
    "quality",
    "bits",
    "plan",
    "eviction",
    "host",
    "lookahead",
    "ordering",
    "density",
    "peak-memory",
    "convert-memory",
    "synthetic",
    "random-checkpoint",
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mlx_flash.bench", description="Measurements.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name in COMMANDS:
        module = import_module(f".{name.replace('-', '_')}", __package__)
        text = (module.__doc__ or "").strip()
        command = commands.add_parser(name, help=text.splitlines()[0], description=text)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    return parser


def main(arguments: argparse.Namespace) -> None:
    arguments.run(arguments)


if __name__ == "__main__":
    run_command(make_parser(), main)
