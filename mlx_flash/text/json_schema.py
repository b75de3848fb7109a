"""Checks a JSON schema before llguidance compiles it, so that no keyword of it is ignored.

llguidance ignores keywords that it has never heard of, counts repeated keys, and reads numbers as float64. This module
raises an error for what that would make wrong, removes annotations, and bounds the size of schemas from outside.
"""

from __future__ import annotations

import json
import math
from decimal import Decimal
from typing import Any

from ..errors import GrammarError
from .schema_work import check_work, keys_of

MOST_BYTES = 1 << 17  # of a schema as JSON without annotations
MOST_DEPTH = 48  # levels of brackets in a schema; serde_json stops at 128, and a thread's stack may be small
MOST_PROPERTIES = 1000  # of one object
MOST_PATTERN = 1 << 11  # characters of a pattern
MOST_DIVISOR = 10_000  # product of all values of multipleOf; llguidance makes as many states, without a limit
MOST_REPEATED = 4096  # the largest length or count that a schema may ask for or allow
LARGEST = (1 << 63) - 1024  # the largest bound that llguidance compiles
EXACT = 1 << 53  # Up to here float64 holds every integer.

ANNOTATIONS = {"title", "description", "default", "examples", "$schema", "$comment", "deprecated", "readOnly"}
ANNOTATIONS |= {"writeOnly", "contentMediaType", "contentEncoding", "contentSchema"}
ONE_SCHEMA = {"items", "additionalItems", "additionalProperties"}
LISTS_OF_SCHEMAS = {"anyOf", "oneOf", "allOf", "prefixItems"}
MAPS_OF_SCHEMAS = {"properties", "patternProperties", "$defs", "definitions"}
COUNTS = {"minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties"}
NUMBERS = {"minimum": 1, "maximum": -1, "exclusiveMinimum": 1, "exclusiveMaximum": -1}  # and where to round to
TEXTS = {"pattern", "format", "$ref"}
TYPES = {"null", "boolean", "integer", "number", "string", "array", "object"}

Place = tuple[str, ...]  # keys from the root to a part of the schema


def checked_schema(schema: Any, what: str = "the JSON schema") -> dict[str, Any]:
    """A copy without annotations, with nothing in it that llguidance would ignore.

    what: the schema's name in messages. Raises GrammarError, which names the keyword and its place.
    """
    if not isinstance(schema, dict):
        raise GrammarError(f"{what} is a {type(schema).__name__}, expected an object.")
    check = _Check(what)
    copy = check.schema(schema, ())
    for place, target in check.references:
        if target not in check.places:
            raise check.error(place, f"leads to #/{'/'.join(target)}, where no schema is")
    text = json.dumps(copy)  # not too deep any more
    if len(text) > MOST_BYTES:
        raise GrammarError(f"{what} has {len(text)} bytes, expected at most {MOST_BYTES}. Simplify it.")
    check_work(copy, what)
    return copy  # type: ignore[no-any-return]


