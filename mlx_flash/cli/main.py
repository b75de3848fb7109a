"""The console script `mlxflash`: each command starts a module, as `python -m` would."""

from __future__ import annotations

import importlib.util
import runpy
import sys

from .. import __version__
from . import run

COMMANDS = {
    "generate": ("mlx_flash.generate", "continues a prompt"),
    "chat": ("mlx_flash.chat", "holds a conversation in the terminal"),
    "server": ("mlx_flash.server", "serves the APIs of OpenAI, Anthropic and Ollama, and a page to chat in"),
    "service": ("mlx_flash.service", "installs the server as a service of this user, which starts at login"),
    "launch": ("mlx_flash.launch", "starts a coding agent (claude, codex, opencode) with a model of this machine"),
    "plan": ("mlx_flash.cli.show_plan", "prints how much memory a model needs, and sensible budgets"),
    "download": ("mlx_flash.download", "downloads a model from the Hugging Face Hub, or continues to"),
    "convert": ("mlx_flash.convert", "converts a checkpoint into a store that can be streamed"),
    "check": ("mlx_flash.check", "verifies every byte of a store"),
    "report": ("mlx_flash.report", "measures a model on this machine, for others to see, in ten minutes"),
    "cache": ("mlx_flash.cache", "lists and removes the entries of the cache folder"),
    "doctor": ("mlx_flash.doctor", "examines this machine: what is wrong, and what to do"),
    "bench": ("mlx_flash.bench", "runs the benchmarks"),
    "app": ("mlx_flash.apps.menubar", "starts the menu bar app: runs the server, answers quick questions"),
}
NEEDS = {"app": ("toga", "app")}  # command -> (package it needs, extra that installs the package)


def usage() -> str:
    rows = "\n".join(f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: mlxflash COMMAND ...\n\nRuns language models that are bigger than memory. Commands:\n\n{rows}\n\n"
        "`mlxflash COMMAND --help` lists the options of a command; `mlxflash --version` prints the version."
    )


def main() -> None:
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(f"mlxflash {__version__}")
    elif name not in COMMANDS:
        what = f"there is no command {name!r}" if name else "a command is missing"
        print(f"mlxflash: {what}; expected one of {', '.join(COMMANDS)}. See `mlxflash --help`.", file=sys.stderr)
        sys.exit(2)
    elif (lacking := _lacking(name)) is not None:
        print(f"mlxflash {name}: {lacking}", file=sys.stderr)
        sys.exit(1)
    else:
        run.started_as = f"mlxflash {name}"
        del sys.argv[1]
        runpy.run_module(COMMANDS[name][0], run_name="__main__", alter_sys=True)


def _lacking(name: str) -> str | None:
    """The reason why a command cannot be started if something is not installed; None if all is there."""
    module, _ = COMMANDS[name]
    package, extra = NEEDS.get(name, (None, None))
    if package and importlib.util.find_spec(package) is None:
        return f'it needs the package {package}: pip install "mlx-flash-runtime[{extra}]"'
    try:
        found = importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # Even the package that contains it is missing.
        found = False
    return None if found else f"this installation lacks {module}. Reinstall mlx-flash-runtime."


if __name__ == "__main__":
    main()
