"""The Responses API through OpenAI's own client, and by hand where another client's requests differ."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scripted import Scripted, scripted, server  # type: ignore[import-not-found]  # noqa: F401
from serving import Server  # type: ignore[import-not-found]

from mlx_flash.server.api_errors import ApiError
from mlx_flash.server.apis.openai_common import parse
from mlx_flash.server.apis.question import Dialogue, Structure
from mlx_flash.server.apis.recent_items import RecentItems
from mlx_flash.server.apis.responses import ResponsesRequest
from mlx_flash.server.apis.responses_answer import ResponsesForm
from mlx_flash.server.jobs import End, Piece
from mlx_flash.text.sampling import Sampling

# ruff: noqa: F811

QUESTION = "How is it in Paris?"
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "Tells the weather.",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = f"<think>\nI should look.\n</think>\n\nOne moment.\n{CALL}"
USER = {"role": "user", "content": QUESTION}


@pytest.fixture
def client(server: Server, scripted: Scripted) -> Iterator[openai.OpenAI]:
    scripted.prompts.clear()
    scripted.script = lambda prompt: "It is sunny." if "22 degrees" in prompt else ANSWER
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.responses.create(**{"model": "demo", "input": QUESTION, "tools": [WEATHER], **options})


def dialogue_of(**body: Any) -> Dialogue:
    """What a request asks, without a model."""
    request = parse(ResponsesRequest, json.dumps({"input": QUESTION, **body}).encode())
    request.check()
    request.find_references(RecentItems())
    dialogue = request.question(Sampling()).of
    assert isinstance(dialogue, Dialogue)
    return dialogue


def messages_for(*items: Any, **body: Any) -> list[dict[str, Any]]:
    return dialogue_of(input=list(items), **body).messages


# -- answers -------------------------------------------------------------------------------------------------


def test_a_response_has_thoughts_text_and_calls(client: openai.OpenAI, scripted: Scripted) -> None:
    response = ask(client, instructions="Be brief.", metadata={"a": "b"})
    assert response.status == "completed" and response.object == "response" and response.id.startswith("resp_")
    thought, message, call = response.output
    assert thought.id.startswith("rs_") and thought.summary == [] and thought.content[0].text == "I should look."
    assert message.id.startswith("msg_") and message.status == "completed" and response.output_text == "One moment."
    assert message.content[0].annotations == [] and message.content[0].logprobs == []
    assert call.id.startswith("fc_") and call.call_id.startswith("call_") and call.name == "get_weather"
    assert json.loads(call.arguments) == {"city": "Paris"} and call.status == "completed"
    assert response.usage.output_tokens_details.reasoning_tokens == len("\nI should look.\n") + 2
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens
    assert response.instructions == "Be brief." and response.metadata == {"a": "b"} and response.tool_choice == "auto"
    assert response.error is None and response.incomplete_details is None and response.parallel_tool_calls
    assert "Be brief." in scripted.prompts[0] and '"name": "get_weather"' in scripted.prompts[0]
    again = ask(client, instructions="Be brief.", metadata={"a": "b"}, store=False)
    assert again.usage.input_tokens_details.cached_tokens > 0


def plain(value: Any) -> Any:
    """JSON without what differs between two answers to one question."""
    if isinstance(value, dict):
        own = ("id", "item_id", "call_id", "created_at", "completed_at", "input_tokens_details")
        return {key: plain(each) for key, each in value.items() if key not in own}
    return [plain(each) for each in value] if isinstance(value, list) else value


def test_a_stream_has_every_event_in_order(client: openai.OpenAI, server: Server) -> None:
    text = server.post("/responses", {"input": QUESTION, "tools": [WEATHER], "stream": True}).text
    blocks = [block.split("\n") for block in text.strip().split("\n\n") if not block.startswith(":")]
    events = [json.loads(data.removeprefix("data: ")) for _, data in blocks]
    assert [name for name, _ in blocks] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))

    def item(*inner: str) -> list[str]:
        return ["output_item.added", *inner, "output_item.done"]

    def part(kind: str) -> list[str]:
        return item("content_part.added", f"{kind}.delta", f"{kind}.done", "content_part.done")

    arguments = item("function_call_arguments.delta", "function_call_arguments.done")
    names = [event["type"].removeprefix("response.") for event in events]
    once = [name for at, name in enumerate(names) if not (name.endswith(".delta") and names[at - 1] == name)]
    expected = ["created", "in_progress", *part("reasoning_text"), *part("output_text"), *arguments, "completed"]
    assert once == expected
    final = events[-1]["response"]
    assert plain(final) == plain(server.post("/responses", {"input": QUESTION, "tools": [WEATHER]}).json())
    assert [event["item"] for event in events if event["type"].endswith("item.done")] == final["output"]
    for index, each in enumerate(final["output"]):
        of_item = [event for event in events if event.get("output_index") == index]
        assert {event.get("item_id", each["id"]) for event in of_item} == {each["id"]}
        deltas = "".join(event["delta"] for event in of_item if "delta" in event)
        assert deltas == (each["arguments"] if "arguments" in each else each["content"][0]["text"])


def test_the_clients_own_stream(client: openai.OpenAI) -> None:
    with client.responses.stream(model="demo", input=QUESTION, tools=[WEATHER]) as stream:
        kinds = {event.type for event in stream}
        response = stream.get_final_response()
    assert "response.reasoning_text.done" in kinds and "response.function_call_arguments.done" in kinds
    assert response.output_text == "One moment." and response.output[2].type == "function_call"
    raw = list(ask(client, stream=True))
    assert raw[0].type == "response.created" and raw[-1].type == "response.completed"


def test_an_answer_that_is_cut(client: openai.OpenAI) -> None:
    response = ask(client, max_output_tokens=6)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    (thought,) = response.output
    assert thought.type == "reasoning" and thought.status == "incomplete" and response.usage.output_tokens == 6
    last = list(ask(client, max_output_tokens=30, stream=True))[-1]
    assert last.type == "response.incomplete" and last.response.output[1].status == "incomplete"


def test_probabilities(client: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    response = ask(client, include=include, top_logprobs=2)
    told = response.output[1].content[0].logprobs
    assert "".join(entry.token for entry in told) == "One moment." and len(told[0].top_logprobs) == 2
    events = list(ask(client, include=include, stream=True))
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert "".join(entry.token for event in deltas for entry in event.logprobs) == "One moment."
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert "".join(entry.token for entry in done.logprobs) == "One moment."


def form_of(**body: Any) -> ResponsesForm:
    return ResponsesForm(ResponsesRequest(input=QUESTION, **body), "demo", RecentItems())


def test_a_failure_ends_the_stream() -> None:
    form = form_of()
    form.begin()
    form.item(0, Piece("Half"))
    failed = form.failed(ApiError(503, "the server is stopping."))
    name, data = failed.strip().split("\n")
    event = json.loads(data.removeprefix("data: "))
    assert name == "event: response.failed" and event["sequence_number"] == 5
    assert event["response"]["status"] == "failed" and event["response"]["output"][0]["status"] == "incomplete"
    assert event["response"]["error"] == {"code": "server_error", "message": "the server is stopping."}
    assert form_of().failed(ApiError(429, "full")).startswith("event: error\n")


def test_an_empty_answer_is_an_empty_message() -> None:
    form = form_of()
    form.begin()
    assert form.end(0, End("stop", 1, 0, 1)).count("event:") == 5
    assert '"text":""' in form.finish()


def test_responses_are_not_kept(client: openai.OpenAI) -> None:
    for ask_for in (client.responses.retrieve, client.responses.delete):
        with pytest.raises(openai.NotFoundError, match="keeps no responses"):
            ask_for("resp_1")


# -- several turns -------------------------------------------------------------------------------------------


def output_for(call: Any) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call.call_id, "output": "22 degrees"}


@pytest.mark.parametrize("stream", [False, True])
def test_the_loop_with_a_tool(client: openai.OpenAI, scripted: Scripted, stream: bool) -> None:
    output = list(ask(client, stream=True))[-1].response.output if stream else ask(client).output
    whole = ask(client, input=[USER, *output, output_for(output[2])])
    assert whole.output_text == "It is sunny." and whole.output[0].type == "message"
    named = [{"type": "item_reference", "id": item.id} for item in output]
    assert ask(client, input=[USER, *named, output_for(output[2])]).output_text == "It is sunny."
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in scripted.prompts[1]
    assert scripted.prompts[1] == scripted.prompts[2]


def test_an_item_that_is_not_kept(client: openai.OpenAI) -> None:
    kept, unkept = ask(client).output[1].id, ask(client, store=False).output[1].id
    ask(client, input=[USER, {"id": kept}, USER], max_output_tokens=1)
    for ids in ([unkept], ["msg_unknown"], [kept, kept]):
        with pytest.raises(openai.BadRequestError, match="store: false") as caught:
            ask(client, input=[USER, *({"type": "item_reference", "id": id} for id in ids)])
        assert caught.value.param == "input" and caught.value.code == "item_not_found"


@given(st.lists(st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 60), st.booleans())), st.integers(1, 4))
def test_the_table_of_recent_items_is_bounded(steps: list[tuple[str, int, bool]], most_items: int) -> None:
    """It holds the most recently used items that fit, as a list in order of use does."""
    most_bytes = 100
    table = RecentItems(most_items, most_bytes)
    model: list[dict[str, Any]] = []
    for id, size, keep in steps:
        item = {"id": id, "text": "é" * size}
        known = next((each for each in model if each["id"] == id), None)
        if not keep:
            assert table.find(id) == known
        if known is not None:
            model.remove(known)
        model += [item] if keep else [known] if known else []
        if keep:
            table.keep([item])

        def size_of(items: list[dict[str, Any]]) -> int:
            return sum(len(json.dumps(each, separators=(",", ":"))) for each in items)

        if size_of(model[-1:]) > most_bytes:
            model.pop()
        while len(model) > most_items or size_of(model) > most_bytes:
            model.pop(0)
        assert table.held_bytes == size_of(model) and len(table) == len(model)
    assert all(table.find(each["id"]) == each for each in model)


# -- input ---------------------------------------------------------------------------------------------------


def call_item(id: str, arguments: str = "{}") -> dict[str, Any]:
    return {"type": "function_call", "id": f"fc_{id}", "call_id": id, "name": "f", "arguments": arguments}


def test_text_and_instructions() -> None:
    assert dialogue_of().messages == [USER]
    assert dialogue_of(instructions="Be brief.").messages == [{"role": "system", "content": "Be brief."}, USER]


def test_instructions_at_the_beginning_are_one_message() -> None:
    two = ({"type": "message", "role": "developer", "content": [{"type": "input_text", "text": t}]} for t in "ab")
    assert messages_for(*two, USER, instructions="Be brief.") == [
        {"role": "system", "content": "Be brief.\n\na\n\nb"},
        USER,
    ]
    developer = {"role": "developer", "content": "a"}
    assert messages_for(developer, USER) == [developer, USER]
    assert messages_for(USER, developer) == [USER, developer]


def test_items_of_one_turn_are_one_message() -> None:
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Hm."}]}
    thought = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "T"}]}
    outputs = [
        {"type": "function_call_output", "call_id": "1", "output": "one"},
        {"type": "function_call_output", "call_id": "2", "output": [{"type": "input_text", "text": "two"}]},
    ]
    first, user, second, *tools, last = messages_for(
        thought, said, USER, said, thought, call_item("1"), call_item("2"), *outputs, said
    )
    assert first == {"role": "assistant", "content": "Hm.", "reasoning_content": "T"} and user == USER
    assert second["content"] == "Hm." and second["reasoning_content"] == "T"
    assert [call["id"] for call in second["tool_calls"]] == ["1", "2"]
    assert second["tool_calls"][0]["function"] == {"name": "f", "arguments": "{}"}
    assert tools == [
        {"role": "tool", "tool_call_id": "1", "content": "one"},
        {"role": "tool", "tool_call_id": "2", "content": "two"},
    ]
    assert last == {"role": "assistant", "content": "Hm."}
    assert [m["content"] for m in messages_for(said, said)] == ["Hm.", "Hm."]


def test_thoughts_without_an_answer() -> None:
    summed = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "S"}], "encrypted_content": None}
    assert messages_for(summed, USER) == [{"role": "assistant", "content": "", "reasoning_content": "S"}, USER]
    assert messages_for({"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}, USER) == [USER]


def test_tools_and_choices() -> None:
    tools = [WEATHER, {"type": "web_search"}, {"type": "namespace", "name": "n", "tools": []}, WEATHER | {"name": "g"}]
    asked = dialogue_of(tools=tools)
    assert asked.tools is not None and [tool["function"]["name"] for tool in asked.tools] == ["get_weather", "g"]
    assert asked.tools[0]["function"] == {key: value for key, value in WEATHER.items() if key != "type"}
    assert dialogue_of(tools=tools, tool_choice="none").usable_tools is None
    named = dialogue_of(tools=tools, tool_choice={"type": "function", "name": "g"})
    assert named.tool_choice == "required" and named.tool_name == "g" and named.one_call
    some = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "g"}]}
    allowed = dialogue_of(tools=tools, tool_choice=some)
    assert allowed.tools is not None and len(allowed.tools) == 1 and allowed.tool_choice == "required"
    assert dialogue_of(tools=tools, parallel_tool_calls=False).one_call


def test_options_reach_the_model(client: openai.OpenAI, scripted: Scripted) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    assert dialogue_of(text={"format": form, "verbosity": "low"}).structure == Structure("json_schema", schema, "text")
    assert dialogue_of(text={"format": {"type": "json_object"}}).structure == Structure("json_object", None, "text")
    assert dialogue_of(text={"format": {"type": "text"}}).structure is None
    ask(client, reasoning={"effort": "none"}, max_output_tokens=1)
    assert scripted.prompts[-1].endswith("<think>\n\n</think>\n\n")
    ignored: dict[str, Any] = {"prompt_cache_key": "k", "truncation": "auto", "service_tier": "auto", "user": "u"}
    ask(client, **ignored, include=["reasoning.encrypted_content"], background=False, top_p=0.9, max_output_tokens=1)


class Weather(pydantic.BaseModel):
    degrees: int


def test_the_clients_own_parser(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: '{"degrees": 22}'
    parsed = client.responses.parse(model="demo", input=QUESTION, text_format=Weather)
    assert parsed.output_parsed == Weather(degrees=22)
    with client.responses.stream(model="demo", input=QUESTION, text_format=Weather) as stream:
        assert stream.get_final_response().output_parsed == Weather(degrees=22)


def test_a_forced_call(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: CALL
    for choice in ("required", {"type": "function", "name": "get_weather"}):
        (call,) = ask(client, tool_choice=choice).output
        assert call.name == "get_weather" and json.loads(call.arguments) == {"city": "Paris"}


IMAGE = {"role": "user", "content": [{"type": "input_image", "image_url": "data:image/png;base64,"}]}


@pytest.mark.parametrize(
    ("options", "param", "message"),
    [
        ({"input": [{"type": "web_search_call", "id": "ws_1"}]}, "input", "'web_search_call' are not supported"),
        ({"input": [{"type": ["message"]}]}, "input", "are not supported"),
        ({"input": [{"type": "function_call_output", "call_id": 1, "output": "a"}]}, "input", "input.0.call_id"),
        ({"input": [IMAGE]}, "input", "reads text only"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input", "input.0.role"),
        ({"input": [{"type": "function_call", "call_id": "1"}]}, "input", "input.0.name"),
        ({"input": ["a"]}, "input", "object"),
        ({"input": []}, "input", "empty"),
        ({"input": 3}, "input", "input"),
        ({"previous_response_id": "resp_1"}, "previous_response_id", "Send the earlier items"),
        ({"conversation": "conv_1"}, "conversation", "Send the earlier items"),
        ({"background": True}, "background", "not supported"),
        ({"extra_body": {"max_tokens": 3}}, "max_tokens", "max_output_tokens"),
        ({"extra_body": {"n": 2}}, "n", "one answer"),
        ({"tools": [{"type": "function"}]}, "tools", "name"),
        ({"tools": [{"name": "f"}]}, "tools", "type"),
        ({"tool_choice": {"type": "function", "name": "other"}}, "tool_choice", "get_weather"),
        ({"tool_choice": {"type": "web_search"}}, "tool_choice", "web_search"),
        ({"tools": [], "tool_choice": "required"}, "tool_choice", "no tools"),
        ({"text": {"format": {"type": "json_schema", "name": "n"}}}, "text", "lacks a schema"),
        ({"text": {"format": {"type": "xml"}}}, "text", "xml"),
        ({"text": {"format": {"type": "json_schema", "name": "n", "schema": {"type": "odd"}}}}, "text", "odd"),
        ({"temperature": "hot"}, "temperature", "number"),
        ({"max_output_tokens": 1.5}, "max_output_tokens", "max_output_tokens"),
    ],
)
def test_what_cannot_be_done_is_named(client: openai.OpenAI, options: dict[str, Any], param: str, message: str) -> None:
    with pytest.raises(openai.BadRequestError, match=message) as caught:
        ask(client, **options)
    assert caught.value.param == param


def test_a_long_prompt_keeps_the_client_waiting(client: openai.OpenAI) -> None:
    events = list(ask(client, input="so it goes " * 150, stream=True))
    kinds = [event.type for event in events]
    assert kinds.count("response.in_progress") > 3 and kinds[-1] == "response.completed"
    assert [event.sequence_number for event in events] == list(range(len(events)))
