"""How models write tool calls: one entry for each of mlx-lm's parsers whose format has a mark around every argument.

Formats that write all arguments as one JSON object are in `tool_grammar`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from .grammar import json_rule

OPTIONAL_NEWLINE = "¶"  # in the texts of a format
MOST_REFERENCES = 16  # $refs that lead to each other
# Text of arguments: all but control characters. Parsers strip some of those, and no argument needs them.
CHARACTER = r"[^\x00-\x08\x0b-\x1f\x7f]"
# Parsers read numbers with float() and then int(), which fails for infinity. These digits are exact.
INTEGER = "/-?(0|[1-9][0-9]{0,14})/"
NUMBER = r"/-?(0|[1-9][0-9]{0,14})(\.[0-9]{1,15})?([eE][-+]?[0-9]{1,2})?/"
LARGEST = 1 << 53
ALL_TYPES = ("string", "integer", "number", "boolean", "object", "array", "null")
# Values that a parser must read back as they were written, before a format is trusted with a type.
SAMPLES: dict[str, tuple[Any, ...]] = {
    "string": ("x", "12", "-1.5", "true", "[1]", '{"a": 1}', "a'b\"c\\d"),
    "integer": (7, -12),
    "number": (1.5, 3, -0.25),
    "boolean": (True, False),
    "object": ({}, {"a": [True, None, "x"]}),
    "array": ([], [1, "x", {"b": None}]),
    "null": (None,),
}


@dataclass(frozen=True)
class Format:
    """The texts around the parts of a call. `{name}`, `{key}` and `{type}` are filled in; ¶ is an optional newline."""

    head: str  # before the arguments
    before: str  # an argument's value
    after: str
    tail: str  # after the arguments
    between: str = ""  # two arguments
    # Around all calls between one pair of markers, and between them. None: each call has its own pair of markers.
    around: tuple[str, str] | None = None
    next_call: str = ""
    raw: bool = True  # Texts are written as they are, not as JSON.
    quotes: tuple[str, str] = ("", "")  # around texts
    strips: bool = False  # whether the parser removes spaces around texts
    null: bool = False  # whether the parser reads the text "null" as None
    stops: tuple[str, ...] = ()  # what a text may not contain, because the parser would end it there
    least: int = 0  # arguments of a call that the parser can read
    types: tuple[str, ...] = ALL_TYPES  # that can be carried
    cdata: bool = False
    own_values: bool = False  # Objects and arrays are not written as JSON.


GLM = Format(
    "{name}¶",
    "<arg_key>{key}</arg_key>¶<arg_value>",
    "</arg_value>¶",
    "",
    strips=True,
    stops=("</arg_value>", "</tool_call>"),
)
SCALARS = ("string", "integer", "number", "boolean", "null")
FORMATS = {
    "qwen3_coder": Format(
        "¶<function={name}>\n",
        "<parameter={key}>\n",
        "\n</parameter>\n",
        "</function>¶",
        null=True,
        stops=("</parameter>", "</function>", "</tool_call>"),
    ),
    "glm47": GLM,
    "laguna": GLM,
    "longcat": Format(
        "{name}¶",
        "<longcat_arg_key>{key}</longcat_arg_key>¶<longcat_arg_value>",
        "</longcat_arg_value>¶",
        "",
        strips=True,
        stops=("</longcat_arg_value>", "</longcat_tool_call>"),
        least=1,
    ),
    "minimax_m2": Format(
        '<invoke name="{name}">¶',
        '<parameter name="{key}">',
        "</parameter>¶",
        "</invoke>¶",
        around=("¶", ""),
        strips=True,
        null=True,
        stops=("</parameter>", "</invoke>", "</minimax:tool_call>"),
    ),
    "minicpm5": Format(
        '"{name}">¶',
        '<param name="{key}">',
        "</param>¶",
        "",
        strips=True,
        null=True,
        stops=("<", "&", "\n"),
        cdata=True,
    ),
    "muse_spark": Format(
        '<atem:invoke name="{name}">¶',
        '<atem:parameter name="{key}">',
        "</atem:parameter>¶",
        "</atem:invoke>¶",
        around=("¶", ""),
        raw=False,  # The parser reads JSON first. A text like 12 would become a number.
    ),
    "kimi_k3": Format(
        '<|open|>call tool="{name}" index="{index}"<|sep|>',
        '<|open|>argument key="{key}" type="{type}"<|sep|>',
        "<|close|>argument<|sep|>",
        "<|close|>call<|sep|>",
        around=("", ""),
        stops=("<|open|>", "<|close|>"),
    ),
    "pythonic": Format("{name}(", "{key}=", "", ")", ", ", around=("[", "]"), next_call=", ", raw=False),
    "function_gemma": Format(
        "call:{name}{{",
        "{key}:",
        "",
        "}}",
        ",",
        quotes=("<escape>", "<escape>"),
        stops=("<escape>", "<end_function_call>", "}"),
        types=SCALARS,  # The parser ends a call at the first brace, and a value at the first comma.
    ),
    "gemma4": Format(
        "call:{name}{{",
        "{key}:",
        "",
        "}}",
        ",",
        quotes=('<|"|>', '<|"|>'),
        stops=('<|"|>', "<tool_call|>"),
        own_values=True,
    ),
}


class Unsupported(Exception):
    """A schema that a format cannot carry."""


class Lark:
    """A Lark grammar that grows. special: the ids of special tokens by their names."""

    def __init__(self, special: dict[str, int]) -> None:
        self.rules: list[str] = []
        self.special = special
        names = sorted((name for name in special if name), key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, [*names, OPTIONAL_NEWLINE])))
        self._known: dict[str, str] = {}

    def rule(self, expression: str, prefix: str = "r") -> str:
        """The name of a rule (prefix "T": of a terminal) for an expression."""
        known = f"{prefix}:{expression}"
        if known not in self._known:
            self._known[known] = f"{prefix}{len(self.rules)}"
            self.rules.append(f"{self._known[known]}: {expression}")
        return self._known[known]

    def spelled(self, text: str) -> str:
        """A literal text. A special token in it is that token, not its name as text."""
        parts, end = [], 0
        for found in self._split.finditer(text):
            parts += [quoted(text[end : found.start()])] if found.start() > end else []
            parts.append('"\\n"?' if found[0] == OPTIONAL_NEWLINE else f"<[{self.special[found[0]]}]>")
            end = found.end()
        parts += [quoted(text[end:])] if end < len(text) else []
        return " ".join(parts) or '""'

    def ended(self, terminal: str, text: str) -> str:
        """An expression of terminals, and then a literal text, which may begin with a special token."""
        found = self._split.search(text)
        plain = text[: found.start()] if found else text
        joined = f"({terminal}) {quoted(plain)}" if plain else terminal
        return f"{self.rule(joined, 'T')} {self.spelled(text[len(plain) :])}"


def quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def call_rule(lark: Lark, form: Format, name: str, parameters: dict[str, Any] | None) -> str:
    """The rule of one call without its markers. parameters: a checked schema; None for arguments of any kind.

    Raises Unsupported.
    """
    head, _, index = form.head.replace("{{", "{").partition('{index}"')
    start = lark.spelled(head.replace("{name}", name))
    if index:
        start += f" /[1-9][0-9]?/ {lark.spelled(chr(34) + index)}"
    tail = lark.spelled(form.tail.replace("}}", "}"))
    if parameters is None:
        each = lark.rule(_free_argument(lark, form))
        some = f"{each} ({lark.spelled(form.between)} {each})*" if form.between else f"{each}+"
        return lark.rule(f"{start} {some if form.least else f'({some})?'} {tail}")
    extra = parameters.keys() - {"type", "properties", "required", "additionalProperties", "$defs", "definitions"}
    if extra:
        raise Unsupported(f"{sorted(extra)[0]!r} beside its parameters")
    if parameters.get("type", "object") != "object":
        raise Unsupported(f"parameters of the type {parameters['type']!r}, expected 'object'")
    properties, required = parameters.get("properties", {}), parameters.get("required", [])
    if missing := [key for key in required if key not in properties]:
        raise Unsupported(f"the parameter {missing[0]!r}, which is required but not described")
    arguments = [lark.rule(_argument(lark, form, key, schema, parameters)) for key, schema in properties.items()]
    needed = [key in required for key in properties]
    # rests[i]: the arguments from number i on, after another one
    rests, between = ['""'], f"{lark.spelled(form.between)} " if form.between else ""
    for each, must in zip(reversed(arguments), reversed(needed), strict=True):
        one = f"{between}{each}" if must else f"({between}{each})?"
        rests.insert(0, lark.rule(f"{one} {rests[0]}"))
    first = needed.index(True) if True in needed else len(needed) - 1
    ways = [f"{arguments[i]} {rests[i + 1]}" for i in range(first + 1)]
    if True not in needed:
        if form.least and not arguments:
            raise Unsupported("a call without arguments")
        ways += [] if form.least else ['""']
    return lark.rule(f"{start} ({' | '.join(ways)}) {tail}")


def _argument(lark: Lark, form: Format, key: str, schema: Any, root: dict[str, Any]) -> str:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}", key):
        raise Unsupported(f"the parameter {key[:64]!r}: its name needs quoting")
    try:
        ways = [_typed(lark, form, key, kind, part, root) for kind, part in kinds(schema, root)]
    except Unsupported as error:
        raise Unsupported(f"{error} of the parameter {key!r}") from None
    return " | ".join(lark.rule(way) for way in ways)


def _typed(lark: Lark, form: Format, key: str, kind: str, schema: dict[str, Any], root: dict[str, Any]) -> str:
    if kind not in form.types:
        raise Unsupported(f"the type {kind!r}")
    before = lark.spelled(form.before.replace("{key}", key).replace("{type}", kind))
    if kind == "string" and form.raw:
        values = schema.get("enum", [schema["const"]] if "const" in schema else None)
        return f"{before} {_text(lark, form, schema, values)}"
    value = own_value(lark, form, schema, root) if form.own_values else _json(form, kind, schema, root)
    return f"{before} {value} {lark.spelled(form.after)}"


def _json(form: Format, kind: str, schema: dict[str, Any], root: dict[str, Any]) -> str:
    """A value written as JSON. Where the parser does not read JSON, numbers have few digits."""
    if kind in ("integer", "number") and not schema.keys() & {"enum", "const"}:
        if schema.keys() <= {"type"}:
            return INTEGER if kind == "integer" else NUMBER
        bounds = {"minimum": max(-LARGEST, schema.get("minimum", -LARGEST))}
        bounds["maximum"] = min(LARGEST, schema.get("maximum", LARGEST))
        schema = {**schema, **bounds}
    return json_rule({**{name: root[name] for name in ("$defs", "definitions") if name in root}, **schema})


def _text(lark: Lark, form: Format, schema: dict[str, Any], values: list[str] | None) -> str:
    """A text as it is, and the format's text after it."""
    other = schema.keys() - {"type", "minLength", "maxLength", "enum", "const"}
    if other:
        raise Unsupported(f"the keyword {sorted(other)[0]!r}")
    opening, closing = form.quotes
    start, end = lark.spelled(opening) if opening else "", closing + form.after
    if values is not None:
        return f"{start} ({' | '.join(map(quoted, values))}) {lark.spelled(end)}"
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    found = f"{start} {lark.ended(text_terminal(form.stops, form, least, most), end)}"
    # CDATA holds texts with < or & or a newline. With a long count as well, llguidance would compile for seconds.
    if form.cdata and int(most or 0) <= 256:
        inner = text_terminal(("]]>", "</param>", "</function>"), form, least, most, strips=False)
        found = f"{found} | {lark.spelled('<![CDATA[')} {lark.ended(inner, ']]>' + end)}"
    return f"({found})"


