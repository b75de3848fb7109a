"""The README stays short, its map names every room, and the links and names in it and in docs/ exist."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted([README, *ROOT.glob("docs/*.md"), *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "SECURITY"))])
FENCE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
NAMED_FILE = re.compile(r"`((?:apps|bench|convert|mlx_flash|tests|flash|layers|loading|\.ci|\.github)/[\w./-]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^\]]+\]: (\S+)", re.MULTILINE)


def links(page: Path) -> list[str]:
    """The targets of a page's links within the repository."""
    found = [inline or reference for inline, reference in LINK.findall(FENCE.sub("", page.read_text()))]
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """GitHub's anchors for the headings of a page."""
    seen: Counter[str] = Counter()
    names = set()
    for heading in re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")
        names.add(f"{name}-{seen[name]}" if seen[name] else name)
        seen[name] += 1
    return names


def rooms() -> list[Path]:
    """The folders in the README's map, in its order."""
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


def test_lines_of_pages_are_short() -> None:
    """Lines of tables and links may be longer. docs/commands.md and docs/defects.md are tables."""
    for page in PAGES:
        text = FENCE.sub("", page.read_text())
        long = [line for line in text.splitlines() if len(line) > 120 and not line.startswith("|")]
        assert page.name == "commands.md" or not long, f"{page.name}: {long}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for link in links(page):
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_the_map_names_every_room() -> None:
    named = {path.resolve() for path in rooms()}
    assert [path for path in named if not path.is_dir()] == []
    packages = {path.parent.resolve() for path in (ROOT / "mlx_flash").glob("*/__init__.py")}
    assert packages - named == set()


def test_the_map_names_the_commands() -> None:
    described = README.read_text().split("```text\n")[1].splitlines()[0]
    for name in re.findall(r"\w+\.py", described):
        assert (ROOT / "mlx_flash" / name).is_file(), name


def test_every_page_is_in_the_index() -> None:
    index = {(ROOT / "docs" / link.partition("#")[0]).resolve() for link in links(ROOT / "docs" / "README.md")}
    assert {page for page in ROOT.glob("docs/*.md") if page.name != "README.md"} - index == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_tests_that_a_page_names_exist(page: Path) -> None:
    text = page.read_text()
    for name in NAMED_FILE.findall(text):
        assert (ROOT / name).exists() or (ROOT / "mlx_flash" / name).exists() or name.endswith("/TARGET"), name
    for name, test in re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text):
        assert f"def {test}(" in (ROOT / name).read_text(), f"{name}::{test}"


def test_functions_that_how_it_works_names_exist() -> None:
    page = (ROOT / "docs" / "how-it-works.md").read_text()
    files = [path for room in ("flash", "layers") for path in sorted((ROOT / "mlx_flash" / room).glob("*.py"))]
    source = "\n".join(path.read_text() for path in files)
    classes = {part.split("(")[0].split(":")[0]: part for part in source.split("\nclass ")[1:]}
    for owner, name in re.findall(r"`([A-Z]\w+)(?:\.(\w+))?`", page):
        assert owner in classes, owner
        assert not name or f"    def {name}(" in classes[owner], f"{owner}.{name}"
