"""The machine itself: chip, cores, memory, system, and the versions of what runs on it. MLX is not imported."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..flash.sysctl import sysctl_number, sysctl_text
from .told import Facts, told

PACKAGES = ("mlx-flash-runtime", "mlx", "mlx-lm", "mlx-vlm", "transformers", "numpy", "huggingface_hub")
ASK_S = 20.0  # seconds for system_profiler


def hardware() -> Facts:
    """What the machine is. Nothing in it names the user or the machine.

    chip, model (Apple's, such as "Mac16,1"), architecture ("arm64", "x86_64"): text. cores, performance_cores,
    efficiency_cores, gpu_cores: counts. memory_bytes. system: "macOS" or "Linux". system_version, kernel: text.
    virtual: whether it is a virtual machine. A fact that this kind of system does not have is left out.
    """
    asked: dict[str, Callable[[], object]] = {
        "system": _system,
        "system_version": _system_version,
        "kernel": platform.release,
    }
    asked |= {"architecture": _architecture, "chip": _chip}
    asked |= {"cores": _cores, "memory_bytes": _memory_bytes, "virtual": _virtual}
    if sys.platform == "darwin":
        asked |= {
            "model": lambda: sysctl_text("hw.model"),
            "performance_cores": lambda: sysctl_number("hw.perflevel0.physicalcpu"),
            "efficiency_cores": lambda: sysctl_number("hw.perflevel1.physicalcpu"),
            "gpu_cores": _gpu_cores,
        }
    return told(asked)


def versions() -> Facts:
    """python: text. python_architecture: what the interpreter was built for. translated: whether Rosetta runs it.
    packages: name -> version, None for one that is not installed."""
    return told(
        {
            "python": platform.python_version,
            "python_architecture": platform.machine,
            "translated": _translated,
            "packages": lambda: {name: _version(name) for name in PACKAGES},
        }
    )


def _system() -> str:
    return {"darwin": "macOS", "linux": "Linux"}.get(sys.platform, sys.platform)


def _system_version() -> str:
    if sys.platform == "darwin":
        return sysctl_text("kern.osproductversion")
    return platform.freedesktop_os_release().get("PRETTY_NAME", "")


def _architecture() -> str:
    """The processor's, not the interpreter's: Rosetta tells programs that they run on x86-64."""
    if sys.platform == "darwin":
        return "arm64" if _is_arm_mac() else "x86_64"
    return platform.machine()


def _is_arm_mac() -> bool:
    try:
        return sysctl_number("hw.optional.arm64") == 1
    except OSError:  # an Intel Mac does not know it
        return False


def _chip() -> str:
    if sys.platform == "darwin":
        return sysctl_text("machdep.cpu.brand_string")
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("model name", "Model"):
            return value.strip()
    raise OSError("/proc/cpuinfo does not name it")


def _cores() -> int:
    if sys.platform == "darwin":
        return sysctl_number("hw.physicalcpu")
    return len(os.sched_getaffinity(0))  # those that this process may use


def _memory_bytes() -> int:
    if sys.platform == "darwin":
        return sysctl_number("hw.memsize")
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _virtual() -> bool:
    if sys.platform == "darwin":
        return sysctl_number("kern.hv_vmm_present") == 1
    return " hypervisor" in Path("/proc/cpuinfo").read_text() or Path("/sys/hypervisor/type").exists()


def _gpu_cores() -> int:
    done = subprocess.run(
        ["/usr/sbin/system_profiler", "-json", "SPDisplaysDataType"],
        capture_output=True, timeout=ASK_S, stdin=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    return int(json.loads(done.stdout)["SPDisplaysDataType"][0]["sppci_cores"])


def _translated() -> bool:
    try:
        return sysctl_number("sysctl.proc_translated") == 1
    except OSError:  # neither an Intel Mac nor another system knows it
        return False


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