def text_terminal(
    stops: Iterable[str], form: Format, least: int = 0, most: int | str = "", strips: bool | None = None
) -> str:
    parts = [f"/{CHARACTER}{{{least},{most}}}/"]
    parts += [f"~/(?s:.*){regex_literal(stop)}(?s:.*)/" for stop in stops]
    if form.null:
        parts.append("~/(?i:null)/")
    if form.strips if strips is None else strips:
        parts.append(r"/(\S((?s:.*)\S)?)?/")
    return " & ".join(parts)


def regex_literal(text: str) -> str:
    return "".join(f"\\x{{{ord(character):x}}}" if not character.isalnum() else character for character in text)


def _free_argument(lark: Lark, form: Format) -> str:
    """An argument of any name and value."""
    opening, closing = form.before.split("{key}")
    key = f"{lark.spelled(opening)} /[A-Za-z_][A-Za-z0-9_]{{0,63}}/"
    if "{type}" in closing:
        middle, rest = closing.split("{type}")
        text = f"{lark.spelled(middle + 'string' + rest)} {_text(lark, form, {}, None)}"
        types = "/number|integer|boolean|object|array|null/"
        value = f"{lark.spelled(middle)} {types} {lark.spelled(rest)} {json_rule({})} {lark.spelled(form.after)}"
        return f"{key} ({text} | {value})"
    key = f"{key} {lark.spelled(closing)}"
    if form.own_values:
        return f"{key} {own_value(lark, form, {}, {})}"
    if not form.raw:
        return f"{key} {json_rule({})} {lark.spelled(form.after)}"
    text = _text(lark, form, {}, None)
    if form.quotes[0]:
        return f'{key} ({text} | {NUMBER} | "true" | "false" | "null")'
    return f"{key} {text}"


