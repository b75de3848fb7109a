"""The README stays short, and its map names every room."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"


def rooms() -> list[Path]:
    """The folders that the README's map names, in its order."""
    found: list[Path] = []
    block = README.read_text().split("```text\n")[1].split("```")[0]
    for line in block.splitlines():
        name = line.split()[0]
        found.append(ROOT / "mlx_flash" / name if line.startswith("  ") else ROOT / name)
    return found


def test_the_readme_is_short() -> None:
    lines = README.read_text().splitlines()
    assert len(lines) <= 150
    assert [line for line in lines if len(line) > 100] == []


def test_the_map_names_every_room() -> None:
    named = {path.resolve() for path in rooms()}
    assert [path for path in named if not path.is_dir()] == []
    packages = {path.parent.resolve() for path in (ROOT / "mlx_flash").glob("*/__init__.py")}
    assert packages - named == set()


def test_the_map_names_the_commands() -> None:
    described = README.read_text().split("```text\n")[1].splitlines()[0]
    for name in re.findall(r"\w+\.py", described):
        assert (ROOT / "mlx_flash" / name).is_file(), name
