"""python -m mlx_flash.bench COMMAND: measurements that anyone can run again."""

from __future__ import annotations

import argparse
import signal
from importlib import import_module

from mlx_flash.commands import program, run_command

COMMANDS = (
    "naive-vs-flash",
    "steps",
    "memory",
    "prompts",
    "soak",
    "reads",
    "expert-reads",
    "blocks",
    "checks",
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
    "synthetic-mixture",
    "memory-models",
)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=program("bench"), description="Measurements.")
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


def load_parser() -> argparse.ArgumentParser:
    """`make_parser`; Ctrl-C while the modules load ends the process without a word, as nothing has begun."""
    before = signal.getsignal(signal.SIGINT)
    if before is not signal.default_int_handler:  # ignored, as `nohup` and scripts have it
        return make_parser()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parser = make_parser()
    signal.signal(signal.SIGINT, before)
    return parser


if __name__ == "__main__":
    run_command(load_parser(), main)
