"""python -m mlx_flash.bench.tools.two_machines: a shell in which two machines seem to be there.

Makes network namespaces, joined by a wire that holds every packet for a time, writes their host file, and runs a shell,
or a command, on the first of them. There `ssh mac2` enters the second. Needs Linux, root and a C compiler.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from mlx_flash.cli.run import run_command, whole_number
from mlx_flash.source.children import child_environment

from .namespaces import machines


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="two_machines", description=(__doc__ or "").split(": ", 1)[1])
    parser.add_argument("--machines", type=whole_number(2, 8), default=2, help="how many (default: %(default)s)")
    parser.add_argument("--delay-ms", type=float, default=0.3, help="of a packet, each way (default: %(default)s)")
    parser.add_argument(
        "--hosts", type=Path, default=Path("macs.json"), help="host file to write (default: %(default)s)"
    )
    parser.add_argument("words", nargs="*", metavar="COMMAND", help="what to run (default: a shell)")
    return parser


def main(arguments: argparse.Namespace) -> None:
    with machines(arguments.machines, arguments.delay_ms / 1e3) as made:
        hosts = [{"ssh": name, "ips": [ip]} for name, ip in zip(made.names, made.addresses, strict=True)]
        arguments.hosts.write_text(json.dumps(hosts, indent=1) + "\n", encoding="utf-8")
        print(
            f"{', '.join(made.names)}: {', '.join(made.addresses)}; host file: {arguments.hosts}",
            file=sys.stderr,
            flush=True,
        )
        words = arguments.words or [os.environ.get("SHELL", "/bin/sh")]
        ended = subprocess.run(made.command(0, words), env=child_environment(**made.environment()))
    sys.exit(ended.returncode)


if __name__ == "__main__":
    run_command(make_parser(), main)
