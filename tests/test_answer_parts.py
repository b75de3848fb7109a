"""Answers divided into thoughts, text and tool calls, wherever the pieces of their text end."""

from __future__ import annotations

import importlib
import itertools
import json
import pkgutil
from types import SimpleNamespace
from typing import Any

import mlx_lm.tool_parsers
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.chat_templates import muse_spark

from mlx_flash.text.answer_parts import AnswerFormat, AnswerParts, Part, Text, Thought, ToolCall
from mlx_flash.text.guide import Guide

# ruff: noqa: E501 (answers stand in one line, as a model writes them)

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}},
    },
}
ADD = {"type": "function", "function": {"name": "add"}}
TOOLS = [WEATHER, ADD]
ARGUMENTS = {"city": "Hot <Springs>", "days": 2}

# What a model of each of mlx-lm's formats says to call get_weather once, as its chat template writes it.
CALLS = {
    "json_tools": '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Hot <Springs>", "days": 2}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=get_weather>\n<parameter=city>\nHot <Springs>\n</parameter>\n<parameter=days>\n2\n"
    "</parameter>\n</function>\n</tool_call>",
    "glm47": "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Hot <Springs></arg_value><arg_key>days</arg_key>"
    "<arg_value>2</arg_value></tool_call>",
    "longcat": "<longcat_tool_call>get_weather\n<longcat_arg_key>city</longcat_arg_key>\n<longcat_arg_value>Hot <Springs>"
    "</longcat_arg_value>\n<longcat_arg_key>days</longcat_arg_key>\n<longcat_arg_value>2</longcat_arg_value>\n"
    "</longcat_tool_call>",
    "kimi_k2": "<|tool_calls_section_begin|><|tool_call_begin|>functions.get_weather:0<|tool_call_argument_begin|>"
    '{"city": "Hot <Springs>", "days": 2}<|tool_call_end|><|tool_calls_section_end|>',
    "kimi_k3": '<|open|>tools<|sep|><|open|>call tool="get_weather" index="1"<|sep|><|open|>argument key="city" '
    'type="string"<|sep|>Hot <Springs><|close|>argument<|sep|><|open|>argument key="days" type="number"<|sep|>2<|close|>'
    "argument<|sep|><|close|>call<|sep|><|close|>tools<|sep|>",
    "minimax_m2": '<minimax:tool_call>\n<invoke name="get_weather">\n<parameter name="city">Hot <Springs></parameter>\n'
    '<parameter name="days">2</parameter>\n</invoke>\n</minimax:tool_call>',
    "minicpm5": '<function name="get_weather"><param name="city"><![CDATA[Hot <Springs>]]></param><param name="days">2</param>'
    "</function>",
    "muse_spark": '<atem:function_calls>\n<atem:invoke name="get_weather">\n<atem:parameter name="city">Hot <Springs>'
    '</atem:parameter>\n<atem:parameter name="days">2</atem:parameter>\n</atem:invoke>\n</atem:function_calls>',
    "pythonic": "<|tool_call_start|>[get_weather(city='Hot <Springs>', days=2)]<|tool_call_end|>",
    "mistral": '[TOOL_CALLS]get_weather[ARGS]{"city": "Hot <Springs>", "days": 2}',
    "gemma4": '<|tool_call>call:get_weather{city:<|"|>Hot <Springs><|"|>,days:2}<tool_call|>',
    "function_gemma": "<start_function_call>call:get_weather{city:<escape>Hot <Springs><escape>,days:2}<end_function_call>",
}
CALLS["laguna"] = CALLS["glm47"]
HEADED = "to=user<|message|>"  # a Muse Spark answer is made of messages with headers


