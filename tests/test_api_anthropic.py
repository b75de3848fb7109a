"""Anthropic's messages through Anthropic's own client."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2 as httpx
import pytest
from scripted import Scripted, scripted, server  # type: ignore[import-not-found]  # noqa: F401
from serving import Server, serving  # type: ignore[import-not-found]

from mlx_flash.server.api_errors import ApiError, PromptTooLong
from mlx_flash.server.apis.anthropic import MessagesForm, MessagesRequest, TokenCountRequest
from mlx_flash.server.apis.error_forms import error_response
from mlx_flash.server.apis.openai_common import parse
from mlx_flash.server.jobs import Progress
from mlx_flash.text.generation_config import GenerationConfig

# ruff: noqa: F811

USER: Any = [{"role": "user", "content": "How is it in Paris?"}]
WEATHER: Any = {
    "name": "get_weather",
    "description": "Tells the weather.",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = f"<think>\nI should look.\n</think>\n\nOne moment.\n{CALL}"
IMAGE: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "iVBORw0KGgo="}}


@pytest.fixture
def client(server: Server, scripted: Scripted) -> Iterator[anthropic.Anthropic]:
    scripted.prompts.clear()
    scripted.script = lambda prompt: ANSWER
    with anthropic.Anthropic(base_url=server.url, api_key="none", max_retries=0) as client:
        yield client


def given(**options: Any) -> dict[str, Any]:
    # This client has no parameter for the temperature any more.
    body = {"temperature": 0, **options.pop("extra_body", {})}
    return {"model": "claude-any", "max_tokens": 20000, "messages": USER, "extra_body": body, **options}


def ask(client: anthropic.Anthropic, **options: Any) -> Any:
    return client.messages.create(**given(**options))


def asked(**fields: Any) -> MessagesRequest:
    body = {"max_tokens": 9, "messages": USER, **fields}
    request = parse(MessagesRequest, json.dumps(body).encode())
    request.check()
    return request


# -- answers -------------------------------------------------------------------------------------------------


def test_a_whole_answer(client: anthropic.Anthropic, scripted: Scripted) -> None:
    message = ask(client, tools=[WEATHER], system="Be brief.")
    assert '"name": "get_weather"' in scripted.prompts[0] and "system\nBe brief.\n" in scripted.prompts[0]
    thinking, text, call = message.content
    assert (thinking.type, thinking.thinking, thinking.signature) == ("thinking", "I should look.", "")
    assert (text.type, text.text) == ("text", "One moment.")
    assert (call.type, call.name, call.input) == ("tool_use", "get_weather", {"city": "Paris"})
    assert call.id.startswith("toolu_") and message.id.startswith("msg_") and message.model == "demo"
    assert message.stop_reason == "tool_use" and message.stop_sequence is None
    usage = message.usage
    tokens = len(re.sub(r"<\|im_\w+\|>", "#", scripted.prompts[0]))
    assert usage.input_tokens + usage.cache_read_input_tokens == tokens
    assert usage.output_tokens == len(ANSWER) + 1 - len("<think></think>") + 2
    assert usage.output_tokens_details.thinking_tokens == len("\nI should look.\n") + 2


def test_a_stream_makes_the_same_message(client: anthropic.Anthropic, scripted: Scripted) -> None:
    scripted.script = lambda prompt: f"<think>\nHm.\n</think>\n\nYes.\n{CALL}"
    whole = ask(client, tools=[WEATHER])
    with client.messages.stream(**given(tools=[WEATHER])) as stream:
        kinds = [event.type for event in stream]
        message: Any = stream.get_final_message()
    assert {"thinking", "text", "input_json", "signature", "message_stop"} <= set(kinds)
    assert [block.type for block in message.content] == ["thinking", "text", "tool_use"]
    assert message.content[0].thinking == "Hm." and message.content[1].text == "Yes."
    assert message.content[2].input == {"city": "Paris"} and message.stop_reason == "tool_use"
    assert message.usage.output_tokens == whole.usage.output_tokens
    read = message.usage.cache_read_input_tokens
    assert read > 0
    assert message.usage.input_tokens + read == whole.usage.input_tokens + whole.usage.cache_read_input_tokens


def events_of(server: Server, **body: Any) -> list[tuple[str, dict[str, Any]]]:
    body = {"model": "any", "max_tokens": 500, "messages": USER, "temperature": 0, "stream": True, **body}
    response = server.post("/v1/messages?beta=true", body, headers={"anthropic-version": "2023-06-01"})
    assert response.status_code == 200 and response.headers["content-type"].startswith("text/event-stream")
    events = []
    for part in response.text.removesuffix("\n\n").split("\n\n"):
        first, second = part.split("\n")
        events.append((first.removeprefix("event: "), json.loads(second.removeprefix("data: "))))
    assert all(name == data["type"] for name, data in events)
    return events


def test_the_order_of_events(server: Server, client: anthropic.Anthropic, scripted: Scripted) -> None:
    scripted.script = lambda prompt: f"<think>\na\n</think>\n\nb\n{CALL}\n{CALL}"
    tools = [{"type": "web_search_20250305", "name": "web_search"}, WEATHER]
    events = [each for each in events_of(server, tools=tools) if each[0] != "ping"]
    found = []
    for name, data in events:
        block = data.get("content_block", {}).get("type") or data.get("delta", {}).get("type")
        found.append((name.removeprefix("content_block_"), data.get("index"), block))
    call = [("start", "tool_use"), ("delta", "input_json_delta"), ("stop", None)]
    assert found == [
        ("message_start", None, None),
        ("start", 0, "thinking"),
        ("delta", 0, "thinking_delta"),
        ("delta", 0, "signature_delta"),
        ("stop", 0, None),
        ("start", 1, "text"),
        ("delta", 1, "text_delta"),
        ("stop", 1, None),
        *((name, 2, kind) for name, kind in call),
        *((name, 3, kind) for name, kind in call),
        ("message_delta", None, None),
        ("message_stop", None, None),
    ]
    started = events[0][1]["message"]
    assert started["content"] == [] and started["stop_reason"] is None and started["usage"]["input_tokens"] > 100
    blocks = [data["content_block"] for name, data in events if name == "content_block_start"]
    assert blocks[0] == {"type": "thinking", "thinking": "", "signature": ""}
    assert blocks[1] == {"type": "text", "text": ""} and blocks[2]["input"] == {}
    assert len({block["id"] for block in blocks[2:]}) == 2
    done = events[-2][1]
    assert done["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert done["usage"]["input_tokens"] + done["usage"]["cache_read_input_tokens"] == started["usage"]["input_tokens"]


def test_the_loop_with_tools(client: anthropic.Anthropic, scripted: Scripted) -> None:
    scripted.script = lambda prompt: "It is sunny." if "22 degrees" in prompt else f"<think>\nHm.\n</think>\n\n{CALL}"
    messages: list[Any] = list(USER)
    message = ask(client, messages=messages, tools=[WEATHER])
    (thinking, call) = message.content
    result = {"type": "tool_result", "tool_use_id": call.id, "content": [{"type": "text", "text": "22 degrees"}]}
    messages += [message.to_param(), {"role": "user", "content": [result]}]
    answer = ask(client, messages=messages, tools=[WEATHER])
    assert answer.content[0].text == "It is sunny." and answer.stop_reason == "end_turn"
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in scripted.prompts[1]
    assert "<tool_response>\n22 degrees\n</tool_response>" in scripted.prompts[1]
    assert thinking.thinking == "Hm."


def test_one_call(client: anthropic.Anthropic, scripted: Scripted) -> None:
    scripted.script = lambda prompt: f"{CALL}\n{CALL}"
    assert len(ask(client, tools=[WEATHER]).content) == 2
    one = ask(client, tools=[WEATHER], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert len(one.content) == 1 and one.stop_reason == "tool_use"
    none = ask(client, tools=[WEATHER], tool_choice={"type": "none"})
    assert none.content[0].text == f"{CALL}\n{CALL}" and none.stop_reason == "end_turn"


def test_how_an_answer_stops(client: anthropic.Anthropic, scripted: Scripted, server: Server) -> None:
    scripted.script = lambda prompt: "<think>\nstop\n</think>\n\none stop two"
    stopped = ask(client, stop_sequences=["stop", "never"])
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == "stop"
    assert [block.type for block in stopped.content] == ["thinking", "text"] and stopped.content[1].text == "one "
    cut = ask(client, max_tokens=3)
    assert cut.stop_reason == "max_tokens" and [block.type for block in cut.content] == ["thinking"]
    assert dict(events_of(server, stop_sequences=["stop"]))["message_delta"]["delta"] == {
        "stop_reason": "stop_sequence",
        "stop_sequence": "stop",
    }
    scripted.script = lambda prompt: ""
    assert ask(client).content == []


def test_thoughts_are_limited_and_switched_off(client: anthropic.Anthropic, scripted: Scripted) -> None:
    limited = ask(client, thinking={"type": "enabled", "budget_tokens": 5})
    assert limited.content[0].thinking == "I s"
    ask(client, thinking={"type": "disabled"})
    assert scripted.prompts[-1].endswith("<think>\n\n</think>\n\n")
    ask(client, thinking={"type": "adaptive"})
    assert scripted.prompts[-1].endswith("assistant\n")


def test_the_beginning_of_the_answer(client: anthropic.Anthropic, scripted: Scripted) -> None:
    scripted.script = lambda prompt: " sunny."
    message = ask(client, messages=[*USER, {"role": "assistant", "content": "It is"}])
    assert scripted.prompts[-1].endswith("It is") and message.content[0].text == " sunny."


def test_tokens_are_counted(client: anthropic.Anthropic, server: Server) -> None:
    options = {"tools": [WEATHER], "system": "Count this.", "messages": USER}
    counted = client.messages.count_tokens(model="any", **options).input_tokens
    usage = ask(client, **options, extra_body={"seed": 1}).usage
    assert counted == usage.input_tokens + usage.cache_read_input_tokens
    body = {"messages": [{"role": "user", "content": "Never seen before: " + "z" * 50}]}
    counted = server.post("/messages/count_tokens?beta=true", body).json()["input_tokens"]
    server.engine.switch.loaded.turns.forget()  # an empty cache
    usage = server.post("/messages", {**body, "max_tokens": 1}).json()["usage"]
    assert usage["input_tokens"] == counted and usage["cache_read_input_tokens"] == 0


def test_the_asynchronous_client(server: Server, client: anthropic.Anthropic, scripted: Scripted) -> None:
    scripted.script = lambda prompt: "<think>\nHm.\n</think>\n\nYes."

    async def both() -> tuple[str, str]:
        async with anthropic.AsyncAnthropic(base_url=server.url, api_key="none", max_retries=0) as own:
            whole = await own.messages.create(**given())
            async with own.messages.stream(**given()) as stream:
                text = "".join([piece async for piece in stream.text_stream])
        return whole.content[1].text, text

    whole, text = asyncio.run(both())
    assert whole == text == "Yes."


# -- the translation of requests -----------------------------------------------------------------------------


def test_turns_become_messages() -> None:
    billing = {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1;"}
    part = {"type": "text", "text": "One.", "cache_control": {"type": "ephemeral"}}
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {"a": 1}}
    results = [
        {"type": "text", "text": "Well?"},
        {"type": "tool_result", "tool_use_id": "t1", "content": "yes"},
        {"type": "tool_result", "tool_use_id": "t2", "is_error": True, "content": [{"type": "text", "text": "no"}]},
        {"type": "tool_result", "tool_use_id": "t3"},
    ]
    thoughts = [
        {"type": "thinking", "thinking": "Hm.", "signature": ""},
        {"type": "redacted_thinking", "data": "xyz"},
        {"type": "text", "text": "Let me see."},
    ]
    request = asked(
        system=[billing, part, {"type": "text", "text": "Two."}],
        messages=[
            {"role": "system", "content": "Three."},
            {"role": "user", "content": [part, {"type": "text", "text": "Go."}]},
            {"role": "system", "content": [{"type": "text", "text": "Be kind."}]},
            {"role": "assistant", "content": [*thoughts, call]},
            {"role": "user", "content": results},
        ],
    )
    assert request.plain_messages() == [
        {"role": "system", "content": "One.\nTwo.\n\nThree."},
        {"role": "user", "content": "One.\nGo.\n\nBe kind."},
        {
            "role": "assistant",
            "content": "Let me see.",
            "reasoning_content": "Hm.",
            "tool_calls": [{"id": "t1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "tool_call_id": "t1", "name": "f", "content": "yes"},
        {"role": "tool", "tool_call_id": "t2", "content": "Error: no"},
        {"role": "tool", "tool_call_id": "t3", "content": ""},
        {"role": "user", "content": "Well?"},
    ]
    assert not request.dialogue().continues


def test_tools_and_their_choice() -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 3}
    strict = {"type": "custom", "name": "g", "input_schema": {"type": "object"}, "strict": True}
    plain = asked(tools=[search, WEATHER, strict]).dialogue()
    assert plain.tools == [
        {
            "type": "function",
            "function": {
                "name": "get_weather",
                "parameters": WEATHER["input_schema"],
                "description": "Tells the weather.",
            },
        },
        {"type": "function", "function": {"name": "g", "parameters": {"type": "object"}, "strict": True}},
    ]
    assert (plain.tool_choice, plain.tool_name, plain.one_call) == ("auto", None, False)
    for choice, expected in (
        ({"type": "any"}, ("required", None, False)),
        ({"type": "any", "disable_parallel_tool_use": True}, ("required", None, True)),
        ({"type": "tool", "name": "get_weather"}, ("required", "get_weather", True)),
        ({"type": "none"}, ("none", None, False)),
    ):
        found = asked(tools=[WEATHER], tool_choice=choice).dialogue()
        assert (found.tool_choice, found.tool_name, found.one_call) == expected
    assert asked(tools=[search]).dialogue().tools is None


def test_settings() -> None:
    model = GenerationConfig({"temperature": 0.6, "top_k": 20})
    sampling = asked(top_p=0.5, top_k=-1).sampling(100, model)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.6, 0.5, 0)
    assert asked().sampling(100, GenerationConfig()).temperature == 1
    schema = {"type": "object", "properties": {}}
    for field in ({"output_config": {"format": {"type": "json_schema", "schema": schema}, "effort": "low"}},
                  {"output_format": {"type": "json_schema", "schema": schema}}):  # fmt: skip
        structure = asked(**field).dialogue().structure
        assert structure is not None and (structure.kind, structure.value) == ("json_schema", schema)
    assert asked(output_config={"effort": "high"}).dialogue().structure is None
    assert asked(thinking={"type": "disabled"}).dialogue().template_variables == {"enable_thinking": False}
    assert asked(context_management={"edits": []}, metadata={"user_id": "x"}).question(sampling).max_tokens == 9


# -- errors and the rest -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": [{"role": "user", "content": [IMAGE]}]}, "this model reads text only"),
        (
            {"messages": [{"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]}]}]},
            "this model reads text only",
        ),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "needs text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"extra_body": {"temperature": 1.5}}, "temperature"),
        ({"tool_choice": {"type": "any"}}, "there are no tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "tool", "name": "other"}}, "tool_choice names 'other'"),
        ({"tools": [{"name": "f"}]}, "a tool needs a name and an input_schema"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format must be"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_named(client: anthropic.Anthropic, options: dict[str, Any], message: str) -> None:
    with pytest.raises(anthropic.BadRequestError, match=message) as caught:
        ask(client, **options)
    body: Any = caught.value.body
    assert body["type"] == "error" and body["error"]["type"] == "invalid_request_error"


def test_a_prompt_that_is_too_long(client: anthropic.Anthropic) -> None:
    with pytest.raises(anthropic.BadRequestError, match=r"prompt is too long: \d+ tokens > 8191 maximum") as caught:
        ask(client, messages=[{"role": "user", "content": "x" * 9000}])
    assert "--context" in str(caught.value)


def test_errors_have_anthropic_s_form() -> None:
    scope: Any = {"type": "http", "path": "/v1/messages", "headers": []}
    for error, status, kind in (
        (ApiError(503, "loading"), 529, "overloaded_error"),
        (ApiError(429, "full"), 429, "rate_limit_error"),
        (ApiError(500, "broken"), 500, "api_error"),
        (PromptTooLong("long.", "messages", 9, 8), 400, "invalid_request_error"),
    ):
        response = error_response(scope, error)
        assert (response.status_code, json.loads(bytes(response.body))["error"]["type"]) == (status, kind)
    form = MessagesForm(asked(), "demo")
    assert form.failed(ApiError(500, "broken")).startswith('event: error\ndata: {"type":"error"')
    assert form.waiting(None) == form.waiting(Progress(1, 2)) == 'event: ping\ndata: {"type":"ping"}\n\n'
    assert isinstance(parse(TokenCountRequest, json.dumps({"messages": USER}).encode()), TokenCountRequest)


def test_while_the_model_is_loaded() -> None:
    seen = threading.Event()

    def load() -> Any:
        assert seen.wait(60)
        raise SystemExit

    with serving(load, wait=False) as loading:
        try:
            response = loading.post("/v1/messages", {"messages": USER, "max_tokens": 1})
        finally:
            seen.set()
    assert response.status_code == 529 and response.headers["retry-after"]
    assert response.json()["error"] == {
        "type": "overloaded_error",
        "message": "the model is being loaded; try again soon.",
    }


def test_models(client: anthropic.Anthropic, server: Server) -> None:
    (model,) = client.models.list()
    assert (model.id, model.display_name, model.type) == ("demo", "demo", "model") and model.created_at.year > 2000
    assert client.models.retrieve("claude-any").id == "demo"
    assert server.get("/v1/models").json()["object"] == "list"


def test_the_root(server: Server) -> None:
    with server.client() as plain:
        assert plain.head("/").status_code == 200
        assert "<html" in plain.get("/").text and "<html" in plain.get("/", headers={"Accept": "text/html"}).text
        assert plain.get("/", headers={"Accept": "application/json"}).text == "Ollama is running"


def test_a_wrong_method_is_answered_in_the_same_form(server: Server) -> None:
    with httpx.Client(base_url=server.url, verify=False) as plain:
        response = plain.get("/v1/messages")
    assert response.status_code == 405 and response.json()["type"] == "error"