# -- values in Gemma 4's own notation ------------------------------------------------------------------------


def own_value(lark: Lark, form: Format, schema: Any, root: dict[str, Any], depth: int = 0) -> str:
    """A value whose keys have no quotes and whose texts stand between <|"|>."""
    if depth > MOST_REFERENCES:
        raise Unsupported("recursive values")
    if schema in ({}, True):
        text = _text(lark, form, {}, None)
        key = '/[A-Za-z_][A-Za-z0-9_]{0,63}/ ":"'
        if "any_value:" not in "".join(lark.rules):
            lark.rules.append(f'any_value: {text} | {NUMBER} | "true" | "false" | "null" | any_list | any_object')
            lark.rules.append('any_list: "[" (any_value ("," any_value)*)? "]"')
            lark.rules.append(f'any_object: "{{" ({key} any_value ("," {key} any_value)*)? "}}"')
        return "any_value"
    ways = []
    for kind, part in kinds(schema, root):
        if kind == "string":
            values = part.get("enum", [part["const"]] if "const" in part else None)
            ways.append(_text(lark, form, part, values))
        elif kind == "array":
            ways.append(_own_list(lark, form, part, root, depth))
        elif kind == "object":
            ways.append(_own_object(lark, form, part, root, depth))
        else:
            ways.append(_json(form, kind, part, {}))
    return lark.rule(" | ".join(lark.rule(way) for way in ways))


