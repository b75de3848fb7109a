"""Runs a command: parses its arguments, handles signals, and turns errors into one sentence and an exit code."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType

from ..errors import FlashError
from . import beginning, stopping
from .beginning import HUNG_UP, Terminated, hand_over, tell_again
from .printable import for_stream

REVISION_HELP = "branch, tag or commit of the Hugging Face repository (default: its main branch)"

started_as: str | None = None  # such as "mlxflash generate" if the console script started this process


def program(module: str) -> str:
    """The name of a command in its usage line. module: its name in this package."""
    return started_as or f"python -m mlx_flash.{module}"


def whole_number(least: int, most: int = 10**6) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text} is not between {least} and {most}")
        return value

    return parse


def add_lifeline_argument(group: argparse._ActionsContainer) -> None:
    """Adds --exit-with-stdin; `obey_lifeline` acts on it."""
    group.add_argument(
        "--exit-with-stdin",
        action="store_true",
        help="exit when standard input closes, so that this process never outlives the one that started it",
    )


def obey_lifeline(arguments: argparse.Namespace) -> None:
    if arguments.exit_with_stdin:
        stopping.end_with_stdin()


def run_command(
    parser: argparse.ArgumentParser, main: Callable[[argparse.Namespace], int | None], terminated: int = 143
) -> None:
    """Parses the arguments, runs `main` and exits.

    The exit code is that of `main`, 2 for wrong usage, 1 for other errors, 130 after Ctrl-C, `terminated` after
    SIGTERM and 129 after SIGHUP. SIGHUP has no effect where it is ignored, as under `nohup`.

    If `main` is the program itself, not a function that a test calls, the process ends at most `stopping.GRACE_S`
    after such a signal, or after `main`, even if a thread still waits for something.
    """
    arguments = parser.parse_args()
    # The caller may have closed them, as `<&-` and `>&-` do. Opening uses the lowest free number, so stdin comes first:
    # MLX cannot read a file whose number is 0.
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # The terminal's encoding may lack characters that a model writes.
    codes = {signal.SIGTERM: terminated}
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        codes[signal.SIGHUP] = HUNG_UP

    def terminate(number: int, _: FrameType | None) -> None:
        raise Terminated(codes[signal.Signals(number)], number)

    for number in codes:
        signal.signal(number, terminate)
    owns_process = main.__module__ == "__main__"
    code = 1
    try:
        hand_over()
        if owns_process:
            tell_again()
            stopping.watch(parser.prog, {signal.SIGINT: 130, **codes})
        code = main(arguments) or 0
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        if owns_process:
            _ignore(signal.SIGINT, *codes)  # The process is ending; another signal must not print a traceback.
        code = _say_why(parser.prog, error)
    finally:
        if owns_process:
            _ignore(signal.SIGINT, *codes)
            stopping.ended(code)
    sys.exit(code)


def _ignore(*numbers: signal.Signals) -> None:
    for number in numbers:
        signal.signal(number, signal.SIG_IGN)


def _say_why(name: str, error: Exception | KeyboardInterrupt) -> int:
    """Prints the error that ended the command `name` as a line on standard error. Returns the exit code."""
    if isinstance(error, FlashError):
        print(for_stream(f"{name}: {error}", sys.stderr), file=sys.stderr)
        return error.exit_code
    # A compiled module that is interrupted while Python imports it ends with an ImportError.
    if isinstance(error, KeyboardInterrupt) or (isinstance(error, ImportError) and beginning.interrupted):
        print(f"\n{name}: interrupted", file=sys.stderr)
        return 130
    if isinstance(error, BrokenPipeError):  # The reader of our output has gone, as `| head` does.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    elif isinstance(error, OSError):  # such as a full disk behind standard output, or an unreadable folder
        with contextlib.suppress(OSError):
            print(for_stream(f"{name}: {error}", sys.stderr), file=sys.stderr)
        with contextlib.suppress(OSError):  # Buffered output would fail again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    else:  # an error of MLX, or a bug of ours
        from ..source.failures import sentence

        print(for_stream(f"{name}: {sentence(error)}", sys.stderr), file=sys.stderr)
    return 1
