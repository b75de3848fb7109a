"""The arguments that let several processes, here or on other machines, compute one model; and their start and end."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import termios
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from .printable import for_stream
from .run import whole_number
from .terminal import say

if TYPE_CHECKING:
    from ..ranks.leader import Leader

MOST_RANKS = 64


def add_rank_arguments(parser: argparse.ArgumentParser) -> None:
    ranks = parser.add_argument_group("several machines").add_mutually_exclusive_group()
    ranks.add_argument(
        "--hosts",
        metavar="FILE",
        help="compute the model on the machines of this host file, which `mlx.distributed_config` writes; the first is "
        "this one. What they send each other is neither encrypted nor signed (default: this machine alone)",
    )
    ranks.add_argument(
        "--ranks",
        type=whole_number(2, MOST_RANKS),
        metavar="N",
        help="the same with N processes on this machine (default: this process alone)",
    )


@contextlib.contextmanager
def ranks_of(
    arguments: argparse.Namespace, program: str, before_end: Callable[[str], None] = lambda _: None
) -> Iterator[Leader | None]:
    """The group of the ranks that the arguments name; None for this process alone.

    They have ended when the context does. If one of them ends or hangs before, this process ends with code 1 and a
    sentence, even if its main thread waits for a disk. before_end: called with the sentence then, in another thread.
    Raises UsageError or FlashError.
    """
    if arguments.hosts is None and arguments.ranks is None:
        yield None
        return
    from ..ranks.hosts import local_hosts, read_hosts
    from ..ranks.leader import Leader, end_process
    from ..source.children import child_environment

    hosts = local_hosts(arguments.ranks) if arguments.hosts is None else read_hosts(arguments.hosts)
    restore = _terminal()

    def end(sentence: str) -> None:
        before_end(sentence)
        restore()
        begin = "\n" if sys.stderr.isatty() else ""  # after the text of an answer
        end_process(begin + for_stream(f"{program}: {sentence}", sys.stderr))

    group = Leader(hosts, child_environment(), say=say, on_fault=end)
    try:
        yield group
    finally:
        group.close()


def _terminal() -> Callable[[], None]:
    """A function that gives the terminal back the settings that it has now."""
    found: list[tuple[int, Any]] = []
    for stream in (sys.stdin, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError, termios.error):  # It is not a terminal.
            found.append((stream.fileno(), termios.tcgetattr(stream.fileno())))

    def restore() -> None:
        for number, settings in found:
            with contextlib.suppress(OSError, termios.error):
                if os.tcgetpgrp(number) == os.getpgrp():  # A background process that sets a terminal is stopped.
                    termios.tcsetattr(number, termios.TCSANOW, settings)

    return restore
