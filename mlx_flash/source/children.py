"""Child processes: they run no code from the working directory, and they do not outlive this process."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
INTERRUPTED_S = 2.0  # time for a child to end by the Ctrl-C that the terminal sent to both
TERMINATED_S = 3.0  # time after SIGTERM; both together are less than stopping.GRACE_S


def child_environment(**more: str) -> dict[str, str]:
    """The environment for a child `python -m`: that of this process, and `more`.

    `-m` looks for modules in the working directory first, which may be a checkpoint's folder. PYTHONSAFEPATH prevents
    that. (The option -P cannot be used: a packaged app is its own interpreter, and knows only -m.) If this package
    itself is in the working directory, as in a clone that is not installed, the child must find it there as well.
    """
    safe = {} if PACKAGE.parent == Path.cwd() else {"PYTHONSAFEPATH": "1"}
    return {**os.environ, **safe, **more}


def run_child(command: list[str]) -> int:
    """Runs `command --exit-with-stdin` to its end and returns its exit code.

    An exception during the wait ends the child by signals. If this process ends for any reason, the child's standard
    input closes, which ends the child as well.
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
    """Waits for the child, sends SIGTERM, and kills it; kills it at once if another exception comes."""
    try:
        for ask, seconds in ((lambda: None, patience_s), (child.terminate, TERMINATED_S)):
            ask()
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(seconds)
                return
    finally:
        child.kill()  # has no effect if it has ended
        child.wait()
