"""Makes the page of machine reports from the JSON files that `mlxflash report` wrote on other people's machines.

For a folder NAME it writes NAME.md beside it. A file that is not a report of this version is refused.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator
from pathlib import Path

from mlx_flash.errors import UsageError
from mlx_flash.report.form import MachineReport, ReportedAnswer, ReportedMachine, read_report
from mlx_flash.report.pasted import (
    escaped,
    figure,
    machine_line,
    model_line,
    same_text,
    share,
    size,
    speed,
    swapped,
    table,
)
from mlx_flash.source.ssd_writes import write_beside

FILE_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,79}\.json")
HEAD = """\
# How fast is it on other machines?

{count}

    mlxflash bench machines bench/results/machines

`mlxflash report` wrote the files on the machines themselves ([how](../../docs/report.md)). The figures are their
makers'; nobody measured them again. cold: the first answer of a process; warm: the one to the same prompt again.
Columns without a length are of the shortest prompt. Compare rows of one machine only."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder of the JSON files")


def main(arguments: argparse.Namespace) -> None:
    folder: Path = arguments.folder
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}. Give the one that holds the reports' JSON files.")
    reports = read_all(folder)
    target = folder.resolve().with_suffix(".md")
    write_beside(target, page(reports, folder.resolve().name).encode())
    print(f"written: {target}")
    print(json.dumps({"command": "machines", "reports": len(reports), "macs": macs(reports)}))


def read_all(folder: Path) -> dict[str, MachineReport]:
    """The reports by the names of their files. Raises UsageError, which names every file that cannot be used."""
    reports: dict[str, MachineReport] = {}
    refused = []
    for path in sorted(folder.glob("*.json")):
        try:
            if not FILE_NAME.fullmatch(path.name):
                raise UsageError(f"{path.name!r} is not a name of small letters, digits and hyphens. Rename it.")
            reports[path.name] = read_report(path)
        except UsageError as error:
            refused.append(str(error))
    if refused:
        raise UsageError("\n".join(refused))
    return reports


def macs(reports: dict[str, MachineReport]) -> int:
    return sum(report.machine is not None and report.machine.system == "macOS" for report in reports.values())


def page(reports: dict[str, MachineReport], folder: str) -> str:
    """The whole page. folder: name of the files' folder, for links."""
    count = f"Reports: **{len(reports)}**, from Macs: **{macs(reports) or 'none yet'}**. A command makes this page:"
    parts = [HEAD.format(count=count)]
    for name, report in reports.items():
        machine = "unknown machine" if report.machine is None else machine_line(report.machine)
        facts = [
            f"Same text, whatever the budget: **{same_text(report)}**",
            f"swapped: {swapped(report)}",
            f"energy: {report.energy}",
            f"[{name}]({folder}/{name}), {report.made}, mlx_flash {escaped(report.version)}",
        ]
        parts += [
            "",
            f"## {heading(report)}",
            "",
            f"{machine}. Model: {model_line(report.model)}.",
            "",
            *table(list(_rows(report))),
        ]
        parts += ["", f"{'; '.join(facts)}."]
    return "\n".join([*parts, ""])


def heading(report: MachineReport) -> str:
    """The system, what MLX computed on, and the chip."""
    machine = report.machine or ReportedMachine()
    kinds = " / ".join(escaped(kind) for kind in (machine.system, (machine.device or "").upper()) if kind)
    return f"{kinds or 'Unknown system'}: {escaped(machine.chip or 'unknown chip')}"


def _rows(report: MachineReport) -> Iterator[dict[str, str]]:
    """A row for each budget that was measured: heading -> cell."""
    for budget in report.budgets:
        runs = [run for run in report.runs if run.budget == budget.name]
        if not runs:
            continue
        of = {(run.prompt_tokens, answer.state): answer for run in runs for answer in run.answers}
        short, long = min(report.prompts, default=0), max(report.prompts, default=0)
        last = of.get((short, "warm")) or next(iter(of.values()))
        row = {"memory": size(budget.bytes), "in slots": share(runs[0].slot_share)}
        row |= {f"tokens/s {state}": _speed(report, of.get((short, state))) for state in ("cold", "warm")}
        row["forecast"] = figure(budget.forecast_tokens_per_second)
        for prompt in dict.fromkeys((short, long)):
            answer = of.get((prompt, "cold"))
            row[f"first token s, {prompt} tokens"] = "-" if answer is None else f"{answer.first_token_s:.2f}"
        peak = max(answer.peak_bytes / max(1, run.planned_bytes) for run in runs for answer in run.answers)
        row |= {
            "MB/token": figure(last.bytes_per_token / 1e6),
            "hits": share(last.hit_rate),
            "peak/plan": f"{peak:.2f}",
        }
        yield row


def _speed(report: MachineReport, answer: ReportedAnswer | None) -> str:
    return "-" if answer is None else speed(answer, report.tokens)
