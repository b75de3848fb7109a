"""Every known hazard is found in the facts that show it, and in no others."""

from __future__ import annotations

from typing import Any

import pytest

from mlx_flash.machine.hazards import HAZARDS, NOTE, PROBLEM, findings

GOOD_MAC: dict[str, dict[str, Any]] = {
    "hardware": {"system": "macOS", "system_version": "26.1", "architecture": "arm64", "virtual": False},
    "versions": {"translated": False, "python_architecture": "arm64"},
    "environment": {"preloaded": [], "compiler": False, "temporary_folder": True, "mlx_variables": [], "unmet": []},
    "memory": {"total_bytes": 16e9, "pressure": "normal", "swap_used_bytes": 0, "limit_free_bytes": None},
    "power": {"low_power": False, "battery_percent": 80, "plugged_in": False, "heat": "nominal"},
    "device": {"kind": "gpu"},
    "tests": {"reader": True, "unknown": {}},
    "volume": {"network": False, "external": False, "spinning": False, "free_bytes": 90e9, "total_bytes": 494e9},
    "disk": {"direct": True, "rates": [{"piece_bytes": 1 << 20, "at_once": 16, "bytes_per_second": 3e9}]},
    "cache": {"stale_bytes": 0, "superseded_bytes": 0},
}
LINUX = {"hardware": {"system": "Linux", "architecture": "x86_64"}, "device": {"kind": "cpu"}}
SLOW = [{"piece_bytes": 1 << 20, "at_once": at_once, "bytes_per_second": 9e7 + at_once} for at_once in (1, 16)]

SHOWN: list[tuple[str, str, dict[str, dict[str, Any]]]] = [
    ("intel_mac", PROBLEM, {"hardware": {"architecture": "x86_64"}, "versions": {"python_architecture": "x86_64"}}),
    ("translated_python", PROBLEM, {"versions": {"translated": True}}),
    ("translated_python", PROBLEM, {"versions": {"python_architecture": "x86_64"}}),
    ("old_macos", PROBLEM, {"hardware": {"system_version": "13.7.1"}}),
    ("old_macos", NOTE, {"hardware": {"system_version": "14.0"}}),
    ("unmet_requirements", PROBLEM, {"environment": {"unmet": [{"package": "mlx", "wanted": "<0.33", "found": "1"}]}}),
    ("mlx_fails", PROBLEM, {"device": {"kind": None, "unknown": {"everything": "its process ended by SIGILL"}}}),
    ("failed_tests", PROBLEM, {"tests": {"reader": None, "unknown": {"reader": "wrong bytes"}}}),
    ("no_metal", PROBLEM, {"device": {"kind": "cpu"}, "environment": {"compiler": True}}),
    ("virtual_mac", NOTE, {"hardware": {"virtual": True}}),
    ("memory_pressure", NOTE, {"memory": {"pressure": "warning"}}),
    ("memory_pressure", PROBLEM, {"memory": {"pressure": "critical"}}),
    ("swap_in_use", NOTE, {"memory": {"swap_used_bytes": 3 << 30}}),
    ("limited_memory", NOTE, {"memory": {"limit_free_bytes": 4e9}}),
    ("few_open_files", PROBLEM, {"memory": {"open_files": 256}}),
    ("preloaded_libraries", NOTE, {"environment": {"preloaded": ["libtrace.so"]}}),
    ("slow_products", NOTE, {**LINUX, "environment": {"compiler": True}}),
    ("no_compiler", NOTE, {**LINUX, "environment": {"compiler": False, "preloaded": ["libopenblas.so.0"]}}),
    ("temporary_folder", PROBLEM, {"environment": {"temporary_folder": False}}),
    ("mlx_variables", NOTE, {"environment": {"mlx_variables": ["MLX_MAX_OPS_PER_BUFFER"]}}),
    ("low_power", NOTE, {"power": {"low_power": True}}),
    ("low_battery", NOTE, {"power": {"battery_percent": 9}}),
    ("too_hot", NOTE, {"power": {"heat": "critical"}}),
    ("network_volume", PROBLEM, {"volume": {"network": True, "file_system": "smbfs", "external": True}}),
    ("cloud_files", PROBLEM, {"volume": {"dataless_files": 2}}),
    ("cloud_files", NOTE, {"volume": {"cloud": True}}),
    ("external_disk", NOTE, {"volume": {"external": True, "connection": "USB"}}),
    ("spinning_disk", NOTE, {"volume": {"spinning": True}, "disk": {"rates": []}}),
    ("slow_disk", NOTE, {"disk": {"rates": SLOW}}),
    ("not_direct", NOTE, {"disk": {"direct": False}}),
    ("full_disk", NOTE, {"volume": {"free_bytes": 9e9}}),
    ("full_disk", PROBLEM, {"volume": {"free_bytes": 5e8}}),
    ("cache_not_writable", PROBLEM, {"cache": {"writable": False, "folder": "/proc/x"}}),
    ("stale_entries", NOTE, {"cache": {"superseded_bytes": 10**9}}),
]
UNSHOWN: list[dict[str, dict[str, Any]]] = [
    {},
    {"volume": {"spinning": True}},  # a virtual disk, which reads as fast as an SSD
    {"power": {"battery_percent": 9, "plugged_in": True}},
    {**LINUX, "environment": {"compiler": True, "preloaded": ["libopenblas.so.0"]}},
]


def changed(changes: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {**facts, **changes.get(name, {})} for name, facts in GOOD_MAC.items()}


@pytest.mark.parametrize(("name", "level", "changes"), SHOWN)
def test_a_hazard_is_found(name: str, level: str, changes: dict[str, dict[str, Any]]) -> None:
    (found,) = findings(changed(changes))
    assert (found["name"], found["level"]) == (name, level)
    assert not found["found"].endswith(".") and found["do"].endswith(".")


@pytest.mark.parametrize("changes", UNSHOWN)
def test_no_hazard_is_found(changes: dict[str, dict[str, Any]]) -> None:
    assert findings(changed(changes)) == []


def test_every_hazard_has_a_test() -> None:
    assert {look.__name__ for look in HAZARDS} == {name for name, _, _ in SHOWN}


def test_what_is_unknown_is_not_a_hazard() -> None:
    nothing = {name: dict.fromkeys(facts) for name, facts in GOOD_MAC.items()}
    assert findings(nothing) == findings({}) == []


def test_problems_come_first() -> None:
    found = findings(changed({"power": {"low_power": True}, "memory": {"pressure": "critical", "open_files": 1}}))
    assert [finding["level"] for finding in found] == [PROBLEM, PROBLEM, NOTE]
