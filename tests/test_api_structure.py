"""Answers held to schemas and grammars, through OpenAI's own client."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel
from scripted import VOCABULARY, Scripted, scripted, server  # type: ignore[import-not-found]  # noqa: F401
from serving import Server, serving  # type: ignore[import-not-found]

from mlx_flash.loading.load import load
from mlx_flash.loading.plan import grammar_bytes

# ruff: noqa: F811

USER: list[Any] = [{"role": "user", "content": "How is it in Paris?"}]
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "degrees": {"type": "integer", "minimum": 0, "maximum": 40}},
    "required": ["city", "degrees"],
    "additionalProperties": False,
}


def of_schema(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema, "strict": True}}


FORMAT = of_schema(SCHEMA)
THOUGHT = "<think>\nIt is {warm}.\n</think>\n\n"
WANTED = '{"city": "Rome", "degrees": 21}'


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    degrees: int


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, **options: Any) -> Any:
    given: dict[str, Any] = {"model": "demo", "messages": USER, "temperature": 0, "max_tokens": 500, **options}
    return client.chat.completions.create(**given)


@pytest.mark.parametrize(
    "said", [WANTED, f"{THOUGHT}{WANTED}", "Well, it is warm in Rome.", f"{THOUGHT}Well, so", "", "{"]
)
@pytest.mark.parametrize("temperature", [0, 1])
def test_the_text_fits_the_schema_and_thoughts_are_free(
    client: openai.OpenAI, scripted: Scripted, said: str, temperature: float
) -> None:
    scripted.script = lambda prompt: said
    (choice,) = chat(client, response_format=FORMAT, temperature=temperature).choices
    assert choice.finish_reason == "stop"
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    if temperature == 0 or said.startswith(
        (THOUGHT, "{")
    ):  # Instead of a word that is forbidden it may begin to think.
        thoughts = getattr(choice.message, "reasoning_content", "")
        assert thoughts == ("It is {warm}." if said.startswith(THOUGHT) else "")
    if said.endswith(WANTED):
        assert json.loads(choice.message.content) == json.loads(WANTED)


def test_without_thinking_the_text_begins_at_once(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: f"{THOUGHT}{WANTED}"
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    message = chat(client, response_format=FORMAT, extra_body=extra).choices[0].message
    jsonschema.validate(json.loads(message.content), SCHEMA)
    assert not hasattr(message, "reasoning_content")


def test_parse_with_pydantic(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: "It is Paris of course"
    done = client.chat.completions.parse(model="demo", messages=USER, response_format=Weather, max_tokens=500)
    assert isinstance(done.choices[0].message.parsed, Weather)


def test_any_object(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: '[1] {"a": [1, {"b": null}]} and more'
    message = chat(client, response_format={"type": "json_object"}).choices[0].message
    assert isinstance(json.loads(message.content), dict)


def test_grammars(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: f"{THOUGHT}2026-11-29 and 30"
    regex = {"syntax": "regex", "definition": r"\d{4}-\d{2}-\d{2}"}
    assert chat(client, extra_body={"grammar": regex}).choices[0].message.content == "2026-11-29"
    scripted.script = lambda prompt: "perhaps"
    lark = {"syntax": "lark", "definition": 'start: "yes" | "no" " thanks"?'}
    assert re.fullmatch("yes|no( thanks)?", chat(client, extra_body={"grammar": lark}).choices[0].message.content)


def test_a_schema_and_tools(client: openai.OpenAI, scripted: Scripted) -> None:
    """The answer is a call, or fits the schema."""
    tool: Any = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}
    scripted.script = lambda prompt: f'{THOUGHT}<tool_call>\n{{"name": "look", "arguments": {{}}}}\n</tool_call>'
    choice = chat(client, response_format=FORMAT, tools=[tool]).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls[0].function.name == "look"
    scripted.script = lambda prompt: f"{THOUGHT}I do not look"
    choice = chat(client, response_format=FORMAT, tools=[tool]).choices[0]
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)


def test_a_long_thought_is_closed_before_the_schema(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: "<think>" + "so it goes " * 50 + f"</think>{WANTED}"
    done = chat(client, response_format=FORMAT, extra_body={"thinking_budget": 20})
    jsonschema.validate(json.loads(done.choices[0].message.content), SCHEMA)
    assert done.usage.completion_tokens_details.reasoning_tokens == 21


def test_its_memory_comes_from_the_prompt_caches(scripted: Scripted, tmp_path_factory: pytest.TempPathFactory) -> None:
    scripted.script = lambda prompt: WANTED
    needed = grammar_bytes(VOCABULARY)
    for caches, status in ((needed - 1, 400), (needed, 200)):
        with serving(lambda caches=caches: load(scripted.folder, context=600, prompt_cache=caches)) as server:
            body = {"messages": USER, "response_format": FORMAT}
            for _ in range(2):
                answer = server.post("/v1/chat/completions", body)
                assert answer.status_code == status
            planned = server.get("/stats").json()["prompt_caches"]["planned_bytes"]
            assert planned == (0 if status == 200 else caches)
            assert status == 200 or "Start it with --prompt-cache 22MB" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("options", "param", "word"),
    [
        ({"response_format": of_schema({"type": "object", "if": {}})}, "response_format", "if"),
        ({"response_format": of_schema({"type": "thing"})}, "response_format", "thing"),
        ({"extra_body": {"grammar": {"syntax": "lark", "definition": "start: nothing"}}}, "grammar", "nothing"),
        ({"extra_body": {"grammar": {"syntax": "regex", "definition": "("}}}, "grammar", "regular"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(client: openai.OpenAI, options: Any, param: str, word: str) -> None:
    with pytest.raises(openai.BadRequestError, match=word) as caught:
        chat(client, **options)
    assert caught.value.param == param


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_does_not_end_within_the_thoughts(
    client: openai.OpenAI, scripted: Scripted, temperature: float
) -> None:
    scripted.script = lambda prompt: "<think>\nIt is"
    choice = chat(client, response_format=FORMAT, temperature=temperature).choices[0]
    jsonschema.validate(json.loads(choice.message.content), SCHEMA)
    assert choice.message.reasoning_content == "It is"
    choice = chat(client, tools=[LOOK], tool_choice=NAMED, temperature=temperature).choices[0]
    jsonschema.validate(json.loads(choice.message.tool_calls[0].function.arguments), SCHEMA)
    assert choice.finish_reason == "tool_calls" and choice.message.reasoning_content == "It is"


def test_a_grammar_that_becomes_too_complex_is_the_requests_fault(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: '{"a'
    ways = [{"type": "object", "properties": {f"a{i}": {"pattern": f"^[a-z]{{1,{100 + i}}}$"}}} for i in range(300)]
    with pytest.raises(openai.BadRequestError, match="Use a simpler grammar") as caught:
        chat(client, response_format=of_schema({"anyOf": ways}))
    assert caught.value.code == "invalid_grammar"


# -- tools ---------------------------------------------------------------------------------------------------

LOOK: Any = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
WAIT: Any = {"type": "function", "function": {"name": "wait", "parameters": NOTHING}}
NAMED: Any = {"type": "function", "function": {"name": "look"}}


def test_a_call_is_forced(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: f"{THOUGHT}I would rather talk."
    for choice, name in (("required", None), (NAMED, "look")):
        done = chat(client, tools=[LOOK, WAIT], tool_choice=choice, parallel_tool_calls=False).choices[0]
        assert done.finish_reason == "tool_calls" and done.message.content is None
        (call,) = done.message.tool_calls
        assert call.function.name in ("look", "wait") if name is None else call.function.name == name
        if call.function.name == "look":
            jsonschema.validate(json.loads(call.function.arguments), SCHEMA)


def test_several_calls_may_be_forced(client: openai.OpenAI, scripted: Scripted) -> None:
    one = f'<tool_call>\n{{"name": "look", "arguments": {WANTED}}}\n</tool_call>'
    scripted.script = lambda prompt: f"{one}\n{one}"
    calls = chat(client, tools=[LOOK], tool_choice="required").choices[0].message.tool_calls
    assert [json.loads(call.function.arguments) for call in calls] == [json.loads(WANTED)] * 2


def test_strict_tools_are_held_to_their_schema(client: openai.OpenAI, scripted: Scripted) -> None:
    strict: Any = {"type": "function", "function": {**LOOK["function"], "strict": True}}
    broken = WANTED.replace("21", "2199").replace("Rome", "Oslo")
    scripted.script = lambda prompt: (
        f'{THOUGHT}I look.\n<tool_call>\n{{"name": "look", "arguments": {broken}}}\n</tool_call>'
    )
    done = chat(client, tools=[strict]).choices[0]
    assert done.message.content.startswith("I look.") and done.finish_reason == "tool_calls"
    jsonschema.validate(json.loads(done.message.tool_calls[0].function.arguments), SCHEMA)
    loose = chat(client, tools=[LOOK]).choices[0].message.tool_calls[0]
    assert json.loads(loose.function.arguments) == json.loads(broken)


@pytest.mark.parametrize(
    "options", [{}, {"tool_choice": "required"}, {"tool_choice": NAMED}, {"response_format": FORMAT}]
)
def test_a_call_may_end_the_thoughts(client: openai.OpenAI, scripted: Scripted, options: Any) -> None:
    call = f'<tool_call>\n{{"name": "look", "arguments": {WANTED}}}\n</tool_call>'
    scripted.script = lambda prompt: f"<think>\nSo I look. {call}"
    choice = chat(client, tools=[LOOK], **options).choices[0]
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert choice.message.reasoning_content == "So I look."
    assert [json.loads(each.function.arguments) for each in choice.message.tool_calls] == [json.loads(WANTED)]


def test_a_broken_call_in_the_thoughts(client: openai.OpenAI, scripted: Scripted) -> None:
    broken = "<tool_call>{look}</tool_call>"
    scripted.script = lambda prompt: f"<think>\nPerhaps {broken}, no.\n</think>\n\n{WANTED}"
    message = chat(client, tools=[LOOK], response_format=FORMAT).choices[0].message
    assert message.reasoning_content == f"Perhaps {broken}, no." and json.loads(message.content) == json.loads(WANTED)
