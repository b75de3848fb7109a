"""Prompts against transformers' own, and templates that would run for ever or use up all memory."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import until  # type: ignore[import-not-found]  # found beside this file
from templates import CHATML, SPECIAL, TEMPLATES, write_tokenizer  # type: ignore[import-not-found]

from mlx_flash.errors import ChatTemplateError, ChatTemplateFailure, CheckpointError, TokenizerError
from mlx_flash.text import chat_template, template_process
from mlx_flash.text.chat_template import (
    has_chat_template,
    prompt_ids,
    prompt_text,
    system_tokens,
    takes_tools,
    tokens_of,
)
from mlx_flash.text.encoding import TooManyTokens
from mlx_flash.text.generation import encode_prompt
from mlx_flash.text.template_process import WORKER, TemplateProcess
from mlx_flash.text.tokenizer import load_tokenizer

Message = dict[str, Any]
HI: list[Message] = [{"role": "user", "content": "hi"}]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}]
FOR, END = "{% for i in range(99999) %}", "{% endfor %}"
FOREVER = FOR * 3 + END * 3


@pytest.fixture(scope="module")
def process() -> Iterator[TemplateProcess]:
    process = TemplateProcess()
    yield process
    process.close()


def text_of(*arguments: Any, **options: Any) -> str:
    text = prompt_text(*arguments, **options)
    assert isinstance(text, str)
    return text


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A tokenizer without a template."""
    return load_tokenizer(write_tokenizer(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def tokenizer_of(plain: Any) -> Callable[[Any], Any]:
    """Makes the same tokenizer with a template."""

    def make(template: Any) -> Any:
        tokenizer = copy.copy(plain)
        tokenizer._tokenizer = copy.copy(plain._tokenizer)
        tokenizer._tokenizer.chat_template = template
        tokenizer.has_chat_template = True
        return tokenizer

    return make


# -- the same prompt as transformers -------------------------------------------------------------------------

TEXT = st.one_of(st.text(max_size=12), st.sampled_from([*SPECIAL, " a ", "{{ 1 }}", "x</think>y"]))
CALL = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}},
    st.sampled_from(["add", "f"]),
    st.dictionaries(st.text("ab", min_size=1, max_size=2), st.one_of(st.integers(), TEXT, st.none()), max_size=2),
)
MESSAGE = st.one_of(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "tool"]), "content": TEXT}),
    st.fixed_dictionaries(
        {"role": st.just("assistant"), "content": TEXT},
        optional={"tool_calls": st.lists(CALL, max_size=2), "reasoning_content": TEXT, "name": TEXT},
    ),
)


@settings(deadline=None, derandomize=True)
@given(
    st.sampled_from([name for name in TEMPLATES if name != "texts"]),
    st.lists(MESSAGE, min_size=1, max_size=5),
    st.sampled_from([None, TOOLS]),
    st.dictionaries(st.sampled_from(["enable_thinking", "bos_token", "other"]), st.booleans() | TEXT, max_size=2),
    st.booleans(),
)
def test_prompts_are_those_of_transformers(
    process: TemplateProcess,
    tokenizer_of: Callable[[str], Any],
    name: str,
    messages: list[Message],
    tools: Any,
    variables: dict[str, Any],
    generation_prompt: bool,
) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name])
    try:
        expected = tokenizer.apply_chat_template(
            messages, tools=tools, add_generation_prompt=generation_prompt, **variables
        )
    except Exception as error:
        expected = error
    as_sent = copy.deepcopy(messages)
    for message in as_sent:
        for call in message.get("tool_calls", ()):
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
    try:
        text = text_of(
            process,
            tokenizer,
            as_sent,
            most=9999,
            tools=tools,
            variables=variables,
            generation_prompt=generation_prompt,
        )
    except ChatTemplateFailure:
        assert isinstance(expected, Exception)
    else:
        assert tokens_of(tokenizer, text, most=9999) == expected


@pytest.mark.parametrize("name", ["chatml", "header", "thinking", "generation"])
@pytest.mark.parametrize("text", ["Well,", "Well, ", " a\n"])
def test_an_answer_is_continued_as_transformers_does(
    process: TemplateProcess, tokenizer_of: Callable[[str], Any], name: str, text: str
) -> None:
    tokenizer = tokenizer_of(TEMPLATES[name])
    messages = [*HI, {"role": "assistant", "content": text}]
    expected = tokenizer.apply_chat_template(messages, continue_final_message=True, tokenize=False)
    assert text_of(process, tokenizer, messages, most=999, continues=True) == expected
    assert expected.rstrip().endswith(text.strip())


