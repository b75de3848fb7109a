"""Random answers of a tool grammar: mlx-lm's own parser reads a tool's name and arguments that fit its schema."""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import mlx_lm.tool_parsers
import pytest
from grammar_walks import Walks  # type: ignore[import-not-found]  # found beside this file
from tokenizer_kinds import byte_level, fast  # type: ignore[import-not-found]

from mlx_flash.errors import GrammarError
from mlx_flash.text.grammar import Grammar
from mlx_flash.text.tool_formats import FORMATS, calls_in
from mlx_flash.text.tool_grammar import JSON_FORMATS, tool_body, tool_calls

# parser -> the markers that are one token each in models of this kind
MARKERS = {
    "json_tools": "<tool_call> </tool_call>",
    "qwen3_coder": "<tool_call> </tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|> <|tool_calls_section_end|> <|tool_call_begin|> <|tool_call_end|> "
    "<|tool_call_argument_begin|>",
    "mistral": "[TOOL_CALLS] [ARGS]",
    "glm47": "<tool_call> </tool_call> <arg_key> </arg_key> <arg_value> </arg_value>",
    "laguna": "<tool_call>",
    "longcat": "<longcat_tool_call> </longcat_tool_call>",
    "minimax_m2": "<minimax:tool_call> </minimax:tool_call>",
    "minicpm5": "",
    "muse_spark": "<atem:function_calls>",
    "kimi_k3": "<|open|> <|close|> <|sep|>",
    "pythonic": "<|tool_call_start|> <|tool_call_end|>",
    "function_gemma": "<start_function_call> <end_function_call> <escape>",
    "gemma4": '<|tool_call> <tool_call|> <|"|>',
}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"type": "string", "enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "near": {"type": "number"},
        "id": {"type": "integer"},
        "ok": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {
        "place": {
            "type": "object",
            "properties": {
                "a": {"type": "string"},
                "b": {"type": "array", "items": {"$ref": "#/$defs/n"}, "maxItems": 3},
            },
            "required": ["a"],
            "additionalProperties": False,
        },
        "names": {"type": "array", "items": {"type": "string", "maxLength": 9}, "maxItems": 4},
    },
    "required": ["names"],
    "$defs": {"n": {"type": "integer"}},
}


