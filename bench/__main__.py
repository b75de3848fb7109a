"""python -m mlx_flash.bench COMMAND: measurements that anyone can run again."""

from __future__ import annotations

import argparse

from mlx_flash.commands import run_command


def make_parser() -> argparse.ArgumentParser:
    from . import density, eviction, lookahead, ordering, peak_memory, predictors, random_checkpoint, windows

    parser = argparse.ArgumentParser(prog="python -m mlx_flash.bench", description="Measurements.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    modules = {
        "predictors": predictors,
        "density": density,
        "peak-memory": peak_memory,
        "random-checkpoint": random_checkpoint,
        "lookahead": lookahead,
        "eviction": eviction,
        "windows": windows,
        "ordering": ordering,
    }
    for name, module in modules.items():
        command = commands.add_parser(name, help=(module.__doc__ or "").strip(), description=module.__doc__)
        module.add_arguments(command)
        command.set_defaults(run=module.main)
    return parser


def main(arguments: argparse.Namespace) -> None:
    arguments.run(arguments)


if __name__ == "__main__":
    run_command(make_parser(), main)
