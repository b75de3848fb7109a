"""Ollama's API through Ollama's own client."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import ollama
import pytest
from scripted import Scripted, scripted, server  # type: ignore[import-not-found]  # noqa: F401
from serving import Server  # type: ignore[import-not-found]

from mlx_flash.server.api_errors import ApiError
from mlx_flash.server.apis.ollama import OllamaChatForm, OllamaChatRequest, OllamaGenerateRequest
from mlx_flash.server.apis.openai_common import parse
from mlx_flash.server.apis.question import Dialogue
from mlx_flash.server.jobs import Progress
from mlx_flash.text.generation_config import GenerationConfig

# ruff: noqa: F811

USER: Any = [{"role": "user", "content": "How is it in Paris?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'
ANSWER = f"<think>\nHm.\n</think>\n\nWait.\n{CALL}"
GREEDY = {"temperature": 0}


def get_weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: The city.
    """
    return "22 degrees"


@pytest.fixture
def client(server: Server, scripted: Scripted) -> Iterator[ollama.Client]:
    scripted.prompts.clear()
    scripted.script = lambda prompt: ANSWER
    with ollama.Client(host=server.url) as client:
        yield client


def chat(client: ollama.Client, **options: Any) -> Any:
    given: dict[str, Any] = {"model": "any", "messages": USER, "options": GREEDY, **options}
    return client.chat(**given)


def asked(kind: Any = OllamaChatRequest, **fields: Any) -> Any:
    first = {"messages": USER} if kind is OllamaChatRequest else {"prompt": "Hi"}
    request = parse(kind, json.dumps({"model": "any", **first, **fields}).encode())
    request.check()
    return request


# -- the model -----------------------------------------------------------------------------------------------


def test_the_model_is_described(client: ollama.Client, server: Server) -> None:
    (listed,) = client.list().models
    assert listed.model == "demo:latest" and listed.size and listed.size > 0 and listed.modified_at is not None
    assert listed.details is not None and listed.details.family == "qwen3_moe"
    (running,) = client.ps().models
    assert running.name == "demo:latest" and running.context_length == 8192 and running.expires_at is not None
    shown = client.show("demo:latest")
    assert shown.capabilities == ["completion", "tools", "thinking"]
    assert shown.modelinfo is not None and shown.modelinfo["general.architecture"] == "qwen3_moe"
    assert shown.modelinfo["qwen3_moe.context_length"] == 8192 and "<|im_start|>" in (shown.template or "")
    assert server.get("/api/version").json()["version"]
    assert server.get("/", headers={"Accept": "application/json"}).text == "Ollama is running"
    body = {"model": "demo:latest", "messages": USER, "max_tokens": 1}  # as clients that use both APIs send it
    assert server.post("/v1/chat/completions", body).status_code == 200


# -- chat ----------------------------------------------------------------------------------------------------


def test_a_whole_answer(client: ollama.Client, scripted: Scripted) -> None:
    answer = chat(client, tools=[get_weather])
    assert '"name": "get_weather"' in scripted.prompts[0]
    assert answer.message.role == "assistant" and answer.message.content == "Wait."
    assert answer.message.thinking == "Hm."
    (call,) = answer.message.tool_calls
    assert call.function.name == "get_weather" and call.function.arguments == {"city": "Paris"}
    assert answer.done and answer.done_reason == "stop" and answer.model == "any"
    assert answer.prompt_eval_count > 100 and answer.eval_count == len(ANSWER) + 1 - len("<think></think>") + 2
    parts = [answer.load_duration, answer.prompt_eval_duration, answer.eval_duration]
    assert min(parts) >= 0 and abs(sum(parts) - answer.total_duration) <= 3
    assert answer.prompt_eval_duration > 0 and answer.eval_duration > 0


def test_a_stream(client: ollama.Client) -> None:
    parts = list(chat(client, tools=[get_weather], stream=True))
    assert "".join(part.message.content or "" for part in parts) == "Wait."
    assert "".join(part.message.thinking or "" for part in parts) == "Hm."
    (calls,) = [part.message.tool_calls for part in parts if part.message.tool_calls]
    assert calls[0].function.arguments == {"city": "Paris"}
    assert [part.done for part in parts] == [False] * (len(parts) - 1) + [True]
    assert parts[-1].done_reason == "stop" and parts[-1].eval_count > 0