def tool(name: str, parameters: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    described = {} if parameters is None else {"parameters": parameters}
    return {"type": "function", "function": {"name": name, **described, **more}}


SCALARS = [tool("get_weather", WEATHER), tool("find", {"properties": {"q": {"type": "string", "minLength": 1}}})]
ALL = [*SCALARS, tool("nested", NESTED)]


@functools.cache
def walks(parser: str, tokens: bool = True) -> Walks:
    """tokens: whether the markers are special tokens."""
    tokenizer = fast(byte_level())
    if tokens and MARKERS[parser]:
        tokenizer.add_special_tokens({"additional_special_tokens": MARKERS[parser].split()})
    tokenizer.init_kwargs["tool_parser_type"] = parser
    module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
    return Walks(
        tokenizer,
        tool_parser=module.parse_tool_call,
        tool_call_start=module.tool_call_start,
        tool_call_end=module.tool_call_end,
    )


def calls(of: Walks, text: str, tools: list[dict[str, Any]], whole: bool = True) -> list[dict[str, Any]]:
    """The calls in an answer, read as mlx-lm's server reads them."""
    start, end = of.tokenizer.tool_call_start, of.tokenizer.tool_call_end
    if whole:
        assert text.startswith(start)
        text = text[len(start) :]
    assert text.endswith(end)
    bodies = text[: len(text) - len(end)].split(f"{end}\n{start}") if end else [text]
    bodies = [part for body in bodies for part in (body.split(end + start) if end else [body])]
    return [call for body in bodies for call in calls_in(of.tokenizer.tool_parser(body, tools))]


def check(of: Walks, grammar: Grammar, tools: list[dict[str, Any]], seeds: range, whole: bool = True) -> list[Any]:
    known = {each["function"]["name"]: each["function"] for each in tools}
    found = []
    for seed in seeds:
        text = of.text(grammar, seed)
        if text is None:
            continue
        read = calls(of, text, tools, whole)
        assert read
        for call in read:
            parameters = known[call["name"]].get("parameters", {})
            assert isinstance(call["arguments"], dict)
            jsonschema.validate(call["arguments"], parameters)
        found.append(read)
    assert len(found) >= 2
    return found


def carried(parser: str) -> list[dict[str, Any]]:
    return SCALARS if parser == "function_gemma" else ALL


def test_every_parser_has_a_grammar() -> None:
    folder = Path(mlx_lm.tool_parsers.__file__).parent
    names = {path.stem for path in folder.glob("*.py") if path.stem != "__init__"}
    assert names == {*FORMATS, *JSON_FORMATS} == MARKERS.keys()


@pytest.mark.parametrize("tokens", [True, False], ids=["special", "text"])
@pytest.mark.parametrize("parser", MARKERS)
def test_a_call_is_read_back(parser: str, tokens: bool) -> None:
    of, tools = walks(parser, tokens), carried(parser)
    found = check(of, tool_calls(of.grammars, tools), tools, range(7))
    assert all(len(read) == 1 for read in found)
    named = check(of, tool_calls(of.grammars, tools, name="get_weather"), tools, range(3))
    assert {read[0]["name"] for read in named} == {"get_weather"}


@pytest.mark.parametrize("parser", MARKERS)
def test_several_calls(parser: str) -> None:
    of = walks(parser)
    grammar = tool_calls(
        of.grammars, [tool("go", {"properties": {"n": {"type": "integer"}}, "required": ["n"]})], several=True
    )
    tools = [tool("go")]
    found = check(of, grammar, tools, range(30, 42))
    assert max(map(len, found)) > 1


@pytest.mark.parametrize("parser", MARKERS)
def test_strict_tools_after_the_start_marker(parser: str) -> None:
    of = walks(parser)
    tools = [tool("get_weather", WEATHER, strict=True), tool("free")]
    grammar = tool_body(of.grammars, tools)
    check(of, grammar, tools, range(8), whole=False)
    for marker in MARKERS[parser].split():
        start, end = of.tokenizer.tool_call_start, of.tokenizer.tool_call_end
        assert of.grammars.special_tokens()[marker] or marker not in (start, end)


def test_markers_are_special_tokens_where_there_are_some() -> None:
    of = walks("json_tools")
    tokens = of.tokens(tool_calls(of.grammars, SCALARS), 1)
    assert tokens is not None
    special = of.grammars.special_tokens()
    assert tokens[0] == special["<tool_call>"] and tokens[-1] == special["</tool_call>"]
    assert not {*tokens[1:-1]} & {*special.values()}


def test_mistral_without_its_token_for_arguments_writes_a_list() -> None:
    of = walks("mistral", tokens=False)
    text = of.text(tool_calls(of.grammars, SCALARS), 0)
    assert text is not None
    assert json.loads(text.removeprefix("[TOOL_CALLS]"))[0]["name"] in ("get_weather", "find")


@pytest.mark.parametrize(
    ("parser", "parameter", "said"),
    [
        ("function_gemma", {"type": "object"}, "the type 'object'"),
        ("function_gemma", {"type": "array"}, "the type 'array'"),
        ("qwen3_coder", {"anyOf": [{"type": "integer"}, {"type": "null"}]}, "the integer 7"),
        ("qwen3_coder", {"type": ["string", "null"]}, "the string"),
        ("qwen3_coder", {"enum": ["null", "x"]}, 'the string "null"'),
        ("minimax_m2", {"type": ["string", "integer"]}, "the string"),
        ("glm47", {"enum": ["1", "x"]}, 'the string "1"'),
        ("glm47", {}, "a value of any type"),
        ("glm47", {"type": "string", "format": "date"}, "the keyword 'format'"),
        ("gemma4", {"type": "array", "uniqueItems": True}, "'uniqueItems'"),
        ("gemma4", {"$ref": "#/$defs/r"}, "recursive|a .ref to itself"),
        ("pythonic", {"allOf": [{"type": "string"}]}, "a combination"),
    ],
)
def test_what_a_format_cannot_carry_is_an_error(parser: str, parameter: dict[str, Any], said: str) -> None:
    schema = {"properties": {"a": parameter}, "$defs": {"r": {"type": "array", "items": {"$ref": "#/$defs/r"}}}}
    with pytest.raises(GrammarError, match=said) as caught:
        tool_calls(walks(parser).grammars, [tool("t", schema)])
    assert "tool_choice" in str(caught.value) or "keyword" in str(caught.value)


def test_other_errors() -> None:
    grammars = walks("json_tools").grammars
    with pytest.raises(GrammarError, match="tool_choice names the tool 'other', expected one of: get_weather, find"):
        tool_calls(grammars, SCALARS, name="other")
    with pytest.raises(GrammarError, match="the schema of the tool 't' cannot be used: 'not'"):
        tool_calls(grammars, [tool("t", {"not": {}})])
    with pytest.raises(GrammarError, match="no function with a name"):
        tool_calls(grammars, [{"type": "function"}])
    with pytest.raises(GrammarError, match="has other characters"):
        tool_calls(grammars, [tool("a b")])
    with pytest.raises(GrammarError, match="a call without arguments"):
        tool_calls(walks("longcat").grammars, [tool("t")])
    with pytest.raises(GrammarError, match="tools is empty"):
        tool_body(grammars, [])
    with pytest.raises(GrammarError, match="no known format for tool calls"):
        tool_calls(Walks(fast(byte_level())).grammars, SCALARS)
