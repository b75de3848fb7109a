"""The facts of a machine as short blocks of text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from ..machine.hazards import NOTE, PROBLEM
from ..machine.told import EVERYTHING, Facts
from .printable import printable

WIDTH = 96  # columns
EIGHTHS = tuple("01234567")
LABEL = 11  # columns of the names at the left
TESTS = {
    "shared_memory": "memory that host and device share",
    "reader": "reader",
    "packed_products": "products with quantised rows",
    "products": "products",
}


def examined(facts: Facts) -> str:
    """All blocks, then the findings. facts: from `gathered`."""
    blocks: dict[str, Callable[[Facts], Iterator[str]]] = {
        "machine": _machine,
        "software": _software,
        "memory": _memory,
        "power": _power,
        "disk": _disk,
        "self-tests": _tests,
        "cache": _cache,
        "trials": _trials,
    }
    lines = [line for name, say in blocks.items() for line in _block(name, list(say(facts)))]
    return printable("\n".join([*lines, "", *_findings(facts["findings"])]))


def _block(name: str, lines: list[str]) -> list[str]:
    """The lines beside the name of their block, wrapped. A line that begins with a space is a row of a table."""
    wrapped = [
        part for line in lines for part in ([line] if line[:1] == " " else textwrap.wrap(line, WIDTH - LABEL) or [""])
    ]
    return [f"{'' if index else name:<{LABEL}}{line}".rstrip() for index, line in enumerate(wrapped)]


class _Part:
    """One part of the facts: its values in words, "unknown" with the reason for those that are not known."""

    def __init__(self, facts: Facts, name: str) -> None:
        self.facts = facts[name]
        self._unknown = self.facts.get("unknown", {})

    def __getitem__(self, name: str) -> Any:
        return self.facts.get(name)

    @property
    def failed(self) -> str | None:
        """The reason why nothing of the part is known; None if something is."""
        return self._unknown.get(EVERYTHING)

    def text(self, name: str, form: Callable[[Any], str] = str) -> str:
        """A value in words."""
        value = self[name]
        return form(value) if value is not None else f"unknown ({self._unknown.get(name) or self.failed or 'not told'})"


def _gb(nbytes: float) -> str:
    return f"{nbytes / 1e9:.1f} GB"


def _machine(facts: Facts) -> Iterator[str]:
    part = _Part(facts, "hardware")
    cores = part.text("cores", lambda count: f"{count} cores")
    if part["performance_cores"] and part["efficiency_cores"]:
        cores += f" ({part['performance_cores']} fast, {part['efficiency_cores']} efficient)"
    if part["gpu_cores"]:
        cores += f", {part['gpu_cores']} GPU cores"
    virtual = ", a virtual machine" if part["virtual"] else ""
    yield f"{part.text('chip')}, {cores}, {part.text('memory_bytes', _gb)} memory{virtual}"
    system = "" if part["system"] == "Linux" else f"{part.text('system')} "
    yield f"{system}{part.text('system_version')}"


def _software(facts: Facts) -> Iterator[str]:
    part, device = _Part(facts, "versions"), _Part(facts, "device")
    packages = part["packages"] or {}
    named = [f"{name} {version}" for name, version in packages.items() if version is not None]
    yield f"{', '.join(named) or part.text('packages')}, Python {part.text('python')}"
    if device["kind"] == "gpu":
        most = f", which may use {_gb(device['recommended_bytes'])}" if device["recommended_bytes"] else ""
        yield f"MLX computes on the GPU{most}"
    else:
        yield f"MLX computes on {device.text('kind', lambda _: 'the CPU')}"


def _memory(facts: Facts) -> Iterator[str]:
    part = _Part(facts, "memory")
    yield (
        f"{part.text('free_bytes', _gb)} of {part.text('total_bytes', _gb)} can be used now; pressure: "
        f"{part.text('pressure')}; swapped out: {part.text('swap_used_bytes', _gb)}"
    )


def _power(facts: Facts) -> Iterator[str]:
    part = _Part(facts, "power")
    battery = "no battery"
    if part["battery_percent"] is not None:
        plugged = {True: ", plugged in", False: ", not plugged in"}.get(part["plugged_in"], "")
        battery = f"battery at {part['battery_percent']} %{plugged}"
    elif part.failed or "battery_percent" in part.facts.get("unknown", {}):
        battery = f"battery {part.text('battery_percent')}"
    saving = part.text("low_power", lambda on: "on" if on else "off")
    heat = f"; heat: {part.text('heat')}" if "heat" in part.facts else ""
    yield f"{battery}; power saving: {saving}{heat}"


def _disk(facts: Facts) -> Iterator[str]:
    volume, disk = _Part(facts, "volume"), _Part(facts, "disk")
    kinds = [word for word in ("network", "external", "spinning") if volume[word]]
    where = f" ({', '.join(kinds)})" if kinds else ""
    free = f"{volume.text('free_bytes', _gb)} of {volume.text('total_bytes', _gb)} free"
    yield f"{volume.text('file_system')}{where}, {free}"
    if disk.failed:
        yield f"speed: {disk.text('rates')}"
        return
    rates = {(rate["piece_bytes"], rate["at_once"]): rate["bytes_per_second"] for rate in disk["rates"]}
    depths = sorted({at_once for _, at_once in rates})
    past = "past the page cache" if disk["direct"] else "through the page cache, so perhaps from memory"
    if disk["direct"] and (disk["cached_share"] or 0) > 0.9:
        past += ", which holds this file, so perhaps from memory"
    yield f"MB/s of random reads, {past}; by size and by how many are read at once:"
    yield " " + " " * 9 + "".join(f"{at_once:>9}" for at_once in depths)
    for size in sorted({size for size, _ in rates}):
        name = f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
        row = (f"{rates[size, at_once] / 1e6:>9.0f}" if (size, at_once) in rates else " " * 9 for at_once in depths)
        yield f" {name:>9}" + "".join(row)


def _tests(facts: Facts) -> Iterator[str]:
    part = _Part(facts, "tests")
    if part.failed:
        yield part.text("tests")
        return
    passed = [said for name, said in TESTS.items() if part[name]]
    if passed:
        yield f"passed: {', '.join(passed)}"
    for name, said in TESTS.items():
        if not part[name]:
            yield f"failed: {said}: {part.text(name)}"


def _cache(facts: Facts) -> Iterator[str]:
    part = _Part(facts, "cache")
    if part.failed:
        yield part.text("folder")
        return
    stores = sum(entry["kind"] == "store" for entry in part["entries"])
    kept = part["conversations"]
    holds = f"{_counted(stores, 'store')}, {_counted(kept, 'kept conversation')}"
    yield f"{part['total_bytes'] / 1e9:.2f} GB in {part['folder']}: {holds}"
    yield f"written to the disk today: {_written(part['written'])}"


def _written(record: dict[str, Any]) -> str:
    """Today's bytes by what they are for, the most first, and the bounds of what recurs."""
    most = record["most_per_day"]
    bounds = {kind: f" (at most {nbytes / 1e9:.3g} GB a day)" for kind, nbytes in most.items()}
    today = sorted(record["today"].items(), key=lambda item: -item[1])
    return ", ".join(f"{_size(nbytes)} of {kind}{bounds.get(kind, '')}" for kind, nbytes in today) or "nothing"


