"""Bounds the work of intersecting parts of a JSON schema, which llguidance does without a limit.

It multiplies alternatives that must hold together out, and the work to intersect patterns doubles with each of them. A
schema of a few hundred bytes could take hours, or all memory.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from urllib.parse import unquote

from ..errors import GrammarError

MOST_WAYS = 256  # Ten choices between two objects, which are 1024 ways, take 10 s and 100 MB.
MOST_PATTERNS = 8  # for one text; 14 take 10 s


@dataclass(frozen=True)
class _Size:
    """ways: number of alternatives. patterns: for one text. inner: the largest of both below each key."""

    ways: int = 1
    patterns: int = 0
    inner: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def largest(self) -> tuple[int, int]:
        below = self.inner.values()
        return max([self.ways, *(w for w, _ in below)]), max([self.patterns, *(p for _, p in below)])


def check_work(schema: dict[str, Any], what: str) -> None:
    """Raises GrammarError for a checked schema that would take too much work. what: its name in messages."""
    try:
        _Work(schema, what).size(schema)
    except RecursionError:
        raise GrammarError(f"{what} has too many $refs that lead to each other. Simplify it.") from None


def keys_of(reference: str) -> tuple[str, ...]:
    """The keys from the root of a schema to the place that a $ref leads to."""
    keys = unquote(reference[1:]).split("/")[1:] if reference != "#" else []
    return tuple(key.replace("~1", "/").replace("~0", "~") for key in keys)


class _Work:
    def __init__(self, root: dict[str, Any], what: str) -> None:
        self.root, self.what = root, what
        self.known: dict[str, _Size] = {}  # by $ref

    def size(self, schema: Any) -> _Size:
        if not isinstance(schema, dict):
            return _Size()
        inner = {key: self.size(value).largest for key, value in schema.get("properties", {}).items()}
        for keyword in ("items", "additionalItems", "additionalProperties", "prefixItems", "patternProperties"):
            if (value := schema.get(keyword)) is None:
                continue
            parts = value.values() if keyword == "patternProperties" else value if isinstance(value, list) else [value]
            inner[f"/{keyword}"] = _largest([self.size(part).largest for part in parts])
        found = _Size(1, len(schema.keys() & {"pattern", "format"}), inner)
        for part in schema.get("allOf", ()):
            found = self.both(found, self.size(part))
        for keyword in ("anyOf", "oneOf"):
            if ways := schema.get(keyword):
                found = self.both(found, _either([self.size(part) for part in ways]))
        if "$ref" in schema:
            found = self.both(found, self.target(schema["$ref"]))
        return found

    def target(self, reference: str) -> _Size:
        if reference not in self.known:
            self.known[reference] = _Size()  # where it leads to itself
            part: Any = self.root
            for key in keys_of(reference):
                part = part[int(key)] if isinstance(part, list) else part[key]
            self.known[reference] = self.size(part)
        return self.known[reference]

    def both(self, a: _Size, b: _Size) -> _Size:
        """The size of two schemas that must hold together."""
        inner = {**a.inner, **b.inner}
        for key in a.inner.keys() & b.inner.keys():
            inner[key] = self.product(a.inner[key], b.inner[key])
        return _Size(*self.product((a.ways, a.patterns), (b.ways, b.patterns)), inner)

    def product(self, a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
        ways, patterns = a[0] * b[0], a[1] + b[1]
        if ways > MOST_WAYS and min(a[0], b[0]) > 1:
            raise GrammarError(
                f"{self.what} cannot be used: alternatives that must hold together give {ways} combinations, expected "
                f"at most {MOST_WAYS}. Use fewer of anyOf and oneOf inside allOf."
            )
        if patterns > MOST_PATTERNS and min(a[1], b[1]) > 0:
            raise GrammarError(
                f"{self.what} cannot be used: {patterns} patterns and formats are for the same text, expected at most "
                f"{MOST_PATTERNS}. Join them."
            )
        return ways, patterns


def _largest(sizes: list[tuple[int, int]]) -> tuple[int, int]:
    return max((w for w, _ in sizes), default=1), max((p for _, p in sizes), default=0)


def _either(sizes: list[_Size]) -> _Size:
    inner: dict[str, tuple[int, int]] = {}
    for size in sizes:
        for key, largest in size.inner.items():
            inner[key] = _largest([inner.get(key, largest), largest])
    return _Size(sum(size.ways for size in sizes), max(size.patterns for size in sizes), inner)
