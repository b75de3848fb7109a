"""What the command lines have in common: errors become one sentence and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable

from .errors import FlashError


def run_command(parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], int | None]) -> None:
    """Parses, runs and exits: 0, 2 for wrong usage, 1 for everything else, 130 after Ctrl-C."""
    arguments = parser.parse_args()
    try:
        code = main(arguments) or 0
        sys.stdout.flush()
    except FlashError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        print(f"\n{parser.prog}: interrupted", file=sys.stderr)
        code = 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
