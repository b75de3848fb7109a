"""Checks that a tag, the version, the change log and the packages of a release agree: `check_release.py TAG FOLDER`."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "mlx_flash_runtime-{}.tar.gz",
    "mlx_flash_runtime-{}-py3-none-macosx_14_0_arm64.whl",
    "mlx_flash_runtime-{}-py3-none-manylinux_2_35_x86_64.whl",
    "mlx_flash_runtime-{}-py3-none-manylinux_2_35_aarch64.whl",
)


def wrong(tag: str, folder: Path, root: Path = ROOT) -> list[str]:
    """What keeps this from being a release, as sentences."""
    version = tomllib.loads((root / "pyproject.toml").read_text())["project"]["version"]
    found = []
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, and pyproject.toml has the version {version}")
    if f'__version__ = "{version}"' not in (root / "mlx_flash/__init__.py").read_text():
        found.append(f"mlx_flash.__version__ is not {version}")
    if not re.search(rf"^## {re.escape(version)}\b", (root / "CHANGELOG.md").read_text(), re.MULTILINE):
        found.append(f"CHANGELOG.md has no section {version}")
    wanted, there = {name.format(version) for name in PACKAGES}, {path.name for path in folder.iterdir()}
    if wanted != there:
        found.append(f"missing packages: {sorted(wanted - there)}; unexpected: {sorted(there - wanted)}")
    return found


if __name__ == "__main__":
    sys.exit("\n".join(wrong(sys.argv[1], Path(sys.argv[2]))) or None)
