"""Which mount a folder or file is in."""

from __future__ import annotations

from pathlib import Path

import psutil


def mount_of(path: Path) -> tuple[str, str]:
    """(device, file system) of the mount that a resolved path is in. Raises OSError."""
    found = [each for each in psutil.disk_partitions(all=True) if path.is_relative_to(each.mountpoint)]
    if not found:
        raise OSError("no mount holds the folder")
    deepest = max(len(Path(each.mountpoint).parts) for each in found)
    last = [each for each in found if len(Path(each.mountpoint).parts) == deepest][-1]  # It hides earlier ones.
    return last.device, last.fstype
