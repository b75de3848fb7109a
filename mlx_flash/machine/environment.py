"""What surrounds the process: variables, libraries that are loaded before others, the compiler, required packages."""

from __future__ import annotations

import os
import shutil
from importlib.metadata import PackageNotFoundError, requires, version

from .told import Facts, told

DISTRIBUTION = "mlx-flash-runtime"
PRELOADS = ("LD_PRELOAD", "DYLD_INSERT_LIBRARIES")
OWN_VARIABLES = "MLX_FLASH_"  # prefix of this package's variables


def environment() -> Facts:
    """preloaded: names of libraries that are loaded before others. compiler: whether g++ is here, which `mx.compile`
    needs on the CPU. temporary_folder: whether $TMPDIR can be written to. mlx_variables: names of MLX's variables that
    are set. unmet: [{"package", "wanted", "found"}] of required packages, found None for a missing one."""
    return told(
        {
            "preloaded": _preloaded,
            "compiler": lambda: shutil.which("g++") is not None,
            "temporary_folder": lambda: os.access(os.environ.get("TMPDIR") or "/tmp", os.W_OK | os.X_OK),
            "mlx_variables": lambda: sorted(n for n in os.environ if n.startswith("MLX_") and OWN_VARIABLES not in n),
            "unmet": _unmet,
        }
    )


def _preloaded() -> list[str]:
    return [
        os.path.basename(library)
        for variable in PRELOADS
        for library in os.environ.get(variable, "").replace(" ", ":").split(":")
        if library
    ]


def _unmet() -> list[dict[str, str | None]]:
    from packaging.requirements import Requirement

    unmet: list[dict[str, str | None]] = []
    for text in requires(DISTRIBUTION) or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(wanted.name)
        except PackageNotFoundError:
            found = None
        if found is None or not wanted.specifier.contains(found, prereleases=True):
            unmet.append({"package": wanted.name, "wanted": str(wanted.specifier), "found": found})
    return unmet
