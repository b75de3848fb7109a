"""OpenAI's client for JavaScript. `npm ci` in tests/clients installs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from other_clients import CLIENTS, NODE, run_cases, scripted_server  # type: ignore[import-not-found]

pytestmark = [
    pytest.mark.skipif(NODE is None, reason="there is no Node.js"),
    pytest.mark.skipif(not (CLIENTS / "node_modules" / "openai").is_dir(), reason="run `npm ci` in tests/clients"),
]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Any]:
    """What came out of each case of openai.mjs."""
    with scripted_server(tmp_path_factory.mktemp("scripted")) as (_, server):
        cases: Mapping[str, Any] = run_cases(NODE, CLIENTS / "openai.mjs", server.url)
        return cases


def test_a_chat(found: Mapping[str, Any]) -> None:
    assert found["models"] == ["demo"]
    message = found["chat"]["message"]
    assert message["content"] == "Hello, you." and message["reasoning_content"] == "I should look."
    assert found["chat"]["finish_reason"] == "stop"


def test_a_stream(found: Mapping[str, Any]) -> None:
    stream = found["stream"]
    assert stream["text"] == "Hello, you." and stream["thoughts"] == "I should look."
    usage = stream["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] > 0


def test_tools(found: Mapping[str, Any]) -> None:
    choice = found["streamed_call"]["choice"]
    (call,) = choice["message"]["tool_calls"]
    assert choice["finish_reason"] == "tool_calls" and choice["message"]["content"] == "One moment."
    assert json.loads(call["function"]["arguments"]) == {"city": "Paris"}
    assert found["streamed_call"]["events"] == ["get_weather"]
    assert found["tool_loop"] == {"text": "It is sunny.", "cities": ["Paris"], "calls": "get_weather"}
    (forced,) = found["forced_call"]["message"]["tool_calls"]
    assert forced["function"]["name"] == "get_weather"
    assert json.loads(forced["function"]["arguments"]) == {"city": "Paris"}


def test_answers_that_fit_a_schema(found: Mapping[str, Any]) -> None:
    assert found["parsed"] == found["response_parsed"] == {"city": "Rome", "degrees": 21}


def test_responses(found: Mapping[str, Any]) -> None:
    response = found["response"]
    assert response["status"] == "completed" and response["text"] == "One moment."
    assert [item["type"] for item in response["output"]] == ["reasoning", "message", "function_call"]
    assert found["response_loop"] == "It is sunny."
    stream = found["response_stream"]
    assert stream["text"] == "One moment." and stream["types"] == ["reasoning", "message", "function_call"]
    assert {"response.output_text.delta", "response.function_call_arguments.done"} <= set(stream["kinds"])


def test_a_wrong_request(found: Mapping[str, Any]) -> None:
    assert found["refused"] == {"status": 400, "param": "n", "right": True}
