"""langchain-openai."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import pytest
from langchain_core.messages import HumanMessage, ToolMessage
from langchain_openai import ChatOpenAI
from other_clients import QUESTION, RESULT, WEATHER, scripted_server  # type: ignore[import-not-found]
from pydantic import BaseModel, SecretStr


class Weather(BaseModel):
    """How the weather is."""

    city: Literal["Paris", "Rome"]
    degrees: int


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ChatOpenAI]:
    with scripted_server(tmp_path_factory.mktemp("scripted")) as (_, server):
        url, key = f"{server.url}/v1", SecretStr("none")
        model = ChatOpenAI(model="demo", base_url=url, api_key=key, max_retries=0, stream_usage=True)
        yield model
        model.root_client.close()


def test_a_chat(model: ChatOpenAI) -> None:
    message = model.invoke(QUESTION)
    assert message.text == "Hello, you." and message.response_metadata["finish_reason"] == "stop"
    assert message.usage_metadata is not None and message.usage_metadata["output_token_details"]["reasoning"] > 0


def test_a_stream(model: ChatOpenAI) -> None:
    chunks = list(model.stream(QUESTION))
    assert "".join(chunk.text for chunk in chunks) == "Hello, you."
    (usage,) = [chunk.usage_metadata for chunk in chunks if chunk.usage_metadata]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]


def test_the_loop_with_a_tool(model: ChatOpenAI) -> None:
    with_tools = model.bind_tools([WEATHER])
    message = with_tools.invoke(QUESTION)
    (call,) = message.tool_calls
    assert message.text == "One moment." and call["name"] == "get_weather" and call["args"] == {"city": "Paris"}
    whole: Any = None
    for chunk in with_tools.stream(QUESTION):
        whole = chunk if whole is None else whole + chunk
    assert whole.tool_calls[0]["args"] == {"city": "Paris"}
    result = ToolMessage(RESULT, tool_call_id=call["id"])
    assert with_tools.invoke([HumanMessage(QUESTION), message, result]).text == "It is sunny."


@pytest.mark.parametrize("strict", [True, False])
def test_a_forced_call(model: ChatOpenAI, strict: bool) -> None:
    (call,) = model.bind_tools([WEATHER], tool_choice="get_weather", strict=strict).invoke("As you like.").tool_calls
    assert call["name"] == "get_weather" and call["args"] == {"city": "Paris"}


@pytest.mark.parametrize("method", ["json_schema", "function_calling", "json_mode"])
def test_structured_output(model: ChatOpenAI, method: Any) -> None:
    structured = model.with_structured_output(Weather, method=method)
    assert structured.invoke("Say it as JSON.") == Weather(city="Rome", degrees=21)
