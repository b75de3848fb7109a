"""The disk that a folder is on: its file system, where it stands, and how much of it is free."""

from __future__ import annotations

import os
import plistlib
import shutil
import subprocess
import sys
from pathlib import Path

from ..flash.dataless import is_dataless
from ..source.mounts import mount_of
from .told import Facts, told

NETWORK = (
    "nfs",
    "nfs4",
    "smbfs",
    "cifs",
    "smb3",
    "afpfs",
    "webdav",
    "9p",
    "fuse.sshfs",
    "fuse.rclone",
    "ceph",
    "lustre",
)
VIRTUAL = ("vd", "xvd", "nbd")  # names of disks of virtual machines: what they say of themselves is made up
ASK_S = 20.0  # seconds for diskutil


def volume(folder: Path) -> Facts:
    """The disk of a folder, or of the nearest one above it that exists.

    file_system: text. network: whether it is another machine's. external: whether the disk is outside the machine.
    spinning: whether it turns. connection: how it is connected, on macOS ("Apple Fabric", "USB"). total_bytes,
    free_bytes. cloud: whether iCloud keeps the folder. dataless_files: files of it whose contents are not here.
    """
    here = next(each for each in (folder, *folder.parents) if each.exists()).resolve()
    asked = {
        "file_system": lambda: mount_of(here)[1],
        "network": lambda: mount_of(here)[1].lower() in NETWORK,
        "total_bytes": lambda: shutil.disk_usage(here).total,
        "free_bytes": lambda: shutil.disk_usage(here).free,
        "cloud": lambda: in_cloud(here),
        "dataless_files": lambda: _dataless_files(here),
    }
    if sys.platform == "darwin":
        asked |= {
            "external": lambda: not _diskutil(here)["Internal"],
            "spinning": lambda: not _diskutil(here)["SolidState"],
            "connection": lambda: _diskutil(here)["BusProtocol"],
        }
    else:
        asked |= {
            "external": lambda: _of_block_device(here, "removable") == "1",
            "spinning": lambda: _of_block_device(here, "queue/rotational") == "1",
        }
    return told(asked)


def in_cloud(folder: Path) -> bool:
    """Whether a folder is in iCloud Drive, by its path."""
    return "/Library/Mobile Documents/" in f"{folder}/"


def _dataless_files(folder: Path) -> int:
    return sum(path.is_file() and is_dataless(path.stat()) for path in folder.iterdir())


def _diskutil(folder: Path) -> dict[str, object]:
    done = subprocess.run(
        ["/usr/sbin/diskutil", "info", "-plist", mount_of(folder)[0]],
        capture_output=True, timeout=ASK_S, stdin=subprocess.DEVNULL, check=True,
    )  # fmt: skip
    return plistlib.loads(done.stdout)


def _of_block_device(folder: Path, name: str) -> str:
    """What Linux tells of the disk below a folder. A partition has it from its disk. Raises OSError."""
    number = os.stat(folder).st_dev
    device = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve()
    if device.name.startswith(VIRTUAL):
        raise OSError("a virtual disk does not tell")
    for place in (device, device.parent):
        if (place / name).is_file():
            return (place / name).read_text().strip()
    raise OSError(f"the system names no disk behind its {mount_of(folder)[1]} file system")