def test_templates_that_want_the_text_of_arguments(process: TemplateProcess, tokenizer_of: Any) -> None:
    def talk(arguments: Any) -> list[Message]:
        return [
            *HI,
            {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]},
        ]

    texts, objects = tokenizer_of(TEMPLATES["texts"]), tokenizer_of(TEMPLATES["thinking"])
    forms: list[Any] = ['{"a":  1}', {"a": 1}, "not JSON"]
    for arguments in forms:
        text = arguments if isinstance(arguments, str) else json.dumps(arguments)
        assert text_of(process, texts, talk(arguments), most=999).endswith(f"<call>f\n{text}</call>")
    for arguments in ("", "{}"):
        assert "<f=f></tool_call>" in text_of(process, objects, talk(arguments), most=999)
    for arguments in ("not JSON", "5", "[1]", "9" * 5000, "[" * 99999, None):
        with pytest.raises(ChatTemplateFailure):
            text_of(process, objects, talk(arguments), most=999)


def test_roles_and_forms_of_content(process: TemplateProcess, tokenizer_of: Any) -> None:
    messages = [{"role": "developer", "content": "be brief"}, *HI]
    assert "<|im_start|>system\nbe" in text_of(process, tokenizer_of(CHATML), messages, most=99)
    own = CHATML + "{% if messages[0].role == 'developer' %}!{% endif %}"
    assert text_of(process, tokenizer_of(own), messages, most=99).endswith("!")
    part = "{% if p.type == 'text' %}{{ p.text }};{% endif %}"
    of_parts = "{% for m in messages %}{% for p in m.content %}" + part + "{% endfor %}{% endfor %}"
    assert text_of(process, tokenizer_of(of_parts), messages, most=99) == "be brief;hi;"
    assert text_of(process, tokenizer_of("{{ messages[-1].content | upper }}"), messages, most=99) == "HI"


def test_templates_in_code(tmp_path: Path, process: TemplateProcess) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, chat_template_type="deepseek_v32"))
    assert tokenizer.chat_template is None and has_chat_template(tokenizer) and takes_tools(tokenizer, TOOLS)
    expected = tokenizer.apply_chat_template(HI, add_generation_prompt=True)
    assert prompt_ids(process, tokenizer, HI, most=999) == expected
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    talk = [*HI, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "5"}]
    assert 'name="a" string="false">2<' in text_of(process, tokenizer, talk, most=999)
    with pytest.raises(ChatTemplateFailure, match="AssertionError: Invalid messages at 1"):
        prompt_ids(process, tokenizer, [*HI, {"role": "tool", "content": "5"}], most=999)
    with pytest.raises(ChatTemplateFailure, match="unexpected keyword"):
        text_of(process, tokenizer, HI, most=999, variables={"unknown": 1})


def test_where_templates_are(tmp_path: Path, process: TemplateProcess) -> None:
    def prompt(folder: Path, tools: Any = None) -> str:
        return text_of(process, load_tokenizer(folder), HI, most=99, tools=tools)

    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    folder = write_tokenizer(tmp_path / "named", named)
    assert (prompt(folder), prompt(folder, TOOLS)) == ("D", "T")
    (folder / "chat_template.jinja").write_text("J")
    assert prompt(folder) == "J"
    folder = write_tokenizer(tmp_path / "folder")
    (folder / "chat_template.jinja").write_text("J")
    (folder / "chat_template.json").write_text("{")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("A")
    assert (prompt(folder), prompt(folder, TOOLS)) == ("J", "A")
    folder = write_tokenizer(tmp_path / "older")
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "O"}))
    assert prompt(folder) == "O"
    folder = write_tokenizer(tmp_path / "none", [{"name": "rag", "template": "R"}])
    with pytest.raises(ChatTemplateFailure, match=r"several chat templates \(rag\) but no default"):
        prompt(folder)
    folder = write_tokenizer(tmp_path / "number", {"default": 5})
    with pytest.raises(ChatTemplateFailure, match="the model's chat template is 5, expected a text"):
        prompt(folder)


