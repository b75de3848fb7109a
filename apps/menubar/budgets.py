"""Finds sensible memory budgets for a model: python -m mlx_flash.apps.menubar.budgets [MODEL]

A separate process makes the plan, because that imports MLX, which the app never does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import psutil

from mlx_flash.source.children import child_environment

if TYPE_CHECKING:
    from mlx_flash.loading.plan import Plan

GB = 10**9
FIXED_GB = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96)  # for a model whose plan cannot be made yet
NOTES = {
    "25%": "a quarter of the {units} in memory",
    "50%": "half of the {units} in memory",
    "smallest": "the smallest",
    "100%": "all {units} in memory",
}
SERVER_BYTES = 10_000_000  # The server may be, or become, this much larger than in the plan: threads, buffers.


@dataclass(frozen=True)
class Budget:
    size: int  # bytes
    note: str


def fixed_budgets() -> tuple[Budget, ...]:
    """Budgets of round sizes, up to the machine's memory."""
    total = psutil.virtual_memory().total
    return tuple(Budget(size * GB, "") for size in FIXED_GB if size * GB <= total)


def served_budgets(library: dict[str, Any], kind: str) -> tuple[Budget, ...]:
    """The budgets in the answer of /library, which are none while no model is loaded. kind: of units."""
    notes = {rounded_up(int(entry["bytes"])): str(entry["text"]) for entry in library.get("budgets") or ()}
    return tuple(Budget(size, NOTES.get(note, note).format(units=kind)) for size, note in sorted(notes.items()))


def planned_budgets(model: str | None) -> tuple[Budget, ...] | None:
    """Budgets from the model's plan; None if the plan cannot be made: not downloaded, not converted, or not a model."""
    command = [sys.executable, "-m", "mlx_flash.apps.menubar.budgets", *([] if model is None else [model])]
    environment = child_environment(HF_HUB_OFFLINE="1")  # Asking for a plan must not start a download.
    try:
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        ) as process:
            try:
                # Not communicate(), which closes standard input first: that would end the process.
                assert process.stdout is not None
                output = process.stdout.read()
            except BaseException:
                process.kill()
                raise
        return tuple(Budget(**entry) for entry in json.loads(output)) or None
    except (OSError, ValueError, TypeError):
        return None


def ask_plan(model: str | None) -> list[Budget]:
    """Budgets from the model's plan, in this process. Nothing is downloaded, converted or loaded. Raises FlashError."""
    from mlx_flash.flash.files import is_store
    from mlx_flash.source.resolve import cached_store_path, resolve_source

    source = resolve_source(model, None, lambda _: None)
    import mlx_flash.server.app
    import mlx_flash.server.serving  # noqa: F401  # The plan counts this process, which must be as large as the server.
    from mlx_flash.loading.config import holds_mixture
    from mlx_flash.loading.load import plan
    from mlx_flash.loading.plan import ENDLESS

    mixture = holds_mixture(source)
    if not mixture and not is_store(source) and not is_store(cached_store_path(source, model)[0]):
        return []
    return points(plan(model, memory=ENDLESS), "experts" if mixture else "neurons")


def points(plan: Plan, units: str) -> list[Budget]:
    """The smallest budget, and those for some shares of the units in memory. For equal sizes, the last note counts."""
    sizes = plan.budgets()
    notes = {rounded_up(sizes[name]): note.format(units=units) for name, note in NOTES.items()}
    return [Budget(size, note) for size, note in sorted(notes.items())]


def rounded_up(size: int) -> int:
    """The size with room for the server's growth, rounded up to two digits or 10 MB. More precision is of no use."""
    step = max(10**7, 10 ** (len(str(size)) - 2))
    return -(-(size + SERVER_BYTES) // step) * step


def main() -> None:
    from mlx_flash.cli import stopping
    from mlx_flash.errors import FlashError

    stopping.end_with_stdin()
    try:
        budgets = ask_plan(sys.argv[1] if len(sys.argv) > 1 else None)
    except FlashError as error:
        sys.exit(str(error))
    print(json.dumps([asdict(budget) for budget in budgets]))


if __name__ == "__main__":
    main()