def _own_list(lark: Lark, form: Format, schema: dict[str, Any], root: dict[str, Any], depth: int) -> str:
    if other := schema.keys() - {"type", "items", "minItems", "maxItems"}:
        raise Unsupported(f"the keyword {sorted(other)[0]!r}")
    item = lark.rule(own_value(lark, form, schema.get("items", {}), root, depth + 1))
    least, most = schema.get("minItems", 0), schema.get("maxItems")
    if most is not None and most < max(1, least):
        return '"[" "]"'
    rest = f'("," {item}){{{max(0, least - 1)},{"" if most is None else most - 1}}}'
    return f'"[" {item} {rest} "]"' if least else f'"[" ({item} {rest})? "]"'


def _own_object(lark: Lark, form: Format, schema: dict[str, Any], root: dict[str, Any], depth: int) -> str:
    if schema.keys() <= {"type"}:
        own_value(lark, form, {}, root)
        return "any_object"
    if depth > MOST_REFERENCES:
        raise Unsupported("recursive values")
    inner = Format("{{", form.before, "", "}}", ",", quotes=form.quotes, stops=form.stops, own_values=True)
    defined = {name: root[name] for name in ("$defs", "definitions") if name in root}
    return call_rule(lark, inner, "", {**defined, **schema})


# -- types ---------------------------------------------------------------------------------------------------


