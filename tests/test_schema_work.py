"""Schemas whose parts llguidance would multiply out: refused at once, and others stay."""

from __future__ import annotations

import time
from typing import Any

import pytest

from mlx_flash.errors import GrammarError
from mlx_flash.text.json_schema import checked_schema


def choice(number: int, ways: int = 2) -> dict[str, Any]:
    return {"anyOf": [{"type": "object", "properties": {f"p{number}_{i}": {"type": "string"}}} for i in range(ways)]}


def pattern(number: int) -> dict[str, Any]:
    return {"type": "string", "pattern": f"(a|b)*a(a|b){{{number}}}"}


def nested(schema: dict[str, Any], levels: int, keyword: str) -> dict[str, Any]:
    for level in range(levels):
        schema = {**schema, keyword: [pattern(level) | schema]}
    return schema


REFERENCES = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(20)} | {"d20": choice(0)}
CHAIN = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(900)} | {"d900": {}}
TWICE = {f"d{i}": {"properties": {key: {"$ref": f"#/$defs/d{i + 1}"} for key in "xy"}} for i in range(40)} | {"d40": {}}


@pytest.mark.parametrize(
    ("schema", "problem"),
    [
        ({"allOf": [choice(i) for i in range(14)]}, "combinations"),
        ({"allOf": [{"properties": {"a": choice(i, 9)}} for i in range(3)]}, "combinations"),
        ({"allOf": [{"items": choice(i, 9)} for i in range(3)]}, "combinations"),
        ({"properties": {"a": {"allOf": [choice(0, 20), choice(1, 20)]}}}, "combinations"),
        ({"$defs": REFERENCES, "$ref": "#/$defs/d0"}, "combinations"),
        ({**choice(0, 20), "$ref": "#/$defs/c", "$defs": {"c": choice(1, 20)}}, "combinations"),
        ({"allOf": [pattern(i) for i in range(20)]}, "patterns"),
        (nested(pattern(30), 14, "anyOf"), "patterns"),
        (nested(pattern(30), 14, "allOf"), "patterns"),
        ({"$defs": CHAIN, "$ref": "#/$defs/d0"}, "$ref"),
    ],
)  # fmt: skip
def test_products_are_refused(schema: dict[str, Any], problem: str) -> None:
    began = time.monotonic()
    with pytest.raises(GrammarError) as caught:
        checked_schema(schema)
    assert problem in str(caught.value) and time.monotonic() - began < 2


@pytest.mark.parametrize(
    "schema",
    [
        choice(0, 900),
        {"allOf": [choice(0, 900), {"type": "object", "properties": {"a": choice(1, 900)}}]},
        {"allOf": [{"properties": {f"a{i}": choice(i, 50)}} for i in range(20)]},
        {"properties": {f"a{i}": {"anyOf": [pattern(i), {"type": "null"}]} for i in range(100)}},
        {"allOf": [{"properties": {f"a{i}": pattern(i)}} for i in range(30)]},
        {"$defs": {"tree": {"properties": {"l": {"$ref": "#/$defs/tree"}, "v": choice(0, 9)}}}, "$ref": "#/$defs/tree"},
        {"$defs": TWICE, "$ref": "#/$defs/d0"},
    ],
)  # fmt: skip
def test_other_schemas_stay(schema: dict[str, Any]) -> None:
    checked_schema(schema)
