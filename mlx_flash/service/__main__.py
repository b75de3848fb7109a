"""python -m mlx_flash.service: runs the server whenever this user is logged in."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from ..cli.run import program, run_command
from ..cli.terminal import say
from ..server.arguments import add_server_arguments
from .definition import places
from .system_manager import SystemManager

ACTIONS = ("install", "status", "remove")


class _ServiceParser(argparse.ArgumentParser):
    """Leaves what follows `install` to the server's parser."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        installs = given[:1] == ["install"]
        parsed = super().parse_args(given[:1] if installs else given, namespace)
        parsed.words = given[1:] if installs else []
        parsed.server = make_server_parser().parse_args(parsed.words)
        parsed.print |= parsed.server.print
        return parsed


def make_server_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"{program('service')} install", description="Installs and starts the service, with the server's flags."
    )
    parser.add_argument("--print", action="store_true", help="print the definition, and do nothing")
    add_server_arguments(parser)
    return parser


def make_parser() -> argparse.ArgumentParser:
    parser = _ServiceParser(
        prog=program("service"),
        usage="%(prog)s [-h] {install [--print] [FLAGS OF mlxflash server],status,remove}",
        description="Runs `mlxflash server` in the background, from every login on: as an agent of launchd on macOS, "
        "as a user unit of systemd on Linux. `install` takes the server's flags, plans the model first, starts the "
        "service, and replaces one that is there. `status` says whether it runs, where, and what it said last (exit "
        "code 1 if it does not run). `remove` ends it and removes all its files.",
    )
    parser.add_argument("action", choices=ACTIONS, help="what to do")
    parser.add_argument("--print", action="store_true", help="with install: print the definition, and do nothing")
    return parser


def manager_here() -> SystemManager:
    if sys.platform == "darwin":
        from .launchd_agent import Launchd

        return Launchd()
    from .systemd_unit import Systemd

    return Systemd()


def main(arguments: argparse.Namespace) -> int:
    where = places()  # First: it says so if there is no home folder.
    manager = manager_here()
    if arguments.action == "status":
        from .service_status import show

        return show(manager, where)
    from .installing import defined, install, remove

    if arguments.action == "remove":
        removed = remove(manager, where)
        print("the service was removed, with its log" if removed else "there is no service")
        return 0
    definition = defined(arguments.server, arguments.words, make_server_parser, where)
    if arguments.print:
        print(manager.text(definition).decode(), end="")
        return 0
    install(definition, arguments.server, manager, say)
    from .service_status import show

    return show(manager, where)


if __name__ == "__main__":
    run_command(make_parser(), main)
