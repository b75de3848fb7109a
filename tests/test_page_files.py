"""The page's files: other people's libraries as they were built, with their licences, and all of it in the package."""

from __future__ import annotations

import hashlib
import json
import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "mlx_flash" / "server" / "page"
VENDOR = PAGE / "vendor"
MOST_BYTES = 700_000


def files_below(folder: Path) -> set[Path]:
    return {path for path in folder.rglob("*") if path.is_file() and path.name != ".DS_Store"}


def test_the_libraries_are_those_that_were_built() -> None:
    lines = (VENDOR / "SHA256SUMS").read_text(encoding="utf-8").splitlines()
    recorded = {name: digest for digest, name in (line.split("  ") for line in lines)}
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files_below(VENDOR)}
    del found["SHA256SUMS"]
    assert found == recorded, "run node mlx_flash/server/page/vendor/build.mjs"
    assert sum(path.stat().st_size for path in files_below(VENDOR)) < MOST_BYTES


def test_every_library_has_a_fixed_version_and_its_licence() -> None:
    wanted = json.loads((VENDOR / "package.json").read_text(encoding="utf-8"))
    locked = json.loads((VENDOR / "package-lock.json").read_text(encoding="utf-8"))["packages"]
    versions = wanted["dependencies"] | wanted["devDependencies"]
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in versions.values())
    assert all("integrity" in package for path, package in locked.items() if path)
    licences = (VENDOR / "LICENSES.txt").read_text(encoding="utf-8")
    sections = re.findall(r"^=+\n(\S+) (\S+) \((.+)\)\n=+\n\n((?:(?!^=+$).*\n)+)", licences, re.MULTILINE)
    assert set(wanted["dependencies"]) <= {name for name, *_ in sections}
    for name, version, licence, text in sections:
        assert version == locked[f"node_modules/{name}"]["version"]
        assert licence in ("MIT", "BSD-2-Clause", "BSD-3-Clause"), name
        assert "Copyright" in text or name == "punycode.js", name
        assert "WITHOUT WARRANTY" in text or "DISCLAIMED" in text, name


def test_the_package_has_every_file_of_the_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = project["tool"]["setuptools"]["package-data"]["mlx_flash.server"]
    packaged = {path for pattern in patterns for path in PAGE.parent.glob(pattern) if path.is_file()}
    assert packaged == files_below(PAGE)
    assert str((VENDOR / "LICENSES.txt").relative_to(ROOT)) in project["project"]["license-files"]