def tokenizer_of(parser: str | None, thinks: bool = True, **changes: Any) -> Any:
    """A tokenizer as far as AnswerFormat sees it, with one of mlx-lm's parsers."""
    known: dict[str, Any] = {
        "has_thinking": thinks,
        "think_start": "<think>" if thinks else None,
        "think_end": "</think>" if thinks else None,
        "think_start_tokens": (1,) if thinks else None,
        "think_end_tokens": (2,) if thinks else None,
        "rfind_think_start": lambda ids: max((i for i, token in enumerate(ids) if token == 1), default=-1),
        "rfind_think_end": lambda ids: max((i for i, token in enumerate(ids) if token == 2), default=-1),
        "decode": lambda ids: "".join({1: "<think>", 2: "</think>", 3: "\n"}.get(token, "x") for token in ids),
        "has_tool_calling": parser is not None,
        "tool_call_start": None,
        "tool_call_end": None,
        "structural_markers": (),
        "response_transitions": {},
        "response_initial_state": None,
        "get_vocab": dict,
    }
    if parser is not None:
        module = importlib.import_module(f"mlx_lm.tool_parsers.{parser}")
        known |= {"tool_call_start": module.tool_call_start, "tool_call_end": module.tool_call_end}
        known["tool_parser"] = module.parse_tool_call
    return SimpleNamespace(**known | changes)


HARMONY = tokenizer_of(
    None, False, get_vocab=lambda: dict.fromkeys(("<|start|>", "<|channel|>", "<|message|>", "<|end|>"))
)
MUSE = tokenizer_of(
    "muse_spark",
    False,
    response_transitions=muse_spark.RESPONSE_FORMAT["transitions"],
    response_initial_state=muse_spark.RESPONSE_FORMAT["initial_state"],
)


def told(parts: AnswerParts, pieces: list[str], whole: bool = True) -> list[Part]:
    """All parts of an answer that comes in these pieces, neighbours of one kind joined, without ids."""
    found: list[Part] = []
    for piece in pieces:
        found += parts.feed(piece)
    found += parts.finish(whole)
    joined: list[Part] = []
    groups: Any = itertools.groupby(found, lambda part: part if isinstance(part, ToolCall) else type(part))
    for kind, group in groups:
        if isinstance(kind, ToolCall):
            joined.append(ToolCall(kind.name, kind.arguments, ""))
        else:
            joined.append(kind("".join(part.text for part in group)))
    return joined


def cut_everywhere(tokenizer: Any, said: str, expected: list[Part], **options: Any) -> None:
    """Every way to cut the answer into two pieces, and into single characters, gives the same parts."""
    format, whole = AnswerFormat(tokenizer), options.pop("whole", True)
    for place in range(len(said) + 1):
        assert told(format.begin(**options), [said[:place], said[place:]], whole) == expected, place
    assert told(format.begin(**options), list(said), whole) == expected


def call(**arguments: Any) -> ToolCall:
    return ToolCall("get_weather", arguments or ARGUMENTS, "")


def test_every_parser_of_mlx_lm_has_an_answer() -> None:
    names = {module.name for module in pkgutil.iter_modules(mlx_lm.tool_parsers.__path__)}
    assert names == set(CALLS)


@pytest.mark.parametrize("parser", sorted(set(CALLS) - {"muse_spark"}))
def test_a_call_of_each_format(parser: str) -> None:
    said = f"<think>\nWhich city?\n</think>\n\nI look. \n{CALLS[parser]}"
    cut_everywhere(tokenizer_of(parser), said, [Thought("Which city?"), Text("I look."), call()], tools=TOOLS)


def test_a_call_of_muse_spark() -> None:
    said = f"to=self<|message|>Which city?<|eom|>to=user<|message|>I look.<|eom|>{CALLS['muse_spark']}<|eot|>"
    cut_everywhere(MUSE, said, [Thought("Which city?"), Text("I look."), call()], tools=TOOLS)


def test_harmony() -> None:
    said = (
        "<|channel|>analysis<|message|>Which city?<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        '{"city": "Hot <Springs>", "days": 2}<|call|>'
    )
    cut_everywhere(HARMONY, said, [Thought("Which city?"), Text("I look."), call()], tools=TOOLS)
    ended_by_token = said.removesuffix("<|call|>")  # It is one of the tokens that end an answer.
    cut_everywhere(HARMONY, ended_by_token, [Thought("Which city?"), Text("I look."), call()], tools=TOOLS)
    other_order = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant to=functions.add<|channel|>commentary json<|message|>{}"
    cut_everywhere(HARMONY, other_order, [Thought("Hm"), ToolCall("add", {}, "")], tools=TOOLS)
    cut_everywhere(HARMONY, "<|channel|>final<|message|>2 < 3", [Text("2 < 3")])
    cut_everywhere(HARMONY, " < 3<|end|>", [Text(" < 3")], continues=True)
    broken = '<|channel|>commentary to=functions.add<|message|>{"a": <|call|>'
    cut_everywhere(HARMONY, broken, [Text('{"a": ')], tools=TOOLS)


