"""Tools and thoughts through OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from scripted import Scripted, scripted, server  # type: ignore[import-not-found]  # noqa: F401
from serving import Server  # type: ignore[import-not-found]

from mlx_flash.server.answer_progress import AnswerInProgress

# ruff: noqa: F811

USER = [{"role": "user", "content": "How is it in Paris?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = f"<think>\nI should look.\n</think>\n\nOne moment.\n{CALL}"


@pytest.fixture
def client(server: Server, scripted: Scripted) -> Iterator[openai.OpenAI]:
    scripted.prompts.clear()
    scripted.script = lambda prompt: ANSWER
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **options: Any) -> Any:
    given: dict[str, Any] = {"model": "demo", "messages": USER, "temperature": 0, **options}
    return client.chat.completions.create(**given)


def test_tools_reach_the_template_and_calls_come_out(client: openai.OpenAI, scripted: Scripted) -> None:
    (choice,) = chat(client, tools=[WEATHER]).choices
    assert '"name": "get_weather"' in scripted.prompts[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content == "One moment."
    assert choice.message.reasoning_content == "I should look."
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.id.startswith("call_") and call.function.name == "get_weather"
    assert json.loads(call.function.arguments) == {"city": "Paris"}


def test_a_stream_has_the_same_parts(client: openai.OpenAI) -> None:
    chunks = list(chat(client, tools=[WEATHER], stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(delta.content or "" for delta in deltas) == "One moment."
    assert "".join(getattr(delta, "reasoning_content", "") for delta in deltas) == "I should look."
    (calls,) = [delta.tool_calls for delta in deltas if delta.tool_calls]
    assert calls[0].index == 0 and calls[0].id and calls[0].function.name == "get_weather"
    assert json.loads(calls[0].function.arguments) == {"city": "Paris"}
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "tool_calls"
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == len(ANSWER) + 1 - len("<think></think>") + 2
    assert usage.completion_tokens_details.reasoning_tokens == len("\nI should look.\n") + 2


def test_the_loop_with_a_tool(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: "It is sunny." if "22 degrees" in prompt else ANSWER
    messages: list[Any] = list(USER)
    message = chat(client, messages=messages, tools=[WEATHER]).choices[0].message
    messages.append(message)
    messages.append({"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "22 degrees"})
    answer = chat(client, messages=messages, tools=[WEATHER]).choices[0]
    assert answer.message.content == "It is sunny." and answer.finish_reason == "stop"
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in scripted.prompts[1]


def test_without_tools_the_text_stays(client: openai.OpenAI) -> None:
    for options in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        message = chat(client, **options).choices[0].message
        assert message.content == f"One moment.\n{CALL}" and message.tool_calls is None


def test_several_calls_and_one(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: f"{CALL}\n{CALL}"
    calls = chat(client, tools=[WEATHER]).choices[0].message.tool_calls
    assert len({call.id for call in calls}) == 2
    deltas = [c.choices[0].delta for c in chat(client, tools=[WEATHER], stream=True)]
    assert [call.index for delta in deltas for call in delta.tool_calls or ()] == [0, 1]
    one = chat(client, tools=[WEATHER], parallel_tool_calls=False).choices[0]
    assert len(one.message.tool_calls) == 1 and one.finish_reason == "tool_calls" and one.message.content is None


def test_thoughts_are_switched_off_and_limited(client: openai.OpenAI, scripted: Scripted) -> None:
    chat(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert scripted.prompts[-1].endswith("<think>\n\n</think>\n\n")
    chat(client, reasoning_effort="none")
    assert scripted.prompts[-1].endswith("<think>\n\n</think>\n\n")
    for budget, thoughts in ((5, "I s"), (0, "")):
        done = chat(client, extra_body={"thinking_budget": budget})
        assert getattr(done.choices[0].message, "reasoning_content", "") == thoughts
        assert done.usage.completion_tokens_details.reasoning_tokens == max(budget, 1) + 1  # with both markers
    cut = chat(client, max_tokens=6).choices[0]
    assert cut.finish_reason == "length" and cut.message.content is None and cut.message.reasoning_content == "I sh"


def test_probabilities_are_those_of_the_text(client: openai.OpenAI) -> None:
    whole = chat(client, tools=[WEATHER], logprobs=True, top_logprobs=2).choices[0]
    assert "".join(entry.token for entry in whole.logprobs.content) == "One moment."
    chunks = chat(client, tools=[WEATHER], logprobs=True, stream=True)
    found = [c.choices[0].logprobs for c in chunks if c.choices[0].logprobs is not None]
    assert "".join(entry.token for each in found for entry in each.content) == "One moment."


def test_several_answers(client: openai.OpenAI, scripted: Scripted) -> None:
    done = chat(client, n=3, tools=[WEATHER])
    assert [choice.index for choice in done.choices] == [0, 1, 2]
    assert {choice.message.content for choice in done.choices} == {"One moment."}
    assert done.usage.prompt_tokens == chat(client, tools=[WEATHER]).usage.prompt_tokens  # counted once
    chunks = list(chat(client, n=2, stream=True))
    for index in (0, 1):
        text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == index)
        assert text == f"One moment.\n{CALL}"
    several = client.completions.create(model="demo", prompt=["a", "b"], n=2, max_tokens=5, temperature=0)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]
    assert several.usage is not None and several.usage.prompt_tokens == 2 and several.usage.completion_tokens == 20


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"tools": [WEATHER], "tool_choice": "sometimes"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "other"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]}, "tools"),
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format"),
        ({"n": 5}, "n"),
        ({"extra_body": {"grammar": {"syntax": "gbnf", "definition": ""}}}, "grammar"),
    ],
)
def test_what_cannot_be_done_is_named(client: openai.OpenAI, options: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, **options)
    assert caught.value.param == param


def test_the_server_s_own_defaults(client: openai.OpenAI, server: Server, scripted: Scripted) -> None:
    engine = server.engine
    engine.template_variables, engine.thinking_tokens = {"enable_thinking": False}, 3
    try:
        chat(client)
        assert scripted.prompts[-1].endswith("<think>\n\n</think>\n\n")
        done = chat(client, extra_body={"chat_template_kwargs": {"enable_thinking": True}})
        assert not scripted.prompts[-1].endswith("</think>\n\n")
        assert done.usage.completion_tokens_details.reasoning_tokens == 4
    finally:
        engine.template_variables, engine.thinking_tokens = {}, None


def test_the_probabilities_of_thoughts_are_not_kept(
    client: openai.OpenAI, scripted: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[int] = []
    take = AnswerInProgress.take

    def counting(answer: AnswerInProgress, response: Any) -> Any:
        items = take(answer, response)
        held.append(len(answer._held))
        return items

    monkeypatch.setattr(AnswerInProgress, "take", counting)
    scripted.script = lambda prompt: f"<think>{'long ' * 50}</think>\n\nZoë. <think>more</think> é"
    choice = chat(client, logprobs=True, top_logprobs=2).choices[0]
    said = b"".join(bytes(entry.bytes) for entry in choice.logprobs.content)
    assert said.decode() == choice.message.content and max(held) < 10
