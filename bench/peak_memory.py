"""Does the plan hold? Generates in a memory cgroup that kills above the budget, at several budgets."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys

from mlx_flash.children import child_environment
from mlx_flash.commands import whole_number
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.finding import demo_folder
from mlx_flash.loading import load_tokenizer
from mlx_flash.plan import parse_memory

from .cgroup import memory_group


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="store, best much larger than the budgets")
    parser.add_argument(
        "--budgets", default="smallest,2GB,3GB", help="separated by commas; `smallest` asks (default: %(default)s)"
    )
    parser.add_argument("--tokens", type=whole_number(1), default=32, help="to generate (default: %(default)s)")
    parser.add_argument(
        "--context", type=whole_number(64), default=512, help="tokens to plan for and to fill (default: %(default)s)"
    )
    parser.add_argument("--predictor", default="auto", help="default: %(default)s")


def main(arguments: argparse.Namespace) -> None:
    rows = []
    command = [sys.executable, "-m", "mlx_flash.generate", "--model", arguments.model, "--json"]
    command += ["--predictor", arguments.predictor, "--max-tokens", str(arguments.tokens)]
    command += ["--context", str(arguments.context), "--prompt", prompt_of(arguments.context - arguments.tokens)]
    for name in arguments.budgets.split(","):
        budget = smallest_budget(command) if name == "smallest" else parse_memory(name)
        with memory_group(budget) as group:
            done = group.run([*command, "--memory", str(budget) + "B"], child_environment())
            row = {"budget": budget, "exit": done.returncode, "kills": group.kills(), "cgroup_peak": group.peak_bytes()}
        if done.returncode == 0:
            result = json.loads(done.stdout.splitlines()[-1])
            keys = ("peak_memory_bytes", "generation_tps", "hit_rate", "bytes_per_token")
            row |= {"planned": result["plan"]["total"], **{key: result[key] for key in keys}}
        rows.append(row)
    print(f"{'budget MB':>10}{'planned':>9}{'peak RSS':>10}{'RSS/plan':>10}{'killed':>8}{'tokens/s':>10}{'hits':>8}")
    for row in rows:
        if row["exit"]:
            print(f"{row['budget'] / 1e6:>10.0f}  ended with exit code {row['exit']}, killed {row['kills']}")
            continue
        hits = "-" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}"
        print(
            f"{row['budget'] / 1e6:>10.0f}{row['planned'] / 1e6:>9.0f}{row['peak_memory_bytes'] / 1e6:>10.0f}"
            f"{row['peak_memory_bytes'] / row['planned']:>10.2f}{row['kills']:>8}"
            f"{row['generation_tps']:>10.3f}{hits:>8}"
        )
    print(json.dumps({"command": "peak-memory", "model": arguments.model, "rows": rows}))
    if any(row["exit"] or row["peak_memory_bytes"] > row["planned"] for row in rows):
        raise FlashError("a run was killed, failed, or went over its plan (see above).")


def prompt_of(tokens: int) -> str:
    """Text that the demo model's tokenizer, which random checkpoints have too, makes `tokens` tokens of."""
    tokenizer = load_tokenizer(demo_folder())
    ids = [*tokenizer.encode("the " * tokens)][: tokens - 1]
    return str(tokenizer.decode(ids[1:]))


def smallest_budget(command: list[str]) -> int:
    """What generate names when it is given too little, in bytes, with 1 % for what varies from run to run."""
    done = subprocess.run([*command, "--memory", "1MB"], capture_output=True, text=True, env=child_environment())
    found = re.search(r"smallest that would do is (\d+)MB", done.stderr)
    if found is None:
        raise UsageError(f"generate did not name a smallest budget:\n{done.stderr}")
    return int(int(found[1]) * 1_000_000 * 1.01)
