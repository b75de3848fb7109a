"""gpt-oss's messages with headers, through OpenAI's own client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest
from mixtures import make_mixture  # type: ignore[import-not-found]  # found beside this file
from scripted import VOCABULARY, Scripted  # type: ignore[import-not-found]
from serving import serving  # type: ignore[import-not-found]
from templates import HARMONY, TEMPLATES, write_tokenizer  # type: ignore[import-not-found]

USER: list[Any] = [{"role": "user", "content": "How is it in Paris?"}]
CITY = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
    "additionalProperties": False,
}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
LOOK: Any = {"type": "function", "function": {"name": "look", "parameters": CITY}}
WAIT: Any = {"type": "function", "function": {"name": "wait", "parameters": NOTHING}}
THOUGHT = "<|channel|>analysis<|message|>I should look.<|end|><|start|>assistant"
CALL = '<|channel|>commentary to=functions.look <|constrain|>json<|message|>{"city": "Rome"}'


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_mixture(tmp_path_factory.mktemp("harmony"), "gpt_oss", vocab_size=VOCABULARY, sliding_window=128)
    write_tokenizer(folder, TEMPLATES["harmony"], HARMONY)
    config = json.loads((folder / "config.json").read_text())
    ends = [256 + 1, 256 + 9 + HARMONY.index("<|call|>"), 256 + 9 + HARMONY.index("<|return|>")]
    (folder / "config.json").write_text(json.dumps({**config, "eos_token_id": ends, "max_position_embeddings": 8192}))
    return folder


@pytest.fixture(scope="module")
def scripted(folder: Path) -> Iterator[Scripted]:
    with pytest.MonkeyPatch.context() as patch:
        yield Scripted(folder, patch)


@pytest.fixture(scope="module")
def client(scripted: Scripted) -> Iterator[openai.OpenAI]:
    with (
        serving(scripted.load) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def chat(client: openai.OpenAI, **options: Any) -> Any:
    given: dict[str, Any] = {"model": "demo", "messages": USER, "temperature": 0, "max_tokens": 300, **options}
    return client.chat.completions.create(**given)


def test_thoughts_text_and_calls(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: f"{THOUGHT}<|channel|>final<|message|>It is warm."
    (choice,) = chat(client).choices
    assert choice.message.content == "It is warm." and choice.message.reasoning_content == "I should look."
    scripted.script = lambda prompt: f"{THOUGHT}{CALL}"
    (choice,) = chat(client, tools=[LOOK]).choices
    assert choice.finish_reason == "tool_calls" and choice.message.content is None
    assert json.loads(choice.message.tool_calls[0].function.arguments) == {"city": "Rome"}


@pytest.mark.parametrize(
    "said",
    [f"{THOUGHT}{CALL}", CALL, f"{THOUGHT}<|channel|>final<|message|>No.", "<|channel|>final<|message|>No.", "No."],
)
@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "look"}}])
def test_a_call_is_forced_after_the_thoughts(client: openai.OpenAI, scripted: Scripted, said: str, choice: Any) -> None:
    scripted.script = lambda prompt: said
    done = chat(client, tools=[LOOK, WAIT], tool_choice=choice).choices[0]
    assert done.finish_reason == "tool_calls"
    (call,) = done.message.tool_calls
    schema = {"look": CITY, "wait": NOTHING}[call.function.name]
    jsonschema.validate(json.loads(call.function.arguments), schema)
    if said.endswith(CALL):
        assert json.loads(call.function.arguments) == {"city": "Rome"}
    assert choice == "required" or call.function.name == "look"
    if said.startswith(THOUGHT):
        assert done.message.reasoning_content == "I should look."


def test_a_limit_of_the_thoughts(client: openai.OpenAI, scripted: Scripted) -> None:
    long = f"<|channel|>analysis<|message|>{'so it goes ' * 20}<|end|><|start|>assistant{CALL}"
    scripted.script = lambda prompt: long
    forced = {"tools": [LOOK], "tool_choice": "required", "extra_body": {"thinking_budget": 20}}
    done = chat(client, **forced)
    assert done.choices[0].finish_reason == "tool_calls" and done.usage.completion_tokens_details.reasoning_tokens < 25
    free = chat(client, extra_body={"thinking_budget": 20})
    assert free.choices[0].message.content and free.usage.completion_tokens_details.reasoning_tokens < 25


def test_a_schema_holds_the_final_message(client: openai.OpenAI, scripted: Scripted) -> None:
    scripted.script = lambda prompt: f"{THOUGHT}<|channel|>final<|message|>Well, Rome."
    schema: Any = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    jsonschema.validate(json.loads(chat(client, response_format=schema).choices[0].message.content), CITY)
