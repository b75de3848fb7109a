"""The order of the package: imports lead down, without circles; private names stay in their room; files stay short."""

from __future__ import annotations

import ast
import re
import sys

import import_graph  # type: ignore[import-not-found]  # found beside this file
import pytest

KNOWN = import_graph.modules()
LONGEST = 500  # lines


def private(name: str | None) -> bool:
    return bool(name) and re.fullmatch(r"_[^_].*", name or "") is not None


def test_every_room_has_a_floor() -> None:
    assert {import_graph.room_of(module) for module in KNOWN if module} == {
        room for rooms in import_graph.FLOORS for room in rooms
    }
    assert {name for name in import_graph.LINKED if name in KNOWN} == set(import_graph.LINKED)


def test_arrows_lead_down() -> None:
    wrong = []
    for each in import_graph.imports(KNOWN):
        above, below = import_graph.room_of(each.module), import_graph.room_of(each.of)
        if (each.module, each.of) == import_graph.FIRST or not each.of or above == below:
            continue  # the package itself holds the version, and every module imports it
        if import_graph.floor_of(above) <= import_graph.floor_of(below):
            wrong.append(f"{KNOWN[each.module]}:{each.line} imports {each.of}")
    assert wrong == []


def test_no_circles() -> None:
    assert import_graph.circles(KNOWN) == []


@pytest.mark.parametrize(
    ("edges", "expected"), [("ab bc", []), ("ab bc cb", [["b", "c"]]), ("ab bc cd da", [["a", "b", "c", "d"]])]
)
def test_circles_are_found(edges: str, expected: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    found = [import_graph.Import(edge[0], edge[1], None, 1) for edge in edges.split()]
    monkeypatch.setattr(import_graph, "imports", lambda _: found)
    assert import_graph.circles({name: None for edge in edges.split() for name in edge}) == expected


def test_private_names_stay_in_their_room() -> None:
    wrong = [
        f"{KNOWN[each.module]}:{each.line} {each.of}.{each.name}"
        for each in import_graph.imports(KNOWN)
        if private(each.name)
    ]
    homes: dict[str, set[str]] = {}  # attribute -> the rooms that set or define it
    uses = []
    for module, path in KNOWN.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.AsyncFunctionDef)) and private(node.name):
                homes.setdefault(node.name, set()).add(import_graph.room_of(module))
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store) and private(node.id):
                homes.setdefault(node.id, set()).add(import_graph.room_of(module))
            elif isinstance(node, ast.Attribute) and private(node.attr):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    homes.setdefault(node.attr, set()).add(import_graph.room_of(module))
                else:
                    uses.append((node.attr, module, node.lineno))
    for name, module, line in uses:  # attributes that are not defined here belong to other libraries
        if name in homes and import_graph.room_of(module) not in homes[name]:
            wrong.append(f"{KNOWN[module]}:{line} {name}")
    assert wrong == []


def test_files_are_short() -> None:
    long = {
        str(path): count
        for path in KNOWN.values()
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > LONGEST
    }
    assert long == {}


# Two files with one name: the second mirrors the first on a higher floor.
MIRRORS = {"neurons": {"flash", "layers"}, "experts": {"flash", "layers"}}


def test_no_two_files_have_one_name() -> None:
    homes: dict[str, set[str]] = {}
    for module, path in KNOWN.items():
        if path.name not in ("__init__.py", "__main__.py"):
            homes.setdefault(path.stem, set()).add(import_graph.room_of(module))
    shared = {name: rooms for name, rooms in homes.items() if len(rooms) > 1}
    assert shared == MIRRORS
    assert not {name for name in homes if name in sys.stdlib_module_names}


# The file of every model type has its own.
IN_EVERY_MODEL = {"Model", "ModelArgs", "DecoderLayer"}


def test_no_two_classes_have_one_name() -> None:
    homes: dict[str, list[str]] = {}
    for module, path in KNOWN.items():
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name not in IN_EVERY_MODEL:
                homes.setdefault(node.name, []).append(module)
    assert {name: modules for name, modules in homes.items() if len(modules) > 1} == {}


def test_few_files_lie_at_the_top() -> None:
    assert len([module for module in KNOWN if "." not in module and KNOWN[module].name != "__init__.py"]) <= 12