def test_a_stream_on_the_wire(server: Server, client: ollama.Client, scripted: Scripted) -> None:
    scripted.script = lambda prompt: "Yes."
    response = server.post("/api/chat", {"model": "any", "messages": USER, "options": GREEDY, "stream": None})
    assert response.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in response.text.splitlines()]
    assert {tuple(line)[:3] for line in lines} == {("model", "created_at", "done")}
    assert all(line["message"]["role"] == "assistant" for line in lines) and lines[-1]["done"]


def test_the_loop_with_a_tool(client: ollama.Client, scripted: Scripted) -> None:
    scripted.script = lambda prompt: "Sunny." if "22 degrees" in prompt else CALL
    messages: list[Any] = list(USER)
    message = chat(client, messages=messages, tools=[get_weather]).message
    (call,) = message.tool_calls
    result = get_weather(**call.function.arguments)
    messages += [message, {"role": "tool", "tool_name": call.function.name, "content": result}]
    answer = chat(client, messages=messages, tools=[get_weather])
    assert answer.message.content == "Sunny."
    assert '{"name": "get_weather", "arguments": {"city": "Paris"}}' in scripted.prompts[1]
    assert "<tool_response>\n22 degrees\n</tool_response>" in scripted.prompts[1]


def test_thinking_and_options(client: ollama.Client, scripted: Scripted) -> None:
    scripted.script = lambda prompt: "one stop two"
    assert chat(client, options={**GREEDY, "stop": ["stop"], "num_ctx": 4096}).message.content == "one "
    cut = chat(client, think=False, options={**GREEDY, "num_predict": 3})
    assert scripted.prompts[-1].endswith("<think>\n\n</think>\n\n")
    assert cut.done_reason == "length" and cut.eval_count == 3 and cut.message.content == "one"


def test_probabilities(client: ollama.Client, scripted: Scripted) -> None:
    scripted.script = lambda prompt: "Yes."
    whole = chat(client, logprobs=True, top_logprobs=2)
    assert "".join(entry.token for entry in whole.logprobs) == "Yes."
    assert len(whole.logprobs[0].top_logprobs) == 2
    parts = chat(client, logprobs=True, stream=True)
    assert "".join(entry.token for part in parts for entry in part.logprobs or ()) == "Yes."


def test_the_model_is_loaded_by_an_empty_request(client: ollama.Client) -> None:
    assert client.chat("any", messages=[]).done_reason == "load"
    assert client.generate("any", keep_alive="5m").done_reason == "load"
    (only,) = client.chat("any", messages=[], stream=True)
    assert only.done and only.done_reason == "load"


def test_the_asynchronous_client(server: Server, client: ollama.Client, scripted: Scripted) -> None:
    scripted.script = lambda prompt: "Yes."

    async def streamed() -> str:
        own = ollama.AsyncClient(host=server.url)
        parts = await own.chat("any", messages=USER, stream=True, options=GREEDY)
        text = "".join([part.message.content or "" async for part in parts])
        await own.close()
        return text

    assert asyncio.run(streamed()) == "Yes."


# -- generate ------------------------------------------------------------------------------------------------


def test_generate(client: ollama.Client, scripted: Scripted) -> None:
    scripted.script = lambda prompt: "<think>\nHm.\n</think>\n\nYes."
    answer = client.generate("any", "Well?", system="Be brief.", options=GREEDY)
    assert answer.response == "Yes." and answer.thinking == "Hm." and answer.done
    assert "system\nBe brief.<|im_end|>\n<|im_start|>user\nWell?" in scripted.prompts[0]
    parts = list(client.generate("any", "Well?", options=GREEDY, stream=True))
    assert "".join(part.response or "" for part in parts) == "Yes."
    assert "".join(part.thinking or "" for part in parts) == "Hm." and parts[-1].done_reason == "stop"


def test_a_raw_prompt(client: ollama.Client, scripted: Scripted) -> None:
    scripted.script = lambda prompt: "<think> is text here"
    answer = client.generate("any", "Once", raw=True, options=GREEDY)
    assert scripted.prompts[-1] == "Once" and answer.response == "<think> is text here"


# -- the translation of requests -----------------------------------------------------------------------------


