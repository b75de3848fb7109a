"""Known hazards: what of a machine's facts keeps models from running, or from running well, and what to do about it.

Each function looks at the facts that `gathered` collects and returns a finding, or None. A fact that is unknown is not
a finding.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .told import EVERYTHING, Facts

NOTE, PROBLEM = "note", "problem"  # A problem keeps models from running; a note is about speed, room or wear.
LEAST_MACOS, WIRING_MACOS = 14, 15
LEAST_OPEN_FILES = 4096  # mlx-lm asks for so many
SWAP_BYTES = 1 << 30
NEARLY_FULL, FULL_BYTES = 0.05, 1 << 30  # share of a disk that is free, and bytes
SLOW_BYTES_PER_SECOND = 500e6  # of pieces of 1 MiB; SSDs of Macs with Apple silicon give more than a GB
LOW_BATTERY = 20  # percent

Finding = dict[str, str]


def findings(facts: Mapping[str, Facts]) -> list[Finding]:
    """The hazards that apply: {"name", "level" (NOTE or PROBLEM), "found", "do"}, problems first."""
    found = [
        {"name": look.__name__, "level": level, "found": said, "do": remedy}
        for look in HAZARDS
        if (told := look(_Facts(facts))) is not None
        for level, said, remedy in [told]
    ]
    return sorted(found, key=lambda finding: finding["level"] != PROBLEM)


class _Facts:
    """The facts by part and name; None for what is unknown."""

    def __init__(self, facts: Mapping[str, Facts]) -> None:
        self._facts = facts

    def __call__(self, part: str, name: str) -> Any:
        return self._facts.get(part, {}).get(name)

    def unknown(self, part: str) -> dict[str, str]:
        return self._facts.get(part, {}).get("unknown", {})

    @property
    def macos(self) -> int | None:
        """The first number of the version of macOS; None elsewhere."""
        number = re.match(r"\d+", self("hardware", "system_version") or "")
        return int(number[0]) if number and self("hardware", "system") == "macOS" else None


_Told = tuple[str, str, str] | None


def intel_mac(facts: _Facts) -> _Told:
    if (facts("hardware", "system"), facts("hardware", "architecture")) != ("macOS", "x86_64"):
        return None
    return PROBLEM, "this Mac has an Intel processor, for which MLX is not made", "Use a Mac with Apple silicon."


def translated_python(facts: _Facts) -> _Told:
    other = (facts("hardware", "architecture"), facts("versions", "python_architecture")) == ("arm64", "x86_64")
    if not (facts("versions", "translated") or other):
        return None
    return (
        PROBLEM,
        "this Python is made for Intel processors, and Rosetta translates it; MLX does not run in it",
        "Install a Python for arm64 (from python.org or Homebrew in /opt/homebrew), and mlx-flash-runtime with it.",
    )


def old_macos(facts: _Facts) -> _Told:
    if facts.macos is None or facts.macos >= WIRING_MACOS:
        return None
    version = f"this is macOS {facts('hardware', 'system_version')}"
    if facts.macos < LEAST_MACOS:
        return PROBLEM, f"{version}; MLX needs {LEAST_MACOS} or later", "Update macOS."
    return NOTE, f"{version}; memory can be wired from {WIRING_MACOS} on", f"Update to macOS {WIRING_MACOS} or later."


def unmet_requirements(facts: _Facts) -> _Told:
    if not (unmet := facts("environment", "unmet")):
        return None
    each = [f"{u['package']} {u['found'] or 'is missing'} (wanted: {u['wanted'] or 'any'})" for u in unmet]
    return (
        PROBLEM,
        f"packages are not those that this version was made with: {', '.join(each)}",
        "Reinstall it: `pip install --force-reinstall mlx-flash-runtime`.",
    )


def mlx_fails(facts: _Facts) -> _Told:
    if (why := facts.unknown("device").get(EVERYTHING)) is None:
        return None
    return PROBLEM, f"MLX does not start: {why}", "Reinstall it: `pip install --force-reinstall mlx`."


def failed_tests(facts: _Facts) -> _Told:
    failed = facts.unknown("tests")
    if not failed or facts.unknown("device").get(EVERYTHING):
        return None
    each = [f"{name}: {why}" for name, why in failed.items()]
    return PROBLEM, f"self-tests failed: {'; '.join(each)}", "Please report this with the output of `--json`."


def no_metal(facts: _Facts) -> _Told:
    if facts("hardware", "system") != "macOS" or facts("device", "kind") != "cpu":
        return None
    return PROBLEM, "MLX does not use the GPU of this Mac", "Start it from a session of a user who is logged in."


def virtual_mac(facts: _Facts) -> _Told:
    if facts("hardware", "system") != "macOS" or not facts("hardware", "virtual"):
        return None
    return NOTE, "this is a virtual Mac, whose GPU and disk are slower than the real ones", "Use the Mac itself."


def memory_pressure(facts: _Facts) -> _Told:
    if (pressure := facts("memory", "pressure")) not in ("warning", "critical"):
        return None
    level = PROBLEM if pressure == "critical" else NOTE
    return level, f"the system is short of memory ({pressure})", "Close other programs, or choose a smaller --memory."


def swap_in_use(facts: _Facts) -> _Told:
    if (used := facts("memory", "swap_used_bytes") or 0) < SWAP_BYTES:
        return None
    return (
        NOTE,
        f"{used / 1e9:.1f} GB are swapped out already",
        "Close other programs; what a model needs would be swapped as well.",
    )


def limited_memory(facts: _Facts) -> _Told:
    if (free := facts("memory", "limit_free_bytes")) is None:
        return None
    return (
        NOTE,
        f"a memory limit (cgroup) leaves this process {free / 1e9:.1f} GB",
        "Give the container more if it should use more; --memory counts within this limit.",
    )


def few_open_files(facts: _Facts) -> _Told:
    if (limit := facts("memory", "open_files")) is None or limit >= LEAST_OPEN_FILES:
        return None
    return (
        PROBLEM,
        f"a process may open {limit} files, and mlx-lm wants {LEAST_OPEN_FILES}",
        f"Allow them: `ulimit -Hn {LEAST_OPEN_FILES}`.",
    )


def preloaded_libraries(facts: _Facts) -> _Told:
    libraries = [name for name in facts("environment", "preloaded") or [] if "blas" not in name]
    if not libraries:
        return None
    return (
        NOTE,
        f"other libraries are loaded into every program: {', '.join(libraries)}",
        "Unset LD_PRELOAD (DYLD_INSERT_LIBRARIES on a Mac) if anything behaves oddly.",
    )


def slow_products(facts: _Facts) -> _Told:
    preloaded = facts("environment", "preloaded")
    if facts("hardware", "system") != "Linux" or facts("device", "kind") != "cpu" or preloaded is None:
        return None
    if any("blas" in name for name in preloaded):
        return None
    return (
        NOTE,
        "MLX's own matrix products on this CPU are slow for prompts",
        "Preload OpenBLAS (docs/models.md says how).",
    )


def no_compiler(facts: _Facts) -> _Told:
    if facts("device", "kind") != "cpu" or facts("environment", "compiler") is not False:
        return None
    return (
        NOTE,
        "there is no g++ here, so mx.compile is off",
        "Install it (on Debian or Ubuntu: `apt-get install g++`).",
    )


def temporary_folder(facts: _Facts) -> _Told:
    if facts("environment", "temporary_folder") is not False:
        return None
    return PROBLEM, "the folder for temporary files cannot be written to", "Set TMPDIR to a folder that can."


def mlx_variables(facts: _Facts) -> _Told:
    if not (names := facts("environment", "mlx_variables")):
        return None
    return NOTE, f"variables change what MLX does: {', '.join(names)}", "Unset them unless they are meant."


def low_power(facts: _Facts) -> _Told:
    if not facts("power", "low_power"):
        return None
    return (
        NOTE,
        "the system saves power, which makes models slower",
        "Switch Low Power Mode off (System Settings, Battery)."
        if facts.macos is not None
        else "Choose another power profile (`powerprofilesctl set balanced`).",
    )


def low_battery(facts: _Facts) -> _Told:
    percent = facts("power", "battery_percent")
    if percent is None or facts("power", "plugged_in") is not False or percent > LOW_BATTERY:
        return None
    return NOTE, f"the battery has {percent} percent left", "Plug it in: a long answer takes much power."


def too_hot(facts: _Facts) -> _Told:
    if (heat := facts("power", "heat")) not in ("serious", "critical"):
        return None
    return NOTE, f"the machine is hot ({heat}) and slows down", "Let it cool, and keep its openings free."


def network_volume(facts: _Facts) -> _Told:
    if not facts("volume", "network"):
        return None
    return (
        PROBLEM,
        f"the models are on another machine ({facts('volume', 'file_system')}); each token would wait for the network",
        "Copy the model to a disk of this machine, or set HF_HOME to a folder on one.",
    )


def cloud_files(facts: _Facts) -> _Told:
    count = facts("volume", "dataless_files") or 0
    if not (count or facts("volume", "cloud")):
        return None
    missing = f"; {count} of its files are only there" if count else ""
    return (
        PROBLEM if count else NOTE,
        f"the model is in iCloud, which may take its files from this disk{missing}",
        "Move the model to a folder that is not in iCloud, such as the home folder.",
    )


def external_disk(facts: _Facts) -> _Told:
    if not facts("volume", "external") or facts("volume", "network"):
        return None
    how = f" ({connection})" if (connection := facts("volume", "connection")) else ""
    return (
        NOTE,
        f"the models are on an external disk{how}, which is slower than the internal SSD",
        "Keep the models that you use on the internal disk, and do not unplug this one while a model runs.",
    )


def spinning_disk(facts: _Facts) -> _Told:
    if not facts("volume", "spinning"):
        return None
    slow = _rate(facts, 1 << 20)
    if slow is not None and slow >= SLOW_BYTES_PER_SECOND:
        return None  # no spinning disk reads so fast
    return NOTE, "the models are on a spinning disk, far too slow to stream from", "Move them to an SSD."


def slow_disk(facts: _Facts) -> _Told:
    rate = _rate(facts, 1 << 20)
    if rate is None or rate >= SLOW_BYTES_PER_SECOND:
        return None
    return (
        NOTE,
        f"the disk reads only {rate / 1e6:.0f} MB/s in pieces of 1 MiB",
        "Give models more --memory, so that they read less, or move them to a faster SSD.",
    )


def not_direct(facts: _Facts) -> _Told:
    if facts("disk", "direct") is not False:
        return None
    return (
        NOTE,
        "this file system cannot be read past the page cache, which takes memory beside --memory",
        "Keep models on another file system (APFS, ext4, XFS).",
    )


def full_disk(facts: _Facts) -> _Told:
    free, total = facts("volume", "free_bytes"), facts("volume", "total_bytes")
    if free is None or not total or free >= max(FULL_BYTES, NEARLY_FULL * total):
        return None
    level = PROBLEM if free < FULL_BYTES else NOTE
    return (
        level,
        f"the disk of the models has only {free / 1e9:.1f} GB free ({free / total:.0%})",
        "Remove what is not needed (`mlxflash cache`, `hf cache rm`): a full SSD is slower, and swap needs room.",
    )


def cache_not_writable(facts: _Facts) -> _Told:
    if facts("cache", "writable") is not False:
        return None
    return (
        PROBLEM,
        f"the cache folder {facts('cache', 'folder')} cannot be written to",
        "Set MLX_FLASH_CACHE to a folder that can.",
    )


def stale_entries(facts: _Facts) -> _Told:
    stale, superseded = facts("cache", "stale_bytes") or 0, facts("cache", "superseded_bytes") or 0
    if not stale + superseded:
        return None
    return (
        NOTE,
        f"the cache folder has {(stale + superseded) / 1e9:.2f} GB that nothing uses",
        "`mlxflash cache` lists the entries; --superseded and --remove remove them.",
    )


def _rate(facts: _Facts, piece_bytes: int) -> float | None:
    """The highest measured bytes per second for pieces of this size."""
    rates = facts("disk", "rates") or []
    return max((rate["bytes_per_second"] for rate in rates if rate["piece_bytes"] == piece_bytes), default=None)


HAZARDS: tuple[Callable[[_Facts], _Told], ...] = (
    intel_mac, translated_python, old_macos, unmet_requirements, mlx_fails, failed_tests, no_metal, virtual_mac,
    memory_pressure, swap_in_use, limited_memory, few_open_files,
    preloaded_libraries, slow_products, no_compiler, temporary_folder, mlx_variables,
    low_power, low_battery, too_hot,
    network_volume, cloud_files, external_disk, spinning_disk, slow_disk, not_direct, full_disk,
    cache_not_writable, stale_entries,
)  # fmt: skip
