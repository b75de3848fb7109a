"""What the comparisons on mixtures of experts share: a checkpoint as it is, budgets, sides, a table, a plot."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_flash.errors import UsageError
from mlx_flash.loading.config import holds_mixture
from mlx_flash.loading.plan import parse_memory
from mlx_flash.source.resolve import resolve_source

from . import compare
from .baselines.mixture_contenders import PART, Side, Task
from .compare import mb, ms
from .tools import disk, subprocess_json
from .tools.cgroup import memory_group
from .tools.report import COLOURS, cached_share, environment, forget_cached, refuse_to_swap
from .tools.subprocess_json import KilledError

KIND = "a mixture of experts"
SHARE = 0.25  # of the experts, that have a slot if no budget is given
NAMES = {"resident": "mlx-lm, all in memory", "lazy": "mlx-lm, lazily", "naive": "every layer whole", "flash": "flash"}


def add_arguments(parser: argparse.ArgumentParser) -> Any:
    """Adds and returns a group of options."""
    group = parser.add_argument_group("mixtures of experts", "read from the checkpoint as it is, without a conversion")
    group.add_argument(
        "--memory",
        metavar="SIZE",
        help=f"budget of the whole process, as 4GB (default: what gives {SHARE:.0%}% of the experts a slot)",
    )
    return group


def folder_of(model: str | None) -> Path | None:
    """The checkpoint that --model names if it is a mixture of experts, else None."""
    if model is None:
        return None
    folder = resolve_source(model, None, print)
    return folder if holds_mixture(folder) else None


@dataclass(frozen=True)
class Subject:
    """What is measured. about: what `mixture_sides.examine` tells. ids: as many tokens as are needed."""

    folder: Path
    about: dict[str, Any]
    ids: list[int]
    prompt: int
    fence: str | None  # why no memory cgroup limits the sides; None if one does

    @property
    def label(self) -> str:
        """What the outputs call the model."""
        name = self.folder.resolve().name
        return f"{name} (synthetic weights and routing)" if self.about["synthetic"] else name

    @property
    def files(self) -> list[Path]:
        """Those with the weights, the largest first."""
        return sorted(map(Path, self.about["files"]), key=lambda path: -path.stat().st_size)

    def budget_for(self, slots: int) -> int:
        """What gives `slots` experts of each layer a slot."""
        return int(self.about["smallest_bytes"] + (slots - 1) * self.about["layers"] * self.about["expert_bytes"])

    def limit_for_whole_layers(self, budget: int) -> int:
        """Of the side "naive": the budget, or where that is less, room for the two layers that it has at a time."""
        two_layers = 2 * self.about["experts"] * self.about["expert_bytes"]
        return max(budget, self.budget_for(0) + two_layers)

    def budget(self, memory: str | None, force: bool) -> int:
        """Of --memory, or its default. Raises UsageError where it does not do."""
        least = self.about["smallest_bytes"]
        budget = parse_memory(memory) if memory else self.budget_for(max(1, round(SHARE * self.about["experts"])))
        if budget < least:
            raise UsageError(
                f"--memory is {budget / 1e6:.0f} MB and the model needs {least / 1e6:.0f} MB: give that, or leave it "
                "out."
            )
        refuse_to_swap(budget, "the budget", force)
        return budget

    def describe(self) -> dict[str, Any]:
        """What every result begins with."""
        keys = ("synthetic", "weights_bytes", "experts_bytes", "expert_bytes", "layers", "experts", "choices")
        return {
            "environment": environment(self.folder),
            "model": self.label,
            **{key: self.about[key] for key in keys},
            "prompt": self.prompt,
            "memory_limit": self.fence or "enforced by a memory cgroup",
        }

    def run(self, side: Side, tokens: int, limit: int | None, label: str) -> dict[str, Any]:
        """Runs a side over the prompt and `tokens` tokens in a cgroup of `limit` bytes; its row.

        It begins with nothing of the checkpoint in the page cache, as far as the system can be told so. Of what the
        kernel kills for memory the row has "killed": True and nothing but what was there before.
        """
        rate = disk.sequential_rate(self.files[:1], disk.RATE_BYTES)
        for file in self.files:
            forget_cached(file)
        row: dict[str, Any] = {
            **{"side": side.name, "limit_bytes": limit, "memory_bytes": side.memory, "io": side.io},
            "sequential_bytes_per_second": rate["bytes"] / rate["seconds"],
            "cached_share_before": self._cached(),
            "killed": False,
        }
        task = Task(str(self.folder), self.ids[: self.prompt + tokens], self.prompt, time.time(), label)
        question = ("run", asdict(side), asdict(task))
        if limit is None or self.fence:
            told = subprocess_json.ask(PART, question, label)
        else:
            with memory_group(limit) as group:
                try:
                    told = subprocess_json.ask(PART, question, label, group)
                except KilledError:
                    return row | {"killed": True, "cached_share_after": self._cached()}
                row["cgroup_peak_bytes"] = group.peak_bytes()
        samples = told.pop("samples")
        row |= compare.figures(samples) | {"steady_s": compare.steady([samples])}
        return row | told | {"cached_share_after": self._cached()}

    def _cached(self) -> dict[str, float | None]:
        return {file.name: cached_share(file) for file in self.files}


def opened(arguments: argparse.Namespace, folder: Path) -> Subject:
    """What the arguments name. Raises UsageError, before anything long begins, for what cannot be used."""
    span = arguments.prompt + arguments.tokens
    about = subprocess_json.ask(PART, ("examine", str(folder), span), "examine")
    compare.refuse_beyond(span, about["positions"])
    ids = compare.read_ids(arguments.text, folder, span, about["vocabulary"])
    return Subject(folder, about, ids, arguments.prompt, compare.fence_problem(arguments.no_cgroup))


# -- showing -------------------------------------------------------------------------------------------------


def show_head(result: dict[str, Any]) -> None:
    print(
        f"\n{result['model']}: {result['weights_bytes'] / 1e9:.2f} GB, {result['layers']} layers of "
        f"{result['experts']} experts of {result['expert_bytes'] / 1e6:.2f} MB, {result['choices']} for a token; "
        f"memory {result['memory_limit']}"
    )
    print(f"disk: {result['disk_first']['state']}\n")


def table(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """A line for every row, means of a token unless said otherwise."""
    head = ["per token", "tokens", "limit MB", "peak MB", "slots", "hits", "MB", "reads", "GB/s", "in sequence"]
    head += ["read ms", "wait", "manage", "compute", "mean ms", "median", "p90", "prompt s", "first token s"]
    head += ["load s", "written MB", "cached"]
    lines = []
    for row, name in zip(rows, names, strict=True):
        if row["killed"]:
            limit, rest = mb(row["limit_bytes"]), [""] * (len(head) - 4)
            lines.append([name, "", limit, "killed for memory", *rest])
            continue
        quick, spread = row["bytes_per_second"], row["total_spread_s"]
        cells = [name, str(row["tokens"]), mb(row["limit_bytes"]), mb(row["peak_memory_bytes"])]
        cells += [f"{row['slot_share']:.0%}" if "slot_share" in row else "-"]
        cells += ["-" if row["hit_rate"] is None else f"{row['hit_rate']:.1%}", mb(row["bytes"])]
        cells += [f"{row['reads']:,.0f}", "-" if quick is None else f"{quick / 1e9:.2f}"]
        cells += [f"{row['sequential_bytes_per_second'] / 1e9:.2f}"]
        cells += [ms(row[f"{part}_s"]) for part in ("read", "wait", "manage", "compute", "total")]
        cells += [ms(spread["median"]), ms(spread["p90"]), f"{row['prompt']['total_s']:.2f}"]
        cells += [f"{row['first_token_s']:.2f}", f"{row['load_s']:.2f}", mb(row["written_bytes"])]
        shares = [share for share in row["cached_share_after"].values() if share is not None]
        lines.append([*cells, f"{max(shares):.0%}" if shares else "-"])
    compare.table(head, lines)
    print(
        "slots: of all experts. first token: from the start of the process. written: to the disk, by the process. "
        "cached: of the checkpoint,\nin the page cache after the side; what was there before is dropped. in sequence: "
        "GB/s of the disk just before."
    )


def stack(axes: Any, rows: Sequence[dict[str, Any]], names: Sequence[str]) -> None:
    """A bar for every row that was not killed: what a token's time is made of."""
    pairs = [(row, name) for row, name in zip(rows, names, strict=True) if not row["killed"]]
    parts = {"wait_s": "reading", "manage_s": "management", "compute_s": "compute"}
    longest = max(row["total_s"] for row, _ in pairs) * 1e3
    for y, (row, _) in enumerate(pairs):
        left = 0.0
        for key, part in parts.items():
            label = {"reading": "reading (waited for)"}.get(part, part) if y == 0 else None
            axes.barh(y, row[key] * 1e3, left=left, height=0.6, color=COLOURS[part], label=label)
            left += row[key] * 1e3
        note = f"{ms(row['total_s'])} ms   reads {mb(row['bytes'])} MB" if row["bytes"] else f"{ms(row['total_s'])} ms"
        axes.text(left + 0.01 * longest, y, note, va="center", fontsize=8.5)
    axes.set_yticks(range(len(pairs)), [name for _, name in pairs])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.35 * longest)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel("ms per token (mean, first tokens counted)")
    axes.legend(loc="lower right", fontsize=8)