class _Check:
    def __init__(self, what: str) -> None:
        self.what = what
        self.places: set[Place] = set()  # of schemas
        self.references: list[tuple[Place, Place]] = []
        self.parts = 0
        self.divisors: set[int] = set()

    def error(self, place: Place, problem: str) -> GrammarError:
        keyword = place[-1] if place else "its root"
        shown = "/".join(place)
        where = f" (at #/{shown[:200]})" if len(place) > 1 else ""
        return GrammarError(f"{self.what} cannot be used: {keyword[:100]!r}{where} {problem}.")

    def schema(self, schema: Any, place: Place) -> Any:
        self.count(place)
        self.places.add(place)
        if isinstance(schema, bool):
            return schema
        if not isinstance(schema, dict):
            raise self.error(place, f"is {_shown(schema)}, expected a schema")
        copy = {}
        for keyword, value in schema.items():
            if not isinstance(keyword, str):
                raise self.error(place, f"has the key {_shown(keyword)}, expected text")
            if keyword in ANNOTATIONS or (keyword == "uniqueItems" and value is False):
                continue
            if keyword == "$id" and not place:
                continue  # The base of references: only those that begin with # are allowed.
            copy[keyword] = self.value(keyword, value, (*place, keyword))
        self.together(copy, place)
        return copy

    def value(self, keyword: str, value: Any, place: Place) -> Any:
        """Checks the value of one keyword and returns it without annotations."""
        if keyword in LISTS_OF_SCHEMAS or (keyword == "items" and isinstance(value, list)):
            self.expect(value, list, place, "a list of schemas")
            if not value:
                raise self.error(place, "is empty, expected at least one schema")
            return [self.schema(each, (*place, str(i))) for i, each in enumerate(value)]
        if keyword in ONE_SCHEMA:
            return self.schema(value, place)
        if keyword in MAPS_OF_SCHEMAS:
            self.expect(value, dict, place, "an object of schemas")
            if len(value) > MOST_PROPERTIES:
                raise self.error(place, f"has {len(value)} entries, expected at most {MOST_PROPERTIES}")
            return {self.text(name, place): self.schema(each, (*place, name)) for name, each in value.items()}
        if keyword in COUNTS:
            if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= MOST_REPEATED:
                raise self.error(place, f"is {_shown(value)}, expected 0 to {MOST_REPEATED}")
            return value
        if keyword in NUMBERS:
            towards = NUMBERS[keyword]
            bound = self.number(value, place)
            if bound * towards > LARGEST:
                raise self.error(place, f"is {_shown(value)}, expected a number between -2**63 and 2**63")
            # A tighter bound keeps every promise that the looser one makes.
            return _rounded(max(bound, -LARGEST) if towards > 0 else min(bound, LARGEST), towards)
        if keyword == "multipleOf":
            if not 0 < self.exact(value, place) <= EXACT:
                raise self.error(place, f"is {_shown(value)}, expected a positive number up to 2**53")
            self.divisors.add(int("".join(map(str, Decimal(str(value)).as_tuple().digits)).rstrip("0")))
            if math.prod(self.divisors) > MOST_DIVISOR:
                raise self.error(place, f"is {_shown(value)}, expected few digits, all values together")
            return value
        if keyword in TEXTS:
            self.text(value, place)
            if keyword == "pattern" and len(value) > MOST_PATTERN:
                raise self.error(place, f"has {len(value)} characters, expected at most {MOST_PATTERN}")
            if keyword == "$ref":
                self.references.append((place, self.target(value, place)))
            return value
        if keyword == "type":
            named = value if isinstance(value, list) else [value]
            if not named or any(not isinstance(each, str) or each not in TYPES for each in named):
                raise self.error(place, f"is {_shown(value)}, expected some of {', '.join(sorted(TYPES))}")
            return value
        if keyword == "required":
            self.expect(value, list, place, "a list of names")
            return [self.text(name, place) for name in value]
        if keyword == "enum":
            self.expect(value, list, place, "a list of values")
            if not value:
                raise self.error(place, "is empty, expected at least one value")
            return [self.constant(each, (*place, str(i))) for i, each in enumerate(value)]
        if keyword == "const":
            return self.constant(value, place)
        raise self.error(place, "is not a keyword that can be enforced. Remove it, or say it in other keywords")

    def together(self, schema: dict[str, Any], place: Place) -> None:
        """Keywords that depend on each other."""
        positional = isinstance(schema.get("items"), list)
        if "additionalItems" in schema and not positional:
            raise self.error((*place, "additionalItems"), "has an effect only beside a list of items. Remove it")
        if positional and "prefixItems" in schema:
            raise self.error((*place, "prefixItems"), "stands beside a list of items. Keep one of them")
        # llguidance counts a repeated key as two properties.
        least = schema.get("minProperties", 0)
        if least > max(1, len(set(schema.get("required", ())))):
            raise self.error((*place, "minProperties"), f"is {least}, expected at most 1, or the number of required")

    def constant(self, value: Any, place: Place) -> Any:
        self.count(place)
        if isinstance(value, list):
            return [self.constant(each, (*place, str(i))) for i, each in enumerate(value)]
        if isinstance(value, dict):
            return {self.text(name, place): self.constant(each, (*place, name)) for name, each in value.items()}
        if isinstance(value, str):
            return self.text(value, place)
        if value is None or isinstance(value, bool):
            return value
        return self.exact(value, place)

    def count(self, place: Place) -> None:
        self.parts += 1
        if self.parts > MOST_BYTES // 2:  # Every part has at least two bytes.
            raise GrammarError(f"{self.what} has more than {MOST_BYTES} bytes. Simplify it.")
        if len(place) > MOST_DEPTH:
            raise GrammarError(f"{self.what} has more than {MOST_DEPTH} levels. Nest it less deeply, or use $ref.")

    def expect(self, value: Any, kind: type, place: Place, expected: str) -> None:
        if not isinstance(value, kind):
            raise self.error(place, f"is {_shown(value)}, expected {expected}")

    def text(self, value: Any, place: Place) -> str:
        if not isinstance(value, str):
            raise self.error(place, f"is {_shown(value)}, expected text")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise self.error(place, "has half a surrogate pair, which no text can have")
        return value

    def number(self, value: Any, place: Place) -> int | float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
            raise self.error(place, f"is {_shown(value)}, expected a number")
        return value

    def exact(self, value: Any, place: Place) -> int | float:
        if abs(self.number(value, place)) > EXACT:
            raise self.error(place, f"is {value}, expected a number between -2**53 and 2**53")
        return value  # type: ignore[no-any-return]

    def target(self, reference: str, place: Place) -> Place:
        if reference not in ("#", "#/") and not reference.startswith("#/"):
            raise self.error(place, f"is {_shown(reference)}, expected a place in this schema, such as #/$defs/name")
        return keys_of(reference)


def _rounded(number: int | float, towards: int) -> int | float:
    """A bound that float64 holds, no looser than the number. towards: 1 for a lower bound, -1 for an upper one."""
    if abs(number) <= EXACT or float(number) == number:
        return number
    near = float(number)
    if (near - number) * towards < 0:
        near = math.nextafter(near, math.inf * towards)
    return int(near)


def _shown(value: Any) -> str:
    """A short form of any value, however large or deep it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:60] + "…")
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "a list"
    return str(value)[:60] if not isinstance(value, int) or abs(value) < 1e60 else "a huge number"