@pytest.mark.parametrize("parser", sorted(set(CALLS) - {"muse_spark"}))
def test_calls_are_not_looked_for_without_tools(parser: str) -> None:
    cut_everywhere(tokenizer_of(parser, thinks=False), CALLS[parser], [Text(CALLS[parser])])


@pytest.mark.parametrize("parser", sorted(set(CALLS) - {"muse_spark"}))
def test_an_answer_cut_inside_a_call_is_text(parser: str) -> None:
    """However it was cut: never half a call."""
    tokenizer, said = tokenizer_of(parser), f"Well. {CALLS[parser]}"
    end = len(said) - (1 if tokenizer.tool_call_end else 0)
    for place in range(len("Well. ") + len(tokenizer.tool_call_start), end):
        parts = AnswerFormat(tokenizer).begin(tools=TOOLS)
        assert told(parts, [said[:place]], whole=False) == [Text(said[:place])], place


def test_calls_in_a_row() -> None:
    one, two = CALLS["json_tools"], '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>'
    tokenizer = tokenizer_of("json_tools")
    cut_everywhere(tokenizer, f"{one}\n{two}\n", [call(), ToolCall("add", {"a": 1}, "")], tools=TOOLS)
    cut_everywhere(tokenizer, f"{one}\n{two} and", [call()], tools=TOOLS, one_call=True)
    section = CALLS["kimi_k2"].replace("<|tool_calls_section_end|>", "")
    second = (
        "<|tool_call_begin|>functions.add:1<|tool_call_argument_begin|>{}<|tool_call_end|><|tool_calls_section_end|>"
    )
    cut_everywhere(tokenizer_of("kimi_k2"), section + second, [call(), ToolCall("add", {}, "")], tools=TOOLS)
    parts = AnswerFormat(tokenizer).begin(tools=TOOLS)
    ids = [part.id for part in parts.feed(one + one + two) if isinstance(part, ToolCall)]
    assert len(set(ids)) == 3


@pytest.mark.parametrize(
    "inside",
    [
        "not JSON", "[]", "3", "{}", '{"name": 3}', '{"name": "add", "arguments": [1]}', '{"name": " "}',
        '{"name": "add", "arguments": {"a": NaN}}', '{"name": "add", "arguments": {"a": "\\ud800"}}', "[" * 100000,
    ],
)  # fmt: skip
def test_what_is_no_call_is_text(inside: str) -> None:
    said = f"<tool_call>{inside}</tool_call> so"
    parts = AnswerFormat(tokenizer_of("json_tools")).begin(tools=TOOLS)
    assert told(parts, [said]) == [Text(said)]


def test_a_call_without_its_end_mark() -> None:
    """A model may end its answer there. The name must then be one of the tools."""
    unmarked = CALLS["json_tools"].removesuffix("</tool_call>")
    cut_everywhere(tokenizer_of("json_tools"), unmarked, [call()], tools=TOOLS)
    cut_everywhere(tokenizer_of("glm47"), "<tool_call>get_wea", [Text("<tool_call>get_wea")], tools=TOOLS)


def test_a_call_inside_thoughts() -> None:
    tokenizer = tokenizer_of("json_tools")
    cut_everywhere(tokenizer, f"<think>I call {CALLS['json_tools']}", [Thought("I call"), call()], tools=TOOLS)
    about = "<think>I could write <tool_call> like </tool_call> so.</think>Yes"
    expected: list[Part] = [Thought("I could write <tool_call> like </tool_call> so."), Text("Yes")]
    cut_everywhere(tokenizer, about, expected, tools=TOOLS)


@pytest.mark.parametrize(
    ("prompt", "continues", "thinking"),
    [
        ([], False, False),
        ([9, 1], False, True),
        ([9, 1, 3], False, True),
        ([9, 1, 3, 2, 3], False, False),
        ([9, 1, 9, 9], False, False),  # somebody wrote about the marker
        ([9, 1, *[9] * 40], False, False),
        ([9, 1, *[9] * 40], True, True),  # the answer's thoughts have begun
        ([9, 1, 9, 2, 9], True, False),
    ],
)
def test_prompts_that_open_the_thoughts(prompt: list[int], continues: bool, thinking: bool) -> None:
    said = "so\n</think>\n\nYes"
    expected: list[Part] = [Thought("so"), Text("Yes")] if thinking else [Text(said)]
    cut_everywhere(tokenizer_of(None), said, expected, prompt=prompt, continues=continues)


