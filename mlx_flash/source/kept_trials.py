"""The results of trials on this machine, kept in the cache folder: a file for each model.

A file holds the conditions of its results, and results for each class of budgets. If a condition is another one now
(MLX's version, the machine, the model's files, the disk), its results are not used any more, and the next ones replace
the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil

from ..errors import UsageError
from .cached import TRIALS, cache_folder
from .model_notes import note_path, state_of
from .mounts import mount_of
from .ssd_writes import read_small, write_small

SUFFIX = ".json"
CLASSES = 8  # of budgets, by the share of the model that is in memory


class KeptTrials:
    """The kept results of one model under the conditions of now.

    folder: the model's. files: those that units are read from. share: of the model that is in memory. device: MLX's.
    """

    def __init__(self, folder: Path, files: list[Path], share: float, device: str) -> None:
        self._folder, self._files, self._device = folder.resolve(), files, device
        self._class = str(min(CLASSES, int(CLASSES * share)))

    def read(self) -> dict[str, Any]:
        """The results for this class of budgets; empty if there are none, or if they do not hold any more."""
        with contextlib.suppress(OSError, UsageError):
            found = read_small(self._path()).get("budgets")
            result = found.get(self._class) if isinstance(found, dict) and self._holds() else None
            return result if isinstance(result, dict) else {}
        return {}

    def write(self, results: dict[str, Any]) -> None:
        """Keeps the results for this class of budgets. Does nothing if the folder cannot be written to."""
        with contextlib.suppress(OSError, UsageError):
            path = self._path()
            others = read_small(path).get("budgets") if self._holds() else None
            budgets = {**(others if isinstance(others, dict) else {}), self._class: results}
            write_small(path, json.dumps({"about": self._about(), "budgets": budgets}))

    def _holds(self) -> bool:
        return bool(read_small(self._path()).get("about") == self._about())

    def _path(self) -> Path:
        return note_path(TRIALS, self._folder, SUFFIX)

    def _about(self) -> dict[str, Any]:
        """The conditions. Raises OSError."""
        return {
            "model": str(self._folder),
            "files": state_of(self._files),
            "disk": _disk_of(self._files[0]),
            "device": self._device,
            **_machine(),
        }


def kept_trials() -> list[dict[str, Any]]:
    """The kept results of all models, for people: plain JSON, without those that cannot be read.

    Each has "about", the conditions of the results, "same_machine", whether MLX and the machine are those of now, and
    "budgets": by the class of budgets (in eighths of the model in memory, from "0" to "8"), the results as
    `Trials.results` makes them.
    """
    found = []
    with contextlib.suppress(OSError, UsageError):
        for path in sorted((cache_folder() / TRIALS).glob(f"*{SUFFIX}")):
            contents = read_small(path)
            about, budgets = contents.get("about"), contents.get("budgets")
            if isinstance(about, dict) and isinstance(budgets, dict):
                same = {key: about.get(key) for key in _machine()} == _machine()
                found.append({"about": about, "same_machine": same, "budgets": budgets})
    return found


def _machine() -> dict[str, Any]:
    try:
        mlx = version("mlx")
    except PackageNotFoundError:
        mlx = None
    system = [platform.system(), platform.mac_ver()[0] or platform.release(), platform.machine()]
    return {"mlx": mlx, "system": system, "cores": os.cpu_count(), "memory": psutil.virtual_memory().total}


def _disk_of(path: Path) -> list[str]:
    """The device and the file system that a file is on; empty if the system does not tell."""
    with contextlib.suppress(OSError):
        return list(mount_of(path.resolve()))
    return []