# -- foreign code --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('System role not supported.') }}", "refuses: System role not supported.$"),
        ("{{ raise_exception('a' * 100000) }}", "refuses: a{300}.$"),
        ("{{ raise_exception('\\ud800\\x1b[31m') }}", r"refuses: \?\?\[31m.$"),
        ("{% for m in messages %}{{ m.content }", "cannot be applied: TemplateSyntaxError: "),
        ("{{ nothing.at.all }}", "cannot be applied: UndefinedError: 'nothing' is undefined.$"),
        ("{{ ''.__class__.__mro__ }}", "cannot be applied: SecurityError: "),
        ("{{ 1 + 'a' }}", "cannot be applied: TypeError: "),
        ("{{ 1 / 0 }}", "cannot be applied: ZeroDivisionError: "),
        ("{% include 'x' %}", "cannot be applied: TypeError: no loader"),
        ("{{ range(999999999) | list }}", "cannot be applied: OverflowError: "),
        ("{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(0) }}", "cannot be applied: RecursionError: "),
        ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "cannot be applied: RecursionError: "),
        ("{{ 10 ** 10000 }}", "cannot be applied: ValueError: "),
        ("{{ 'a' * 9999999 }}", "makes a text of more than 4194304 characters.$"),
        pytest.param(
            "{{ 'a' * 4000000000 }}",
            "needs more memory than its limit.$",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce the limit"),
        ),
        pytest.param(
            "{{ messages | tojson(indent=999999999) }}",
            "needs more memory than its limit.$",
            marks=pytest.mark.skipif(sys.platform != "linux", reason="macOS does not enforce the limit"),
        ),
    ],
)
def test_templates_that_fail(process: TemplateProcess, tokenizer_of: Any, template: str, message: str) -> None:
    with pytest.raises(ChatTemplateError, match=f"the model's chat template {message}") as caught:
        prompt_ids(process, tokenizer_of(template), HI, most=99)
    assert str(caught.value).isprintable() and caught.value.exit_code == 1
    assert text_of(process, tokenizer_of("ok"), HI, most=99) == "ok"


@pytest.mark.parametrize("template", [FOREVER, "{{ 10 ** 1000000000 }}", "{{ lipsum(99999) }}"])
def test_templates_that_do_not_end(
    monkeypatch: pytest.MonkeyPatch, tokenizer_of: Any, template: str, process: TemplateProcess
) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 0.3)
    impatient = TemplateProcess()
    with pytest.raises(ChatTemplateError, match=r"did not end within 0\.3 s"):
        prompt_ids(impatient, tokenizer_of(template), HI, most=99)
    monkeypatch.undo()
    assert text_of(impatient, tokenizer_of("ok"), HI, most=99) == "ok"
    impatient.close()


def test_a_rendering_is_ended_by_close(tokenizer_of: Any) -> None:
    process = TemplateProcess()
    assert text_of(process, tokenizer_of("ok"), HI, most=99) == "ok"
    raised: list[Exception] = []

    def render() -> None:
        try:
            prompt_ids(process, tokenizer_of(FOREVER), HI, most=99)
        except ChatTemplateError as error:
            raised.append(error)

    threads = [threading.Thread(target=render) for _ in range(3)]
    for thread in threads:
        thread.start()
    until(process._lock.locked)
    process.close()
    for thread in threads:
        thread.join()
    assert len(raised) == 3
    with pytest.raises(ChatTemplateError, match="the chat template cannot be applied: this process is about to end"):
        prompt_ids(process, tokenizer_of("ok"), HI, most=99)


def test_a_worker_that_was_killed_is_replaced(tokenizer_of: Any) -> None:
    process = TemplateProcess()
    for _ in range(2):
        assert text_of(process, tokenizer_of("ok"), HI, most=99) == "ok"
        assert process._worker is not None
        process._worker.kill()
        process._worker.wait()
    process.close()


