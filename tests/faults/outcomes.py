"""The results of actions under faults, and the loop that injects one fault after another."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from faults import Shim  # type: ignore[import-not-found]  # found beside this file

from mlx_flash.errors import FlashError

LATE_MS = 50


def say(kind: str, injected: bool, result: str, detail: str = "") -> None:
    """Prints one line for campaign.py."""
    print(json.dumps({"kind": kind, "injected": injected, "result": result, "detail": detail[:300]}), flush=True)


def outcome(action: Callable[[], Any], expected: Any) -> tuple[str, str]:
    """(result, detail): "right", "clear" (an error of this package that names a file), "unnamed" (one that does not),
    "wrong", "traceback"."""
    try:
        found = action()
    except FlashError as error:
        text = str(error)
        return ("clear" if "/" in text else "unnamed"), text
    except Exception as error:
        return "traceback", f"{type(error).__name__}: {error}"
    if found == expected:
        return "right", ""
    if isinstance(found, dict) and isinstance(expected, dict):
        found = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    return "wrong", str(found)


def inject(
    rng: random.Random,
    runs: int,
    kinds: tuple[str, ...],
    calls: str,
    path: Path | str,
    expected: Any,
    action: Callable[[], Any],
    before: Callable[[], None] = lambda: None,
) -> None:
    """Injects `runs` faults of random kinds at random calls of `action`. After an error, runs `action` without a fault.

    calls, path: the calls and files to hit, as in `Shim.arm`. before: called before each `action`.
    """
    shim = Shim()
    before()
    shim.arm("", calls, path)
    assert action() == expected
    total = max(1, shim.seen())
    for run in range(runs):
        before()
        kind = kinds[run % len(kinds)]
        parameter = LATE_MS if kind == "late" else rng.randrange(1 << 30)
        shim.arm(kind, calls, path, rng.randrange(total), rng.choice((1, 1, 3)), parameter)
        result, detail = outcome(action, expected)
        injected = shim.disarm() > 0
        if injected and result != "right":
            before()
            after, more = outcome(action, expected)
            if after != "right":
                result, detail = "wrong", f"after {kind} ({detail}): {after} {more}"
        say(kind, injected, result, detail)
