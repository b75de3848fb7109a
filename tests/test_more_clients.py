"""More clients of other people, as libraries and commands. tests/clients/setup.sh installs them."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from other_clients import (  # type: ignore[import-not-found]  # found beside this file
    CLIENTS,
    INSTALLED,
    NODE,
    TIME_LIMIT_S,
    environment_in,
    run_cases,
    scripted_server,
)
from scripted import Scripted  # type: ignore[import-not-found]
from serving import Server  # type: ignore[import-not-found]

pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not INSTALLED.is_dir(), reason="tests/clients/setup.sh installs the clients"),
]
PYTHON = INSTALLED / "python" / "bin"
ROME = {"city": "Rome", "degrees": 21}
HELLO = ["Hello, you.", "I should look."]
CALLED = ["get_weather", {"city": "Paris"}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scripted, Server]]:
    with scripted_server(tmp_path_factory.mktemp("scripted"), context=32768) as running:
        yield running


@pytest.fixture
def server(running: tuple[Scripted, Server]) -> Server:
    return running[1]


def python_cases(name: str, server: Server, home: Path, *arguments: str) -> Mapping[str, Any]:
    command = [PYTHON / "python", CLIENTS / f"{name}_cases.py", server.url, *arguments]
    found: Mapping[str, Any] = run_cases(*command, environment=environment_in(home))
    return found


def node_cases(name: str, server: Server) -> Mapping[str, Any]:
    """A module finds its packages in the folders above its own."""
    program = shutil.copy(CLIENTS / name, INSTALLED / "more" / name)
    found: Mapping[str, Any] = run_cases(NODE, program, server.url)
    return found


def test_instructor(server: Server, tmp_path: Path) -> None:
    found = python_cases("instructor", server, tmp_path)
    assert {name: each for name, each in found.items() if each != ROME} == {}


def test_litellm(server: Server, tmp_path: Path) -> None:
    found = python_cases("litellm", server, tmp_path)
    wanted: dict[str, Any] = {"responses": ["Hello, you."]}
    for api in ("chat", "anthropic", "ollama"):
        wanted |= {f"chat, {api}": HELLO, f"stream, {api}": HELLO, f"schema, {api}": ROME}
        wanted |= {f"loop, {api}": [*CALLED, "It is sunny."], f"streamed_call, {api}": [*CALLED, "tool_calls"]}
    assert found == wanted


def test_smolagents(running: tuple[Scripted, Server], tmp_path: Path) -> None:
    assert python_cases("smolagents", running[1], tmp_path) == {"agent": "It is sunny.", "stream": "It is sunny."}


def test_llama_index(server: Server, tmp_path: Path) -> None:
    assert python_cases("llama_index", server, tmp_path) == {
        "chat": "Hello, you.",
        "stream": "Hello, you.",
        "call": "22 degrees",
        "typed, by a call": ROME,
        "typed, by a schema": ROME,
    }


def test_lm_eval(running: tuple[Scripted, Server], tmp_path: Path) -> None:
    scripted, server = running
    found = python_cases("lm_eval", server, tmp_path, str(scripted.folder))
    likelihood, greedy = found["loglikelihood"]
    assert -1000 < likelihood < 0 and greedy is False
    assert found["generate_until"].startswith("<think>")  # a completion has no thoughts apart


def test_titles_and_tags(server: Server) -> None:
    """What Open WebUI asks after each answer does not cost the chat its place in the prompt caches."""

    def ask(messages: list[Any]) -> Any:
        done = server.post("/v1/chat/completions", {"messages": messages, "max_tokens": 50}).json()
        return done["choices"][0]["message"]["content"], done["usage"]["prompt_tokens_details"]["cached_tokens"]

    messages = [{"role": "system", "content": "Be brief. " * 200}, {"role": "user", "content": "Hello?"}]
    answer, _ = ask(messages)
    for task in ("a title", "three tags", "questions that may follow"):
        ask([{"role": "user", "content": f"### Task:\nWrite {task}.\n<chat_history>\n{answer}\n</chat_history>"}])
    _, cached = ask([*messages, {"role": "assistant", "content": answer}, {"role": "user", "content": "Go on."}])
    assert cached == 1536


def test_the_ai_sdk(server: Server) -> None:
    found = dict(node_cases("ai_sdk.mjs", server))
    assert found.pop("references") > 0  # the second steps of the openai provider
    wanted: dict[str, Any] = {}
    for name in ("compatible", "chat", "responses"):
        # OpenAI's provider shows no thoughts of chats, and of responses only summaries.
        thoughts = {"compatible": {"reasoningText": "I should look."}, "responses": {"reasoningText": ""}}.get(name, {})
        for form in ("text", "stream"):
            wanted[f"{form}, {name}"] = {"text": "Hello, you.", "counted": True, **thoughts}
        for form in ("loop", "streamed loop"):
            wanted[f"{form}, {name}"] = {"text": "It is sunny.", "steps": ["tool-calls", "stop"]}
        wanted[f"forced call, {name}"] = [["get_weather", {"city": "Paris"}]]
    for name in ("compatible", "chat", "responses", "structured"):
        wanted |= {f"object, {name}": ROME, f"streamed object, {name}": ROME}
    assert found == wanted


def test_anthropic_npm(server: Server) -> None:
    found = dict(node_cases("anthropic.mjs", server))
    thinking, text = found.pop("message")
    assert thinking["thinking"] == "I should look." and text == {"type": "text", "text": "Hello, you."}
    assert found == {
        "stream": {"text": "One moment.", "types": ["thinking", "text", "tool_use"], "reason": "tool_use"},
        "loop": {"text": "It is sunny.", "cities": ["Paris"]},
        "forced_call": [["get_weather", {"city": "Paris"}]],
        "schema": ROME,
        "count": True,
        "models": ["demo"],
        "refused": {"status": 400, "type": "invalid_request_error"},
    }


# -- commands --------------------------------------------------------------------------------------------------


def run(command: list[str | Path], home: Path, **environment: str) -> str:
    done = subprocess.run(
        [str(part) for part in command],
        cwd=home,
        env={**environment_in(home), **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=TIME_LIMIT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


FUNCTION = '''
def get_weather(city: str) -> str:
    """Tells the weather."""
    return "22 degrees"
'''


def test_llm(server: Server, tmp_path: Path) -> None:
    model = {"model_id": "local", "model_name": "demo", "api_base": f"{server.url}/v1"}
    abilities = {"supports_tools": True, "supports_schema": True}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([{**model, **abilities}]))

    def llm(*arguments: str) -> str:
        command: list[str | Path] = [PYTHON / "llm", "-m", "local", "--key", "none", "--no-log", *arguments]
        return run(command, tmp_path, LLM_USER_PATH=str(tmp_path)).strip()

    assert llm("Hello?").endswith("Hello, you.") and llm("Hello?", "--no-stream").endswith("Hello, you.")
    assert llm("How is it in Paris?", "--functions", FUNCTION).endswith("It is sunny.")
    assert json.loads(llm("Say it as JSON.", "--schema", "city, degrees int")) == ROME


def test_aider(running: tuple[Scripted, Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted, server = running
    file = tmp_path / "hello.txt"
    file.write_text("old text\n")
    answer = "<think>\nI write.\n</think>\n\nI change it.\n\nhello.txt\n```\nnew text\n```\n"
    monkeypatch.setattr(scripted, "script", lambda prompt: answer)
    prices = tmp_path / ".aider" / "caches" / "model_prices_and_context_window.json"
    prices.parent.mkdir(parents=True)
    prices.write_text("{}")  # otherwise it downloads them
    model = ["--model", "openai/demo", "--edit-format", "whole", "--no-show-model-warnings", "--map-tokens", "0"]
    quiet = ["--yes-always", "--no-git", "--no-pretty", "--no-check-update", "--no-show-release-notes"]
    task = ["--analytics-disable", "--message", "Change the file.", "hello.txt"]
    said = run(
        [INSTALLED / "aider" / "bin" / "aider", *model, *quiet, *task],
        tmp_path,
        OPENAI_API_BASE=f"{server.url}/v1",
        OPENAI_API_KEY="none",
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    )
    assert "THINKING" in said and "I write." in said and "<think>" not in said
    assert file.read_text() == "new text\n"
