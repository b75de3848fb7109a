"""Takes from the doctor's facts what a report may say of a machine."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from .form import DiskRate, ReportedMachine, in_words

# Field of the report -> part and name of the doctor's fact.
COUNTS = {
    **{name: ("hardware", name) for name in ("cores", "performance_cores", "efficiency_cores", "gpu_cores")},
    **{name: ("hardware", name) for name in ("memory_bytes", "virtual")},
    **{name: ("memory", name) for name in ("free_bytes", "swap_used_bytes", "pressure")},
    "device": ("device", "kind"),
    "recommended_bytes": ("device", "recommended_bytes"),
    **{name: ("power", name) for name in ("plugged_in", "low_power", "heat")},
    **{name: ("volume", name) for name in ("network", "external", "spinning")},
    "disk_direct": ("disk", "direct"),
    "disk_cached_share": ("disk", "cached_share"),
}
TEXTS = {
    **{name: ("hardware", name) for name in ("system", "system_version", "architecture", "chip", "model")},
    "device_architecture": ("device", "architecture"),
    **{name: ("volume", name) for name in ("file_system", "connection")},
    "python": ("versions", "python"),
}


def machine_of(facts: dict[str, Any]) -> ReportedMachine:
    """facts: see `mlx_flash.machine.gathered`. A fact that is out of bounds, or of another type, is left out."""
    sound: dict[str, Any] = {}
    for name, value in _fields(facts):
        try:
            sound[name] = getattr(ReportedMachine(**{name: value}), name)
        except ValidationError:
            continue
    return ReportedMachine(**sound)


def _fields(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for field, (part, name) in COUNTS.items():
        yield field, facts.get(part, {}).get(name)
    for field, (part, name) in TEXTS.items():
        yield field, in_words(facts.get(part, {}).get(name))
    rates = facts.get("disk", {}).get("rates") or []
    yield "disk", [DiskRate(**{name: rate[name] for name in DiskRate.model_fields}) for rate in rates]
    yield "self_tests", {name: passed for name, passed in facts.get("tests", {}).items() if name != "unknown"}
    yield "hazards", [finding["name"] for finding in facts.get("findings", [])]
    packages = facts.get("versions", {}).get("packages") or {}
    yield "packages", {name: in_words(version) for name, version in packages.items()}
