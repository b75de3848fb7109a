"""Handlers for Ctrl-C, SIGTERM and SIGHUP while a command is still importing: it ends at once, without a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from types import FrameType

TERMINATED = {"server": 0, "service.start": 0}  # exit codes after SIGTERM; every other command exits with 143
AGAIN_S = 0.01
HUNG_UP = 129  # exit code after SIGHUP (the terminal was closed)
OWN_HANDLERS = ("app", "apps.menubar")

interrupted = False  # whether `interrupt` has raised
_terminated = 143


def end_at_once_if_told() -> None:
    """Ends the process at once on Ctrl-C, SIGTERM or SIGHUP, until `run.run_command` takes over.

    It changes nothing in a process that is not one of this package's commands.
    """
    global _terminated
    command = _command()
    if command is None or command in OWN_HANDLERS:
        return
    _terminated = TERMINATED.get(command, 143)
    defaults = {
        signal.SIGINT: signal.default_int_handler,
        signal.SIGTERM: signal.SIG_DFL,
        signal.SIGHUP: signal.SIG_DFL,
    }
    for number, default in defaults.items():
        # A signal that is already ignored stays so: Ctrl-C in a shell's background job, SIGHUP under `nohup`.
        if signal.getsignal(number) == default:
            signal.signal(number, _end)


def hand_over() -> None:
    """Makes Ctrl-C raise Interrupted from now on. `run_command` sets the other handlers itself."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, interrupt)


class Interrupted(KeyboardInterrupt):
    """Raised by Ctrl-C.

    If KeyboardInterrupt itself leaves an `exec` of a text, Python later ends by SIGINT instead of our exit code, even
    if the exception is caught. Dataclasses run such an `exec`, so this happens in many imports. A subclass avoids it.
    """


class Terminated(SystemExit):
    """Raised by SIGTERM or SIGHUP; as an exception, so that children and files are cleaned up."""

    def __init__(self, code: int, number: int) -> None:
        super().__init__(code)
        self.number = number


def tell_again() -> None:
    """Sends a stop again if it came while Python ran a `__del__`, where exceptions have no effect."""
    usual = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        lost = unraisable.exc_value
        if isinstance(lost, KeyboardInterrupt | Terminated):
            number = lost.number if isinstance(lost, Terminated) else signal.SIGINT
            threading.Thread(target=_send_after, args=(sys._getframe(), number), daemon=True).start()
        else:
            usual(unraisable)

    sys.unraisablehook = hook


def _send_after(hook: FrameType, number: int) -> None:
    """Sends the signal once the frame has ended. Before, its exception would be lost as well."""
    while True:
        time.sleep(AGAIN_S)
        try:
            hook.clear()
        except RuntimeError:  # It is still running.
            continue
        os.kill(os.getpid(), number)
        return


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """A signal handler like Python's default_int_handler; raises Interrupted."""
    global interrupted
    interrupted = True
    raise Interrupted


def _command() -> str | None:
    """The command's name in the console script, or the module's name in this package; None in other programs."""
    if sys.argv[:1] == ["-m"]:  # Python is still looking for the module of `python -m`.
        names = [argument.partition("mlx_flash.")[2] for argument in sys.orig_argv if "mlx_flash." in argument]
        return names[0] if names else None
    if sys.argv and os.path.basename(sys.argv[0]) == "mlxflash":
        return sys.argv[1] if len(sys.argv) > 1 else ""
    return None


def _end(number: int, _frame: FrameType | None) -> None:
    os._exit(130 if number == signal.SIGINT else HUNG_UP if number == signal.SIGHUP else _terminated)