def kinds(schema: Any, root: dict[str, Any], depth: int = 0) -> list[tuple[str, dict[str, Any]]]:
    """The alternatives of a schema, each of one type. Raises Unsupported for one that is no plain choice of types."""
    if depth > MOST_REFERENCES:
        raise Unsupported("a $ref to itself")
    if not isinstance(schema, dict) or not schema:
        raise Unsupported("a value of any type")
    if schema.keys() == {"$ref"}:
        target: Any = root
        for key in schema["$ref"].removeprefix("#").split("/")[1:]:
            target = target[int(key)] if isinstance(target, list) else target.get(key, {})
        return kinds(target, root, depth + 1)
    if len(schema) == 1 and (ways := schema.get("anyOf") or schema.get("oneOf")):
        return [kind for way in ways for kind in kinds(way, root, depth + 1)]
    if schema.keys() & {"anyOf", "oneOf", "allOf", "$ref"}:
        raise Unsupported("a combination of schemas")
    if "enum" in schema or "const" in schema:
        values = schema["enum"] if "enum" in schema else [schema["const"]]
        names = [schema["type"]] if isinstance(schema.get("type"), str) else schema.get("type", ALL_TYPES)
        rest = {key: value for key, value in schema.items() if key not in ("type", "enum", "const")}
        if rest:
            raise Unsupported("a list of values with other keywords")
        found = [(kind, [value for value in values if type_of(value) == kind]) for kind in ALL_TYPES]
        allowed = {*names, *(["integer"] if "number" in names else [])}
        found = [(kind, values) for kind, values in found if values and kind in allowed]
        return [(kind, {"type": kind, "enum": values}) for kind, values in found]
    if "type" not in schema:
        raise Unsupported("a value of any type")
    names = [schema["type"]] if isinstance(schema["type"], str) else schema["type"]
    return [(name, {**schema, "type": name}) for name in names]


def type_of(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else "boolean"
    names = {str: "string", int: "integer", float: "number", list: "array", dict: "object"}
    return names[type(value)]


# -- whether mlx-lm's parser reads a value back --------------------------------------------------------------


def check_types(form: Format, name: str, parameters: dict[str, Any], parse: Callable[[str], Any]) -> None:
    """Has mlx-lm's parser read calls with one argument each. Raises Unsupported if it reads something else.

    Parsers guess types, each in its own way: some read the text 12 as a number if the schema says anyOf.
    """
    for key, schema in parameters.get("properties", {}).items():
        for kind, part in kinds(schema, parameters):
            for value in part.get("enum") or SAMPLES[kind] if kind in form.types else ():
                if kind == "string" and form.raw and "enum" not in part and any(s in value for s in form.stops):
                    continue
                try:
                    read = list(calls_in(parse(sample_call(form, name, key, kind, value))))
                except Exception:  # of any kind: the parsers are other people's code
                    read = []
                exact = len(read) == 1 and read[0]["name"] == name and list(read[0]["arguments"]) == [key]
                if not exact or not same(read[0]["arguments"][key], value):
                    raise Unsupported(f"the {kind} {json.dumps(value)[:40]} of the parameter {key!r}")


def sample_call(form: Format, name: str, key: str, kind: str, value: Any) -> str:
    """A call as the grammar writes it, without markers."""
    if form.own_values:
        written = _own_text(form, value)
    elif kind == "string" and form.raw:
        written = f"{form.quotes[0]}{value}{form.quotes[1]}"
        if form.cdata and any(stop in value for stop in form.stops):
            written = f"<![CDATA[{value}]]>"
    else:
        written = json.dumps(value, ensure_ascii=False)
    before = form.before.replace("{key}", key).replace("{type}", kind)
    call = f"{form.head}{before}{written}{form.after}{form.tail}".replace("{{", "{").replace("}}", "}")
    opening, closing = form.around or ("", "")
    call = f"{opening}{call.replace('{name}', name).replace('{index}', '1')}{closing}"
    return call.replace(OPTIONAL_NEWLINE, "\n")


def _own_text(form: Format, value: Any) -> str:
    if isinstance(value, str):
        return f"{form.quotes[0]}{value}{form.quotes[1]}"
    if isinstance(value, list):
        return f"[{','.join(_own_text(form, each) for each in value)}]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_own_text(form, each)}" for key, each in value.items()) + "}"
    return json.dumps(value)


def calls_in(read: Any) -> Iterator[dict[str, Any]]:
    """What a parser returned, one call or several, as calls."""
    yield from read if isinstance(read, list) else [read]


def same(a: Any, b: Any) -> bool:
    """Whether two values are equal, and no boolean is a number."""
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)
