"""Processes that this one starts: they run no code of the working directory, and do not outlive it."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
INTERRUPTED_S = 2.0  # for a child to end by the Ctrl-C that a terminal sent to both
TERMINATED_S = 3.0  # then to end by SIGTERM; together less than stopping.GRACE_S


def child_environment(**more: str) -> dict[str, str]:
    """This process's environment for a child `python -m`, with `more`.

    `-m` would look for modules in the working directory first, which may be a checkpoint's folder: PYTHONSAFEPATH
    forbids it. (The option -P would not do: a packaged app is its own interpreter, and knows -m only.) But where this
    package itself was found there, in a clone that is not installed, the child must find it there as well.
    """
    safe = {} if PACKAGE.parent == Path.cwd() else {"PYTHONSAFEPATH": "1"}
    return {**os.environ, **safe, **more}


def run_child(command: list[str]) -> int:
    """Runs `command --exit-with-stdin` to its end and returns its exit code.

    What ends this wait ends the child: an exception by signals, and this process's end, however it comes, by the end
    of the child's standard input.
    """
    child = subprocess.Popen(
        [*command, "--exit-with-stdin"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, env=child_environment()
    )
    try:
        return child.wait()
    except BaseException as error:
        _end(child, INTERRUPTED_S if isinstance(error, KeyboardInterrupt) else 0)
        raise
    finally:
        assert child.stdin is not None
        child.stdin.close()


def _end(child: subprocess.Popen[bytes], patience_s: float) -> None:
    """Waits for it, asks it to end, and kills it; at once if another exception comes."""
    try:
        for ask, seconds in ((lambda: None, patience_s), (child.terminate, TERMINATED_S)):
            ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(seconds)
                return
    finally:
        child.kill()  # nothing, if it has ended
        child.wait()
