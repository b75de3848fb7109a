"""Chat templates in the commands that apply them: `generate`, a conversation, and the server's requests."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import change_manifest  # type: ignore[import-not-found]
from serving import PATIENCE_S, serving  # type: ignore[import-not-found]  # found beside this file
from templates import write_tokenizer  # type: ignore[import-not-found]  # found beside this file

from mlx_flash.errors import ChatTemplateError
from mlx_flash.loading.load import load
from mlx_flash.server.apis.openai_chat import ChatRequest
from mlx_flash.server.apis.openai_common import parse
from mlx_flash.server.apis.question import Dialogue
from mlx_flash.server.engine import Engine
from mlx_flash.server.loaded_model import LoadedModel
from mlx_flash.server.prompts import encode_dialogue
from mlx_flash.text import template_process
from mlx_flash.text.conversation import Conversation
from mlx_flash.text.sampling import Sampling
from mlx_flash.text.template_process import TemplateProcess
from mlx_flash.text.tokenizer import load_tokenizer

SYSTEM, HI = {"role": "system", "content": "Be"}, {"role": "user", "content": "hi"}
SAID = "{% for m in messages %}{{ m.content }}{% endfor %}"
NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system messages') }}{% endif %}" + SAID
FOREVER = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3


def encode_chat(engine: Engine, request: ChatRequest) -> list[int]:
    """The token ids of a request's prompt."""
    dialogue = request.question(Sampling()).of
    assert isinstance(dialogue, Dialogue)
    return encode_dialogue(engine, dialogue)[0]


@pytest.fixture
def generate(
    run_generate: Callable[..., tuple[int, str, str]], own_store: Path
) -> Callable[[Any], tuple[int, str, str]]:
    """(exit code, standard output, standard error) of the command with a system prompt, for a model's template."""

    def run(template: Any) -> tuple[int, str, str]:
        path = own_store / "tokenizer_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
        change_manifest(own_store)
        return run_generate("--model", str(own_store), "--prompt", "hi", "--system-prompt", "Be", "--max-tokens", "1")

    return run


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NO_SYSTEM, "the model's chat template refuses: no system messages."),
        (SAID + "{{ 1 }", "the model's chat template cannot be applied: TemplateSyntaxError: "),
        (
            [{"name": "rag", "template": "R"}, {"name": "tool_use", "template": "T"}],
            "the model has several chat templates (rag, tool_use) but no default.",
        ),
    ],
    ids=["refuses", "syntax", "no default"],
)
def test_generate_says_in_a_line_why_a_template_fails(
    generate: Callable[[Any], tuple[int, str, str]], template: Any, message: str
) -> None:
    code, output, error = generate(template)
    assert (code, output) == (1, "") and "Traceback" not in error
    assert error.splitlines()[-1].startswith(f"python -m mlx_flash.generate: {message}")


def test_generate_ends_a_template_that_does_not_end(
    generate: Callable[[Any], tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.1)
    code, output, error = generate(FOREVER)
    assert (code, output) == (1, "") and "Traceback" not in error
    assert error.splitlines()[-1].endswith(
        "the model's chat template did not end within 0.1 s. Use --ignore-chat-template to run without it."
    )


# -- a template in code, which `tokenizer.chat_template` does not show ------------------------------------------


@pytest.fixture(scope="module")
def in_code(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("in_code")
    tokenizer = load_tokenizer(write_tokenizer(folder, chat_template_type="deepseek_v32"))
    assert tokenizer.chat_template is None
    return tokenizer


def ids_of(tokenizer: Any, *messages: dict[str, str]) -> list[int]:
    """mlx-lm's own ids."""
    return list(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True))


def test_generate_applies_a_template_in_code(generate_command: ModuleType, in_code: Any) -> None:
    arguments = generate_command.make_parser().parse_args(["--system-prompt", "Be"])
    assert generate_command.apply_template(in_code, "hi", arguments, 512) == ids_of(in_code, SYSTEM, HI)


def test_a_conversation_applies_a_template_in_code(in_code: Any) -> None:
    conversation = Conversation(in_code, context=999, system_prompt="Be")
    assert conversation.ask("hi", room=9).tokens == ids_of(in_code, SYSTEM, HI)
    conversation.answered("hi", "yes", [7, 8])
    answer = {"role": "assistant", "content": "yes"}
    assert conversation.ask("hi", room=9).tokens == ids_of(in_code, SYSTEM, HI, answer, HI)
    conversation.close()


def test_the_server_applies_a_template_in_code(in_code: Any) -> None:
    class Model:
        class flash:
            class plan:
                context = 999

    engine = Engine("some", "")
    engine.switch.loaded = LoadedModel(Model, in_code)
    request = parse(ChatRequest, json.dumps({"messages": [SYSTEM, HI]}).encode())
    request.check()
    assert encode_chat(engine, request) == ids_of(in_code, SYSTEM, HI)
    engine.templates.close()


# -- a template that renders while other requests wait ----------------------------------------------------------


@pytest.fixture
def rendering(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """(set when rendering has begun, set by the test to let it end)."""
    begun, may_end = threading.Event(), threading.Event()

    def render(self: TemplateProcess, arguments: dict[str, Any], characters: int) -> str:
        begun.set()
        assert may_end.wait(PATIENCE_S)
        return str(arguments["conversations"][0][0]["content"])

    monkeypatch.setattr(TemplateProcess, "render", render)
    yield begun, may_end
    may_end.set()


def test_a_completion_is_answered_while_a_template_renders(
    store: Path, rendering: tuple[threading.Event, threading.Event]
) -> None:
    begun, may_end = rendering

    def load_with_template() -> tuple[Any, Any]:
        model, tokenizer = load(store, memory="2GB")
        tokenizer._tokenizer.chat_template, tokenizer.has_chat_template = SAID, True
        return model, tokenizer

    with serving(load_with_template) as server, ThreadPoolExecutor() as pool:
        chat = pool.submit(server.post, "/v1/chat/completions", {"messages": [HI], "max_tokens": 1})
        try:
            assert begun.wait(PATIENCE_S)
            completion = server.post("/v1/completions", {"prompt": "hi", "max_tokens": 1})
            assert completion.status_code == 200 and not chat.done()
        finally:
            may_end.set()
        assert chat.result().status_code == 200


def test_a_rendering_that_waited_too_long_for_others_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template_process, "WAIT_SECONDS", 0.0)
    process = TemplateProcess()

    def ask(self: TemplateProcess, request: dict[str, Any]) -> dict[str, Any]:
        if request["characters"] == 1:  # another thread asks for another prompt in the middle of this one
            error = pool.submit(process.render, {}, 2).exception(PATIENCE_S)
            assert isinstance(error, ChatTemplateError)
            assert str(error) == "other prompts kept the model's chat template busy for 0 s. Try again."
        return {"text": "rendered"}

    monkeypatch.setattr(TemplateProcess, "_ask", ask)
    with ThreadPoolExecutor() as pool:
        assert [process.render({}, number) for number in (1, 2)] == ["rendered", "rendered"]