def _size(nbytes: float) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e8 else f"{nbytes / 1e6:.2f} MB"


def _trials(facts: Facts) -> Iterator[str]:
    """What trials chose for each model and class of budgets."""
    part = _Part(facts, "trials")
    if part.failed:
        yield part.text("models")
    elif not part["models"]:
        yield "none yet; they are made while a model runs"
    for model in part["models"] or []:
        old = "" if model["same_machine"] else " (from another version of MLX or another machine; not used)"
        yield f"{Path(str(model['about'].get('model'))).name}{old}"
        for share, result in sorted(model["budgets"].items()):
            yield f"{_eighths(share)} of it in memory: {_choices(result) or 'nothing was chosen yet'}"


def _eighths(share: str) -> str:
    """A class of budgets as a share of the model, such as "25% to 38%"."""
    if share not in EIGHTHS:
        return "all"
    return f"{int(share) / 8:.0%} to {(int(share) + 1) / 8:.0%}"


def _choices(result: Any) -> str:
    trials = result.get("trials") if isinstance(result, dict) else None
    found = trials if isinstance(trials, dict) else {}
    words = {name: trial.get("choice") for name, trial in found.items() if isinstance(trial, dict)}
    said = {name: ("off", "on")[value] if isinstance(value, bool) else value for name, value in words.items()}
    return ", ".join(f"{name} {value}" for name, value in said.items())


def _findings(findings: list[dict[str, str]]) -> Iterator[str]:
    for finding in findings:
        said = f"{finding['found'][:1].upper()}{finding['found'][1:]}. {finding['do']}"
        yield from _block(finding["level"], [said])
    problems, notes = (sum(finding["level"] == level for finding in findings) for level in (PROBLEM, NOTE))
    yield from _block("result", [f"{_counted(problems, 'problem')}, {_counted(notes, 'note')}"])


def _counted(count: int, word: str) -> str:
    return f"{count or 'no'} {word}{'s' * (count != 1)}"