def test_thoughts_that_do_not_end() -> None:
    cut_everywhere(tokenizer_of(None), "<think>\nso it </thin", [Thought("so it </thin")], whole=False)


def test_stop_words_end_the_text_only() -> None:
    tokenizer = tokenizer_of("json_tools")
    said = f"<think>a STOP\n\n</think>\n\nfirst STOP {CALLS['json_tools']}"
    for stop, shown in ((["STOP"], "first "), (["\n\n", "rst S"], "fi")):
        cut_everywhere(tokenizer, said, [Thought("a STOP"), Text(shown)], tools=TOOLS, stop=stop)
    parts = AnswerFormat(tokenizer).begin(stop=["none", "STOP"])
    parts.feed(said)
    assert parts.ended and parts.stopped == "STOP"
    before = "first STO"  # held back until the call begins
    cut_everywhere(tokenizer, before + CALLS["json_tools"], [Text(before), call()], tools=TOOLS, stop=["STOP"])


def test_plain_answers_keep_their_white_space() -> None:
    for said in (" a \n", "\n\n", "", "a\n\n"):
        expected: list[Part] = [Text(said)] if said else []
        for tokenizer in (tokenizer_of(None), tokenizer_of(None, thinks=False), tokenizer_of("json_tools")):
            cut_everywhere(tokenizer, said, expected, tools=TOOLS)


MARKS = st.sampled_from(
    ["<think>", "</think>", "<tool_call>", "</tool_call>", "\n", "a", " ", "<", '{"name": "add"}', "STOP"]
)


@given(st.lists(MARKS, max_size=12).map("".join), st.lists(st.integers(1, 9), min_size=30, max_size=30), st.booleans())
def test_any_answer_in_any_pieces(said: str, lengths: list[int], whole: bool) -> None:
    """The same parts as in one piece; what was passed on is never taken back; places lead to the text."""
    format = AnswerFormat(tokenizer_of("json_tools"))
    expected = told(format.begin(tools=TOOLS, stop=["STOP"]), [said], whole)
    pieces, at = [], 0
    for length in lengths:
        pieces.append(said[at : at + length])
        at += length
    pieces.append(said[at:])
    assert told(format.begin(tools=TOOLS, stop=["STOP"]), pieces, whole) == expected
    parts = format.begin(tools=TOOLS, stop=["STOP"])
    for part in [each for piece in pieces for each in parts.feed(piece)] + parts.finish(whole):
        if isinstance(part, Text):
            assert said[part.start : part.start + len(part.text)] == part.text
            assert "STOP" not in part.text or "<tool_call>" in said


def test_arguments_are_json() -> None:
    assert json.loads(ToolCall("f", {"a": "ä\n"}, "").arguments_text) == {"a": "ä\n"}


def test_a_harmony_answer_that_is_continued() -> None:
    cut_everywhere(HARMONY, " day.<|return|>", [Text(" day.")], continues=True)


class Recorder:
    """A grammar, and the answer that follows it."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def begin(self) -> Recorder:
        return self

    def accept(self, token: int) -> None:
        self.taken.append(token)


def test_a_grammar_for_the_text_does_not_hold_in_a_harmony_call() -> None:
    tokenizer = tokenizer_of(None, False, get_vocab=HARMONY.get_vocab, encode=lambda text, add_special_tokens: [0])
    analysis = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    for said, held in (
        ('<|channel|>commentary to=functions.add<|message|>{"a": 1}', ""),
        ('<|channel|>final<|message|>{"a": 1}', '{"a": 1}'),
    ):
        grammar = Recorder()
        parts = AnswerFormat(tokenizer).begin(tools=TOOLS)
        guide = Guide(parts, grammar=grammar, may_call=True)
        for character in analysis + said:
            parts.feed(character)
            guide.took(ord(character))
        assert "".join(map(chr, grammar.taken)) == held
