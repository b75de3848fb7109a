"""Ctrl-C, SIGTERM and SIGHUP while a command's modules are still imported: it ends at once, without a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType

TERMINATED = {"server": 0}  # exit codes after SIGTERM; that of every other command is 143
AGAIN_S = 0.01
HUNG_UP = 129  # exit code after SIGHUP: the terminal was closed
OWN_HANDLERS = ("app", "apps.menubar")

_terminated = 143


def end_at_once_if_told() -> None:
    """From now on, where this process is one of this package's commands; until `run.run_command` takes over."""
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
        if signal.getsignal(number) == default:  # a shell ignores Ctrl-C in a background job, `nohup` SIGHUP
            signal.signal(number, _end)


def hand_over() -> None:
    """Ctrl-C raises Interrupted from now on. `run_command` sets the other handlers itself."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, interrupt)


class Interrupted(KeyboardInterrupt):
    """Ctrl-C. Python ends itself by SIGINT, not with our exit code, once its own class has left an `exec` of a text,
    even if it is caught: dataclasses are made that way, at many an import."""


class Terminated(SystemExit):
    """SIGTERM or SIGHUP. An exception, so that children and files are cleared up."""

    def __init__(self, code: int, number: int) -> None:
        super().__init__(code)
        self.number = number


def tell_again() -> None:
    """From now on a stop is told again that came while Python ran a `__del__`, where no exception has an effect."""
    usual = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        lost = unraisable.exc_value
        if isinstance(lost, KeyboardInterrupt | Terminated):
            number = lost.number if isinstance(lost, Terminated) else signal.SIGINT
            again = threading.Timer(AGAIN_S, os.kill, (os.getpid(), number))  # when the `__del__` has ended
            again.daemon = True
            again.start()
        else:
            usual(unraisable)

    sys.unraisablehook = hook


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """A handler, as Python's default_int_handler is one."""
    raise Interrupted


def _command() -> str | None:
    """As the console script calls it, or the module's name within the package; None in other programs."""
    if sys.argv[:1] == ["-m"]:  # Python looks for the module of `python -m`
        names = [argument.partition("mlx_flash.")[2] for argument in sys.orig_argv if "mlx_flash." in argument]
        return names[0] if names else None
    if sys.argv and os.path.basename(sys.argv[0]) == "mlxflash":
        return sys.argv[1] if len(sys.argv) > 1 else ""
    return None


def _end(number: int, _frame: FrameType | None) -> None:
    os._exit(130 if number == signal.SIGINT else HUNG_UP if number == signal.SIGHUP else _terminated)