def test_format_and_thinking_are_translated() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    for format, expected in (("json", ("json_object", None)), (schema, ("json_schema", schema))):
        for kind in (OllamaChatRequest, OllamaGenerateRequest):
            structure = asked(kind, format=format).of.structure
            assert (structure.kind, structure.value) == expected
    assert asked(format="").of.structure is None
    for think, variables in (
        (None, {}),
        (True, {"enable_thinking": True}),
        (False, {"enable_thinking": False}),
        ("low", {"enable_thinking": True, "reasoning_effort": "low"}),
    ):
        assert asked(think=think).of.template_variables == variables


def test_options_are_translated() -> None:
    options = {
        **{"temperature": 2, "top_k": 5.0, "min_p": 0.1, "seed": 7, "repeat_penalty": 1.1, "num_gpu": 3},
        **{"presence_penalty": 0.5, "frequency_penalty": 0.25, "mirostat": 1, "stop": "x", "num_predict": -2},
    }
    request = asked(options=options)
    sampling = request.sampling(100, GenerationConfig({"top_p": 0.9}))
    assert (sampling.temperature, sampling.top_k, sampling.min_p, sampling.seed) == (2, 5, 0.1, 7)
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (0.5, 0.25)
    assert sampling.repetition_penalty == 1.1 and sampling.top_p == 0.9
    question = request.question(sampling)
    assert question.max_tokens is None and question.stop == ("x",)
    assert asked(options={"seed": -1}).sampling(100, GenerationConfig()).seed is None
    assert asked(stream=None).stream and asked().stream and not asked(stream=False).stream


def test_messages_are_translated() -> None:
    call = {"function": {"name": "f", "arguments": {"a": 1}, "index": 0}}
    messages = [
        *USER,
        {"role": "assistant", "thinking": "Hm.", "tool_calls": [call]},
        {"role": "tool", "tool_name": "f", "content": "yes"},
        {"role": "assistant", "content": "It"},
    ]
    dialogue = asked(messages=messages).of
    assert isinstance(dialogue, Dialogue) and dialogue.continues
    assert dialogue.messages[1:3] == [
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "Hm.",
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "yes", "name": "f"},
    ]


# -- errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"messages": [{"role": "user", "content": "x", "images": ["aGk="]}]}, "this model reads text only"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"options": {"top_p": 2}}, "options.top_p"),
        ({"think": "sometimes"}, "think is 'sometimes'"),
        ({"messages": [{"role": "user", "content": "x" * 9000}]}, "makes room for 8192"),
    ],
)
def test_what_cannot_be_done_is_named(client: ollama.Client, options: dict[str, Any], message: str) -> None:
    for stream in (False, True):
        with pytest.raises(ollama.ResponseError, match=message) as caught:
            list(chat(client, stream=stream, **options))
        assert caught.value.status_code == 400


def test_what_generate_refuses(client: ollama.Client, server: Server) -> None:
    with pytest.raises(ollama.ResponseError, match="suffix is not supported"):
        client.generate("any", "Well?", suffix="x")
    with pytest.raises(ollama.ResponseError, match="template is not supported"):
        client.generate("any", "Well?", template="x")
    with pytest.raises(ollama.ResponseError, match="format is not supported for a raw prompt"):
        client.generate("any", "Well?", raw=True, format="json")
    assert server.post("/api/generate", {"prompt": "a", "images": ["aGk="]}).status_code == 400
    assert server.post("/api/chat", {"messages": USER, "format": "xml"}).json()["error"].startswith("format is 'xml'")
    assert server.post("/api/pull", {"model": "x"}).json() == {
        "error": "this server has no path /api/pull; GET /openapi.json lists those that it has."
    }


def test_an_error_in_a_stream(client: ollama.Client, scripted: Scripted, monkeypatch: pytest.MonkeyPatch) -> None:
    form = OllamaChatForm(asked(), "demo")
    assert form.failed(ApiError(500, "broken")) == '{"error":"broken"}\n'
    for progress in (None, Progress(1, 2)):
        waiting = json.loads(form.waiting(progress))
        assert waiting["message"] == {"role": "assistant", "content": ""} and not waiting["done"]

    def fail(prompt: str) -> str:
        raise ValueError("broken")

    scripted.script = fail
    with pytest.raises(ollama.ResponseError, match="broken"):
        list(chat(client, stream=True))
