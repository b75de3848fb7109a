"""The import graph of this package by room: `python tests/import_graph.py PICTURE.png` draws it.

A room is a folder, and each file at the top of mlx_flash/ is a room of its own. mlx_flash/convert, bench and apps are
links to folders at the top of the repository. They appear under their installed names.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "mlx_flash"
LINKED = ("convert", "bench", "apps")

# From the ground up. A room imports only from lower floors.
FLOORS = (
    ("errors", "defaults"),
    ("flash", "ranks"),
    ("source", "layers"),
    ("models", "text", "machine"),
    ("loading",),
    ("cli",),
    ("report", "server", "generate", "chat", "launch", "check", "cache", "download", "doctor", "rank"),
    ("service",),
    ("convert",),
    ("bench", "apps", "demo"),
)
# The package itself: a command runs it before it imports anything else.
FIRST = ("", "cli.beginning")


@dataclass(frozen=True)
class Import:
    """One imported name. of: the module that it comes from. name: None if `module` imports the whole module `of`."""

    module: str
    of: str
    name: str | None
    line: int


def modules() -> dict[str, Path]:
    """Every source file by its dotted name within the package. "" is the package itself."""
    found: dict[str, Path] = {}
    for folder, prefix in ((PACKAGE, ()), *((name, (name,)) for name in LINKED)):
        for path in sorted((ROOT / folder).rglob("*.py")):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            if folder == PACKAGE and parts[0] in LINKED:
                continue
            name = (*prefix, *parts)
            found[".".join(name[:-1] if name[-1] == "__init__" else name)] = path
    return found


def imports(known: dict[str, Path]) -> Iterator[Import]:
    """All imports, including those within functions."""
    for module, path in known.items():
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                named: list[tuple[str, str | None]] = [(alias.name, None) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = package[: len(package) - node.level + 1] if node.level else []
                base = ".".join(filter(None, [PACKAGE if node.level else "", *above, node.module or ""]))
                named = [(base, alias.name) for alias in node.names]
            else:
                continue
            for base, name in named:
                if base.split(".")[0] == PACKAGE:
                    of = base[len(PACKAGE) + 1 :]
                    inner = ".".join(filter(None, [of, name or ""]))
                    yield Import(module, *((inner, None) if inner in known else (of, name)), node.lineno)


def room_of(module: str) -> str:
    return module.split(".")[0]


def floor_of(room: str) -> int:
    return next(floor for floor, rooms in enumerate(FLOORS) if room in rooms)


def circles(known: dict[str, Path]) -> list[list[str]]:
    """Circles of modules that import each other, directly or through other modules."""
    onwards: dict[str, set[str]] = {module: set() for module in known}
    for each in imports(known):
        if each.of in known and each.of != each.module:
            onwards[each.module].add(each.of)
    try:
        TopologicalSorter(onwards).prepare()
    except CycleError as error:
        return [sorted({*error.args[1]})]
    return []


def draw(path: Path) -> None:
    """Draws the rooms on their floors, with an arrow between rooms that import. More imports make a wider arrow."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    known = modules()
    arrows = Counter((room_of(each.module), room_of(each.of)) for each in imports(known) if each.module and each.of)
    sizes = Counter(room_of(module) for module in known)
    places = {
        room: ((index + 0.5) / len(rooms), floor)
        for floor, rooms in enumerate(FLOORS)
        for index, room in enumerate(rooms)
    }
    figure, axes = pyplot.subplots(figsize=(10, 8))
    for (above, below), count in arrows.items():
        if above != below:
            style = {
                "arrowstyle": "->",
                "lw": 0.4 + count / 20,
                "color": "#0072b2",
                "alpha": 0.5,
                "shrinkA": 12,
                "shrinkB": 12,
            }
            axes.annotate("", places[below], places[above], arrowprops=style)
    for room, place in places.items():
        files = f"\n{sizes[room]} files" if sizes[room] > 1 else ""
        axes.text(
            *place, room + files, ha="center", va="center", bbox={"boxstyle": "round", "fc": "white", "ec": "#444444"}
        )
    axes.set(xlim=(0, 1), ylim=(-0.6, len(FLOORS) - 0.4))
    axes.axis("off")
    distinct = sum(above != below for above, below in arrows)
    axes.set_title(f"{len(places)} rooms, {distinct} arrows, {len(FLOORS)} floors: every arrow leads down", fontsize=11)
    figure.savefig(path, dpi=120, bbox_inches="tight")


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
