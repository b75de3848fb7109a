"""Does the plan hold, and is it close? Generates with every model and budget, in a memory cgroup of that budget.

The kernel kills a process that needs more than its cgroup allows. Each cell is a process of its own, and its prompt
fills the context. `memory-models` makes models of every kind for this command.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_flash.cli.run import whole_number
from mlx_flash.errors import FlashError
from mlx_flash.flash.files import is_store
from mlx_flash.loading.load import plan
from mlx_flash.loading.plan import ENDLESS, parse_memory
from mlx_flash.source.children import child_environment
from mlx_flash.source.resolve import demo_folder
from mlx_flash.text.tokenizer import load_tokenizer

from .tools import subprocess_json
from .tools.cgroup import memory_group

CLOSE = 0.9  # lowest accepted peak / plan, for plans of 1 GB or more
NAMES = ("smallest", "+25%", "half", "all")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", type=Path, nargs="+", required=True, help="stores, or checkpoints of mixtures of experts"
    )
    parser.add_argument(
        "--budgets",
        default=",".join(NAMES),
        help="comma-separated list of sizes and names: the smallest budget, a quarter more, slots for half of the "
        "units, slots for all (default: %(default)s)",
    )
    parser.add_argument("--least", default="0B", metavar="SIZE", help="lower bound of a budget (default: %(default)s)")
    parser.add_argument(
        "--predictors", default="auto", help="comma-separated list of predictors for stores (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=whole_number(1), default=16, help="tokens to generate (default: %(default)s)")
    parser.add_argument(
        "--context", type=whole_number(64), default=1024, help="tokens to plan for and to fill (default: %(default)s)"
    )
    parser.add_argument(
        "--log", type=Path, help="file to append a line of JSON to for every cell; cells found in it are not repeated"
    )


def main(arguments: argparse.Namespace) -> None:
    rows = [json.loads(line) for line in arguments.log.read_text().splitlines()] if _exists(arguments.log) else []
    print(
        f"{'model':<18}{'predictor':<10}{'budget':<9}{'MB':>7}{'plan':>7}{'peak':>7}{'ratio':>8}{'killed':>8}{'exit':>6}"
    )
    for row in rows:
        print(_line(row), flush=True)
    for model, predictor, name, budget in _cells(arguments, list(rows)):
        row = {"model": model.name, "predictor": predictor, "name": name} | _run(arguments, model, predictor, budget)
        rows.append(row)
        print(_line(row), flush=True)
        if arguments.log:
            with arguments.log.open("a") as file:
                print(json.dumps(row), file=file)
    ratios = [row["peak"] / row["plan"] for row in rows if "plan" in row]
    if ratios:
        print(f"{len(ratios)} cells: the peak is {min(ratios):.3f} to {max(ratios):.3f} of the plan")
    print(json.dumps({"command": "peak-memory", "context": arguments.context, "rows": rows}))
    if any(row["exit"] or row["kills"] or row["peak"] > row["plan"] for row in rows):
        raise FlashError("a run was killed, failed, or went over its plan (see above).")
    if far := [row for row in rows if row["plan"] >= 1e9 and row["peak"] < CLOSE * row["plan"]]:
        raise FlashError(f"{len(far)} peaks are below {CLOSE:.0%} of a plan of 1 GB or more (see above).")


def _exists(path: Path | None) -> bool:
    return path is not None and path.exists()


def _cells(arguments: argparse.Namespace, known: list[dict[str, Any]]) -> Iterator[tuple[Path, str, str, int]]:
    """(model, predictor, name of the budget, budget) of every cell. Yields each budget once and skips `known` rows."""
    least = parse_memory(arguments.least)
    for model in arguments.model:
        for predictor in arguments.predictors.split(",") if is_store(model) else ["auto"]:
            done = [row for row in known if (row["model"], row["predictor"]) == (model.name, predictor)]
            names = [name for name in arguments.budgets.split(",") if name not in [row["name"] for row in done]]
            named = {}
            if set(names) & set(NAMES):
                question = [str(model), predictor, arguments.context]
                named = subprocess_json.ask("mlx_flash.bench.peak_memory", question, model.name)
                named["+25%"] = min(named["all"], int(1.25 * max(least, named["smallest"])))
            taken = {row["budget"] for row in done}
            for name in names:
                budget = max(least, named[name] if name in named else parse_memory(name))
                if budget not in taken:
                    taken.add(budget)
                    yield model, predictor, name, budget


def budgets_of(model: str, predictor: str, context: int) -> dict[str, int]:
    """Budgets in bytes by name. Runs in a process like the one that will generate."""
    import mlx_flash.generate  # noqa: F401  # the plan counts the process's own size

    planned = plan(model, memory=ENDLESS, predictor=predictor, context=context)
    smallest = int(1.01 * planned.smallest)  # the size of a process varies a little
    values = {"smallest": smallest, "half": planned.bytes_for(0.5), "all": planned.everything}
    return {name: max(smallest, value) for name, value in values.items()}


def _run(arguments: argparse.Namespace, model: Path, predictor: str, budget: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "mlx_flash.generate", "--model", str(model), "--json"]
    command += ["--predictor", predictor, "--max-tokens", str(arguments.tokens), "--temp", "0"]
    command += ["--context", str(arguments.context), "--prompt", prompt_of(arguments.context - arguments.tokens)]
    with memory_group(budget) as group:
        done = group.run([*command, "--memory", f"{budget}B"], child_environment())
        row: dict[str, Any] = {"budget": budget, "exit": done.returncode, "kills": group.kills()}
        row["cgroup_peak"] = group.peak_bytes()
    if done.returncode == 0:
        result = json.loads(done.stdout.splitlines()[-1])
        row |= {"plan": result["plan"]["total"], "peak": result["peak_memory_bytes"], "parts": result["plan"]}
    return row


def _line(row: dict[str, Any]) -> str:
    start = f"{row['model']:<18}{row['predictor']:<10}{row['name']:<9}{row['budget'] / 1e6:>7.0f}"
    end = f"{row['kills']:>8}{row['exit']:>6}"
    if "plan" not in row:
        return f"{start}{'-':>7}{'-':>7}{'-':>8}{end}"
    return f"{start}{row['plan'] / 1e6:>7.0f}{row['peak'] / 1e6:>7.0f}{row['peak'] / row['plan']:>8.3f}{end}"


def prompt_of(tokens: int) -> str:
    """A text of `tokens` tokens for the demo model's tokenizer, which random checkpoints share."""
    tokenizer = load_tokenizer(demo_folder())
    ids = [*tokenizer.encode("the " * tokens)][: tokens - 1]
    return str(tokenizer.decode(ids[1:]))


if __name__ == "__main__":
    subprocess_json.answer(budgets_of)
