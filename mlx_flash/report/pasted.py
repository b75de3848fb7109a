"""The Markdown text of a report, to be pasted into an issue. It says what the file says, and no more."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from .form import DiskRate, MachineReport, ReportedAnswer, ReportedMachine, ReportedModel, ReportedRun

CONTENTS = (
    "chip, cores, memory, swap, disk and its speed; system, Python and packages with their versions",
    "power supply, power saving, heat; self-tests; the names of the hazards that `mlxflash doctor` knows",
    'the model\'s repository id; of a local folder only "a local folder" and whole numbers of its config.json',
    "times, bytes, hits, peak memory, swap and energy of the runs; what was tried while they ran, and what was chosen",
    "the day on which they were made",
)
ABSENT = (
    "names of users, of the machine, of folders or files; paths",
    "serial numbers, addresses, variables of the environment",
    "anything that you or the model wrote: the prompt is the beginning of an old novel",
)


def escaped(text: str) -> str:
    """A text that Markdown shows as it is, on one line and within a cell of a table."""
    return re.sub(r"([\\`*_\[\]<>|~&$#:@]|(?<=www)\.)", r"\\\1", " ".join(text.split()))


def markdown(report: MachineReport) -> str:
    quick = ", quick" if report.quick else ""
    lines = [f"### Machine report of mlx_flash {escaped(report.version)} ({report.made}{quick})", ""]
    if report.machine is not None:
        lines += [f"- Machine: {machine_line(report.machine)}", *_state(report.machine)]
    lines += [f"- Model: {model_line(report.model)}"]
    lines += ["", *table([row for run in _in_order(report) for row in _rows(report, run)]), ""]
    lines += [f"- {line}" for line in _findings(report)]
    return "\n".join([*lines, ""])


def machine_line(machine: ReportedMachine) -> str:
    """What the machine is."""
    cores = f"{machine.cores} cores" if machine.cores is not None else None
    if cores and machine.performance_cores is not None and machine.efficiency_cores is not None:
        cores += f" ({machine.performance_cores} + {machine.efficiency_cores})"
    virtual = "a virtual machine" if machine.virtual else None
    return ", ".join(
        filter(
            None,
            [
                f"**{escaped(machine.chip or 'unknown chip')}**",
                None if machine.model is None else escaped(machine.model),
                virtual,
                cores,
                None if machine.gpu_cores is None else f"{machine.gpu_cores} GPU cores",
                None if machine.memory_bytes is None else f"{machine.memory_bytes / 2**30:.0f} GiB",
                system_of(machine),
                f"MLX {escaped(machine.packages.get('mlx') or '?')} on the {(machine.device or '?').upper()}",
            ],
        )
    )


def system_of(machine: ReportedMachine) -> str:
    names = dict.fromkeys(filter(None, [machine.system, machine.system_version]))
    return escaped(" ".join(names) or "unknown system")


def _state(machine: ReportedMachine) -> Iterator[str]:
    at = " ".join(escaped(each) for each in (machine.file_system, machine.connection) if each)
    rates = [
        f"{_piece(rate.piece_bytes)}, {rate.at_once} at once: {rate.bytes_per_second / 1e9:.2f} GB/s"
        for rate in best_rates(machine)
    ]
    yield f"- Random reads of the disk ({at or 'unknown'}): {'; '.join(rates) or 'not measured'}"
    if machine.hazards:
        yield f"- Hazards: {', '.join(escaped(name) for name in machine.hazards)}"
    failed = [escaped(name) for name, passed in machine.self_tests.items() if not passed]
    passed = "passed" if machine.self_tests else "not made"
    yield f"- Self-tests: {'failed: ' + ', '.join(failed) if failed else passed}"


def _piece(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB" if nbytes >= 1 << 20 else f"{nbytes >> 10} KiB"


def best_rates(machine: ReportedMachine) -> list[DiskRate]:
    """For each size of a piece the fastest rate."""
    sizes = sorted({rate.piece_bytes for rate in machine.disk})
    return [max((r for r in machine.disk if r.piece_bytes == size), key=lambda r: r.bytes_per_second) for size in sizes]


def model_line(model: ReportedModel) -> str:
    kind = "" if model.model_type is None else f" ({escaped(model.model_type)})"
    bits = f", {model.numbers['bits']} bits" if "bits" in model.numbers else ""
    streamed = model.layers * model.units_per_layer * model.unit_bytes
    return (
        f"{escaped(model.name)}{kind}{bits}, {size(streamed)} in {escaped(model.units)} and "
        f"{size(model.resident_bytes)} resident"
    )


def _in_order(report: MachineReport) -> list[ReportedRun]:
    """The runs by budget and prompt; they ran in the order in which they are important."""
    of = {budget.name: budget.bytes for budget in report.budgets}
    return sorted(report.runs, key=lambda run: (of[run.budget], run.prompt_tokens))


def _rows(report: MachineReport, run: ReportedRun) -> Iterator[dict[str, str]]:
    """A row for each answer: heading -> cell."""
    budget = next(each for each in report.budgets if each.name == run.budget)
    for answer in run.answers:
        yield {
            "budget": f"{budget.name}, {size(budget.bytes)}",
            "in slots": share(run.slot_share),
            "prompt": f"{run.prompt_tokens}",
            "answer": answer.state,
            "first token s": f"{answer.first_token_s:.2f}",
            "tokens/s": speed(answer, report.tokens),
            "forecast": figure(budget.forecast_tokens_per_second),
            "MB/token": figure(answer.bytes_per_token / 1e6),
            "hits": share(answer.hit_rate),
            "wait ms": f"{1e3 * answer.wait_s:.1f}",
            "peak/plan": f"{answer.peak_bytes / run.planned_bytes:.2f}" if run.planned_bytes else "-",
            "joules": figure(answer.joules),
        }


def speed(answer: ReportedAnswer, tokens: int) -> str:
    """Tokens per second, and of how many if the time cut the answer short."""
    cut = f" (of {answer.generated_tokens})" if answer.generated_tokens < tokens else ""
    return figure(answer.tokens_per_second) + cut


def figure(value: float | None) -> str:
    """A number with three digits, as far as they are before the point or just behind it."""
    return (
        "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
    )


def size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def same_text(report: MachineReport) -> str:
    """Whether the budget changed the text: yes, no, or that it was not compared."""
    if not report.same_text:
        return "not compared"
    return "yes" if all(each.same for each in report.same_text) else "NO"


def _findings(report: MachineReport) -> Iterator[str]:
    each = [
        f"{found.tokens} tokens of {found.answers} answers to {found.prompt_tokens} tokens, budgets: {found.budgets}"
        + ("" if found.first_difference is None else f": different from token {found.first_difference} on")
        for found in report.same_text
    ]
    yield "cold: the first answer of a process; warm: the one to the same prompt again"
    yield "in slots: what has a place in memory; wait ms: for reads, per token; peak/plan: peak memory / planned memory"
    compared = f" ({'; '.join(each)})" if each else ""
    yield f"Same text, whatever the budget, cold and warm: **{same_text(report)}**{compared}"
    yield f"Swapped while a model ran: {swapped(report)}"
    yield f"Energy: {report.energy}"
    if chosen := _chosen(report):
        yield f"Chosen by trials: {'; '.join(chosen)}"
    reasons = dict.fromkeys(f"{left.prompt_tokens} tokens, {left.budget}, {left.reason}" for left in report.left_out)
    if reasons:
        yield f"Left out ({len(report.left_out)} answers): {'; '.join(reasons)}"
    yield f"It took {report.seconds:.0f} s."


def _chosen(report: MachineReport) -> list[str]:
    """Whatever trials chose, each once, with the budgets that it was chosen in."""
    found: dict[str, dict[str, None]] = {}
    for run in report.runs:
        for name, each in run.choices.items():
            if each.by == "trial":
                word = each.choice if not isinstance(each.choice, bool) else "on" if each.choice else "off"
                found.setdefault(f"{name} {word}", {})[run.budget] = None
    return [f"{choice} ({', '.join(budgets)})" for choice, budgets in found.items()]


def swapped(report: MachineReport) -> str:
    """How much the system moved between memory, swap and the compressor while the runs ran."""
    kinds = (("swapped_in", "in"), ("swapped_out", "out"), ("compressed", "compressed"))
    sums = [(sum(getattr(run, f"{name}_bytes") for run in report.runs), word) for name, word in kinds]
    return ", ".join(f"{nbytes / 1e6:.1f} MB {word}" for nbytes, word in sums if nbytes or word != "compressed")


def table(rows: Sequence[dict[str, str]]) -> list[str]:
    """The lines of a table, without columns that have no figure. rows: heading -> cell."""
    if not rows:
        return ["No run was finished."]
    headings = [heading for heading in rows[0] if any(row[heading] != "-" for row in rows)]
    cells = [[row[heading] for heading in headings] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (headings, ["---"] * len(headings), *cells)]