def test_the_worker_ends_with_its_input_and_imports_little() -> None:
    command = [sys.executable, "-X", "importtime", "-m", WORKER, "10", str(1 << 26)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    modules = {line.rsplit("|", 1)[1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert (done.returncode, done.stdout) == (0, "{}\n")
    packages = {name.split(".")[0] for name in modules}
    assert "jinja2" in packages and not packages & {"mlx", "numpy", "tokenizers", "transformers"}
    assert {name for name in modules if name.startswith("mlx_flash")} == {
        *("mlx_flash", "mlx_flash.cli", "mlx_flash.cli.beginning", "mlx_flash.text")
    }


def test_no_code_of_the_working_directory_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer_of: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("jinja2", "json", "transformers"):
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')")
    process = TemplateProcess()
    assert text_of(process, tokenizer_of("ok"), HI, most=99) == "ok" and not (tmp_path / "ran").exists()
    process.close()


def test_a_worker_that_cannot_be_started(monkeypatch: pytest.MonkeyPatch, tokenizer_of: Any) -> None:
    for executable, message in (("/no/such/python", "cannot be started: "), ("/bin/false", "it ended with code 1")):
        monkeypatch.setattr(sys, "executable", executable)
        with pytest.raises(ChatTemplateError, match=message):
            prompt_ids(TemplateProcess(), tokenizer_of("ok"), HI, most=99)


# -- tokenizers that raise -----------------------------------------------------------------------------------


def test_what_tokenizers_raise(tmp_path: Path, process: TemplateProcess) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "length", CHATML, model_max_length="x"))
    for make in (lambda: encode_prompt(tokenizer, "hi"), lambda: prompt_ids(process, tokenizer, HI, most=99)):
        with pytest.raises(TokenizerError, match=rf"the tokenizer in {tmp_path}/length cannot encode this text: "):
            make()

    class PanicException(BaseException):
        pass

    def panic(*_: Any, **__: Any) -> None:
        raise PanicException("index out of bounds")

    tokenizer._tokenizer.encode = panic
    with pytest.raises(TokenizerError, match="PanicException: index out of bounds"):
        encode_prompt(tokenizer, "hi")
    folder = write_tokenizer(tmp_path / "unknown")
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"] = {"type": "Unigram", "unk_id": None, "vocab": [["a", -1.0]], "byte_fallback": False}
    content["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises((TokenizerError, CheckpointError)):
        encode_prompt(load_tokenizer(folder), "b")


def test_long_prompts_are_counted_before_they_are_encoded(process: TemplateProcess, tokenizer_of: Any) -> None:
    with pytest.raises(TooManyTokens, match="more than 32767 tokens"):
        prompt_ids(process, tokenizer_of("{{ 'ab' * 999999 }}"), HI, most=999)
    assert len(prompt_ids(process, tokenizer_of("{{ 'ab' * 99999 }}"), HI, most=999_999)) == 199_998


# -- the tokens of the system prompt -------------------------------------------------------------------------------


@pytest.mark.parametrize("asked", ["What is it?", "?", ""])
def test_the_system_prompt_ends_where_questions_differ(
    process: TemplateProcess, tokenizer_of: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    tokenizer = tokenizer_of(CHATML)
    messages = [{"role": "system", "content": "Be brief. " * 60}, {"role": "user", "content": asked}]
    messages += [{"role": "assistant", "content": "Yes."}, {"role": "user", "content": "And now?"}]

    def system(messages: list[Message], **options: Any) -> tuple[int, str]:
        ids = prompt_ids(process, tokenizer, messages, most=4096)
        count = system_tokens(process, tokenizer, messages, ids, most=4096, **options)
        return count, tokenizer.decode(ids[:count])

    count, text = system(messages)
    assert count > 600 and text.endswith("user\n") and "Be brief. " * 59 in text
    assert "".join(text.split("user\n")) in system([*messages[:1], {"role": "user", "content": "x"}])[1]
    assert system([{"role": "user", "content": "long " * 200}])[0] < 30
    assert system([messages[0] | {"content": "Be brief."}, messages[1]]) == (0, ""), "less than a chunk"
    monkeypatch.setattr(chat_template, "prompt_text", lambda *_, **__: 1 / 0)
    monkeypatch.setattr(chat_template, "PREFILL_TOKENS", 10**6)
    assert system_tokens(process, tokenizer, messages, [1] * 600, most=4096) == 0


def test_a_template_that_refuses_another_question_names_no_system_prompt(
    process: TemplateProcess, tokenizer_of: Callable[[Any], Any]
) -> None:
    refuses = (
        "{% if messages[-1]['content'] == '?' %}{{ raise_exception('no') }}{% endif %}{{ messages[-1]['content'] }}"
    )
    tokenizer = tokenizer_of(refuses)
    messages = [{"role": "user", "content": "a" * 600}]
    ids = prompt_ids(process, tokenizer, messages, most=4096)
    assert len(ids) == 600 and system_tokens(process, tokenizer, messages, ids, most=4096) == 0
