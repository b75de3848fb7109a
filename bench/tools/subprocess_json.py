"""Calls a function in a child process, in a memory cgroup if one is given: JSON in, one line of JSON out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

from mlx_flash.errors import FlashError, UsageError
from mlx_flash.source.children import child_environment

from .cgroup import MemoryGroup, run_child


class KilledError(FlashError):
    """The kernel killed the process for memory."""


def ask(part: str, question: Sequence[Any], name: str, group: MemoryGroup | None = None) -> dict[str, Any]:
    """Runs `python -m part` and returns the result of its `answer`. name: the name of the process in errors.

    The process writes no compiled files (-B), so that everything it writes to the disk comes from the model. Raises
    KilledError, or FlashError or UsageError as the process did.
    """
    command = [sys.executable, "-B", "-m", part, json.dumps(question)]
    environment = child_environment()
    done = run_child(command, environment) if group is None else group.run(command, environment)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1]) if done.stdout else {}
    if "error" in result:
        raise (UsageError if done.returncode == UsageError.exit_code else FlashError)(result["error"])
    if done.returncode == 0:
        return result
    ended = f"the contender {name} ended with exit code {done.returncode}"
    if group is not None and (kills := group.kills()):
        raise KilledError(f"{ended}, killed by the kernel {kills} times (see above).")
    raise FlashError(f"{ended} (see above).")


def answer(work: Callable[..., dict[str, Any]]) -> None:
    """Passes the question to `work` in the child process and prints its result, or the error for `ask` to raise."""
    try:
        print(json.dumps(work(*json.loads(sys.argv[1]))))
    except (FlashError, OSError) as error:
        print(json.dumps({"error": str(error)}))
        sys.exit(error.exit_code if isinstance(error, FlashError) else FlashError.exit_code)
