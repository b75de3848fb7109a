"""Tool calls that are hard to read: markers inside arguments, texts that take parsers minutes, odd schemas."""

from __future__ import annotations

import time
from typing import Any

import pytest
from test_answer_parts import CALLS, HARMONY, TOOLS, cut_everywhere, tokenizer_of, told  # type: ignore[import-not-found]

from mlx_flash.text.answer_parts import AnswerFormat, Text, ToolCall

# What begins a call again and again; 80,000 characters of it take mlx-lm's parsers from 12 seconds to some minutes.
ENDLESS = {"gemma4": "call:a{", "kimi_k3": "<|open|>call", "muse_spark": "<atem:invoke "}


@pytest.mark.parametrize("parser", sorted(CALLS))
@pytest.mark.parametrize("inside", ["Use {end} to end.", "{start}x{end} and {end}"])
def test_an_end_marker_inside_an_argument(parser: str, inside: str) -> None:
    tokenizer = tokenizer_of(parser)
    if not tokenizer.tool_call_end:
        pytest.skip("this format has no end marker")
    if parser in ("pythonic", "kimi_k2", "minicpm5"):
        pytest.skip("the format cannot carry this text")
    city = inside.format(start=tokenizer.tool_call_start, end=tokenizer.tool_call_end)
    said = CALLS[parser].replace("Hot <Springs>", city)
    call = ToolCall("get_weather", {"city": city, "days": 2}, "")
    parts = told(AnswerFormat(tokenizer).begin(tools=TOOLS), list(f"I look.{said}\n{CALLS[parser]}"))
    assert parts[:2] == [Text("I look."), call] and len(parts) == 3


def test_an_end_marker_inside_an_argument_of_harmony() -> None:
    said = '<|channel|>commentary to=functions.add<|message|>{"a": "<|end|>"}<|call|>'
    cut_everywhere(HARMONY, said, [ToolCall("add", {"a": "<|end|>"}, "")], tools=TOOLS)


@pytest.mark.parametrize("parser", sorted(ENDLESS))
def test_no_text_keeps_a_parser_busy(parser: str) -> None:
    tokenizer = tokenizer_of(parser)
    body = ENDLESS[parser] * (80_000 // len(ENDLESS[parser]))
    parts = AnswerFormat(tokenizer).begin(tools=TOOLS)
    parts.feed(tokenizer.tool_call_start + body)
    began = time.monotonic()
    parts.finish(whole=True)
    assert time.monotonic() - began < 10


@pytest.mark.parametrize("parser", sorted(CALLS))
@pytest.mark.parametrize("parameters", [{"type": "object"}, {"properties": None}, {"properties": {"city": True}}, None])
def test_tools_with_few_or_odd_parameters(parser: str, parameters: Any) -> None:
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": parameters}}]
    (call,) = told(AnswerFormat(tokenizer_of(parser)).begin(tools=tools), [CALLS[parser]])
    assert isinstance(call, ToolCall) and call.arguments["city"] == "Hot <Springs>"


def test_blank_lines_before_the_end_of_a_call() -> None:
    said = CALLS["qwen3_coder"].replace("\n</tool_call>", "\n\n</tool_call>")
    call = ToolCall("get_weather", {"city": "Hot <Springs>", "days": 2}, "")
    cut_everywhere(tokenizer_of("qwen3_coder"), said, [call], tools=TOOLS)
