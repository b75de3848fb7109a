"""Fields of requests are applied or refused by name. Prompts are built by the server without HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import serving, until  # type: ignore[import-not-found]  # found beside this file
from templates import CHATML, TEMPLATES, write_tokenizer  # type: ignore[import-not-found]  # found beside this file

from mlx_flash.server.api_errors import ApiError
from mlx_flash.server.apis.openai_chat import ChatRequest
from mlx_flash.server.apis.openai_common import NOT_DONE, NOT_DONE_IN_CHAT, parse
from mlx_flash.server.apis.openai_completions import CompletionRequest
from mlx_flash.server.apis.question import Dialogue
from mlx_flash.server.engine import Engine
from mlx_flash.server.loaded_model import LoadedModel
from mlx_flash.server.prompts import encode_dialogue, encode_prompt_of, room_for
from mlx_flash.text import template_process
from mlx_flash.text.chat_template import RESERVED_VARIABLES
from mlx_flash.text.generation_config import GenerationConfig
from mlx_flash.text.sampling import Sampling
from mlx_flash.text.template_process import TemplateProcess
from mlx_flash.text.tokenizer import load_tokenizer

HI = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
NONE = GenerationConfig()


def encode_chat(engine: Engine, request: ChatRequest) -> list[int]:
    """The token ids of a request's prompt."""
    dialogue = request.question(Sampling()).of
    assert isinstance(dialogue, Dialogue)
    return encode_dialogue(engine, dialogue)[0]


def encode_completion(engine: Engine, request: CompletionRequest) -> list[int]:
    (prompt,) = request.prompts()
    return encode_prompt_of(engine, prompt)


def chat(*messages: dict[str, Any], **fields: Any) -> ChatRequest:
    request = parse(ChatRequest, json.dumps({"messages": messages or [HI], **fields}).encode())
    request.check()
    return request


def completion(**fields: Any) -> CompletionRequest:
    request = parse(CompletionRequest, json.dumps({"prompt": "a", **fields}).encode())
    request.check()
    return request


@pytest.fixture(scope="module")
def engine_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Engine]]:
    """An engine whose tokenizer has this template and whose model is only a plan."""
    engines = []

    class Model:
        class flash:
            vocabulary, positions = 300, 400

            class plan:
                context = 300

    def make(template: Any = None, **options: Any) -> Engine:
        engine = Engine("some", "")
        folder = write_tokenizer(tmp_path_factory.mktemp("tokenizer"), template, **options)
        engine.switch.loaded = LoadedModel(Model, load_tokenizer(folder))
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.templates.close()


@pytest.fixture(scope="module")
def chatml(engine_of: Callable[..., Engine]) -> Engine:
    return engine_of(CHATML)


def prompt_of(engine: Engine, *messages: dict[str, Any], **fields: Any) -> str:
    return str(engine.tokenizer.decode(encode_chat(engine, chat(*messages, **fields))))


# -- prompts -------------------------------------------------------------------------------------------------

START = "<|im_start|>assistant\n"


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": ["a", "b"]}, "user\nab"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]}, "user\nab"),
        ({"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}, "user\nab"),
        ({"role": "user", "content": []}, "user\n"),
        ({"role": "user"}, "user\n"),
        ({"role": "assistant", "content": None, "tool_calls": None, "audio": None}, "assistant\n"),
        ({"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]}, "assistant\nno"),
        ({"role": "developer", "content": "a"}, "system\na"),
        ({"role": "function", "name": "f", "content": "5"}, "tool\n5"),
        ({"role": "tool", "tool_call_id": "c", "content": "5"}, "tool\n5"),
    ],
)
def test_forms_of_messages(chatml: Engine, message: dict[str, Any], text: str) -> None:
    expected = f"<|im_start|>{text}<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n{START}"
    assert prompt_of(chatml, message, HI) == expected


def test_an_answer_that_has_begun_is_continued(chatml: Engine) -> None:
    begun = {"role": "assistant", "content": "Well, "}
    plain = prompt_of(chatml)
    assert prompt_of(chatml, HI, begun) == f"{plain}Well, "
    assert prompt_of(chatml, HI, begun, continue_final_message=True) == f"{plain}Well, "
    whole = f"{plain}Well, <|im_end|>\n"
    assert prompt_of(chatml, HI, begun, continue_final_message=False, add_generation_prompt=False) == whole
    assert prompt_of(chatml, HI, begun, add_generation_prompt=True) == whole + START
    called = {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": ""}}]}
    for other in ({"role": "assistant", "content": ""}, {"role": "assistant"}, called):
        assert prompt_of(chatml, HI, other).endswith(f"<|im_end|>\n{START}")
    for wrong in ({}, {"add_generation_prompt": True}):
        with pytest.raises(ApiError) as caught:
            prompt_of(chatml, HI, *([begun] if wrong else []), continue_final_message=True, **wrong)
        assert caught.value.param == "continue_final_message"


def test_functions_of_old_are_tools(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(TEMPLATES["thinking"])
    call = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 2}'}}
    prompt = prompt_of(engine, HI, call, {"role": "function", "name": "add", "content": "5"})
    assert "<tool_call><f=add><p=a>2</p></tool_call>" in prompt and "<|im_start|>tool\n5" in prompt


def test_what_reaches_the_template(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of(TEMPLATES["thinking"] + "{{ reasoning_effort }}")
    plain = prompt_of(engine)
    assert prompt_of(engine, chat_template_kwargs={"enable_thinking": False}) == f"{plain}<think>\n\n</think>\n\n"
    assert prompt_of(engine, chat_template_kwargs={"enable_thinking": True}) == plain
    assert prompt_of(engine, reasoning_effort="low") == f"{plain}low"
    assert prompt_of(engine, reasoning_effort="none") == f"{plain}<think>\n\n</think>\n\nnone"
    with_tools = prompt_of(engine, tools=[TOOL])
    assert with_tools == prompt_of(engine, tools=[TOOL], tool_choice="auto") != plain and '"name": "add"' in with_tools
    nothing: list[dict[str, Any]] = [{"tools": [TOOL], "tool_choice": "none"}, {"tools": []}, {"tools": None}]
    for none in nothing:
        assert prompt_of(engine, **none) == plain


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOL]}, "tools"),  # the template does not support tools
        ({"tools": [{"type": "web_search"}]}, "tools"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "sub"}}}, "tool_choice"),
        ({"tool_choice": "any"}, "tool_choice"),
        ({"chat_template_kwargs": []}, "chat_template_kwargs"),
        *[({"chat_template_kwargs": {name: 1}}, "chat_template_kwargs") for name in sorted(RESERVED_VARIABLES)],
        ({"chat_template_kwargs": {"self": 1}}, "messages"),
        ({"chat_template_kwargs": {"documents": 1}}, "messages"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        ({"repetition_penalty": 1e-3}, "repetition_penalty"),
        ({"reasoning_effort": "x" * 99}, "reasoning_effort"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages"),
        ({"messages": [{"role": "user", "content": [1]}]}, "messages"),
        *[({name: "x"}, name) for name in NOT_DONE | NOT_DONE_IN_CHAT],
        *[({name: True}, name) for name in ("min_tokens", "length_penalty", "ignore_eos", "echo", "mirostat")],
        *[({name: False}, name) for name in ("skip_special_tokens", "spaces_between_special_tokens")],
        ({"verbosity": "low"}, "verbosity"),
        ({"modalities": ["text", "audio"]}, "modalities"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused(chatml: Engine, fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        encode_chat(chatml, chat(**fields) if "messages" not in fields else chat(*fields["messages"]))
    assert (caught.value.status, caught.value.param) == (400, param)


def test_what_changes_nothing_is_taken(chatml: Engine) -> None:
    plain = prompt_of(chatml)
    harmless = {name: value for name, values in (NOT_DONE | NOT_DONE_IN_CHAT).items() for value in values[:1]}
    assert prompt_of(chatml, **harmless, user="u", store=True, metadata={"a": "b"}, parallel_tool_calls=False) == plain
    nothing = dict.fromkeys([*ChatRequest.model_fields, *NOT_DONE, *NOT_DONE_IN_CHAT])
    assert prompt_of(chatml, **{**nothing, "messages": [HI]}) == plain
    assert chat(length_penalty=1.0, min_tokens=0.0, mirostat=0).asked is None
    assert completion(**dict.fromkeys(set(CompletionRequest.model_fields) - {"prompt"})).asked is None


def test_a_model_without_a_template(engine_of: Callable[..., Engine]) -> None:
    engine = engine_of()
    assert prompt_of(engine, HI, {"role": "assistant", "content": "so"}, tools=[TOOL], tool_choice="none") == "hi\n\nso"
    for name, value in (("tools", [TOOL]), ("chat_template_kwargs", {"enable_thinking": False})):
        with pytest.raises(ApiError, match="no chat template") as caught:
            prompt_of(engine, **{name: value})
        assert caught.value.param == name


def test_faults_of_the_model_s_files_are_sentences(
    engine_of: Callable[..., Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = engine_of(CHATML, model_max_length="x")
    for make in (lambda: encode_chat(engine, chat()), lambda: encode_completion(engine, completion())):
        with pytest.raises(ApiError, match=r"the tokenizer in \S+ cannot encode this text: TypeError") as caught:
            make()
        assert caught.value.status == 400
    monkeypatch.setattr(template_process, "SECONDS", 0.3)
    forever = engine_of("{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3)
    with pytest.raises(ApiError, match="did not end within") as caught:
        encode_chat(forever, chat())
    assert (caught.value.status, caught.value.code) == (400, "chat_template")
    forever.templates.close()
    with pytest.raises(ApiError, match="the server is stopping") as caught:
        encode_chat(forever, chat())
    assert caught.value.status == 503


def test_a_template_that_makes_too_much(engine_of: Callable[..., Engine]) -> None:
    with pytest.raises(ApiError, match="more than 32767 tokens, and the plan makes room for 300") as caught:
        encode_chat(engine_of("{{ 'ab' * 99999 }}"), chat())
    assert caught.value.code == "context_length_exceeded"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=4), inner, max_size=2),
    max_leaves=6,
)
NAMES = ("role", "content", "tool_calls", "name", "reasoning_content", "function_call", "tool_call_id")
ROLES = st.sampled_from(["system", "developer", "user", "assistant", "tool", "function"])
CALLS = st.lists(
    st.fixed_dictionaries({"function": st.fixed_dictionaries({}, optional={"arguments": JSON, "name": JSON})})
)
ANY = st.dictionaries(st.sampled_from(NAMES), JSON, max_size=4)
LIKELY = st.fixed_dictionaries({"role": ROLES, "content": JSON}, optional={"tool_calls": CALLS | JSON})


@settings(deadline=None, derandomize=True, max_examples=100)
@given(
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(LIKELY | ANY, min_size=1, max_size=3),
    st.dictionaries(st.sampled_from(["tools", "chat_template_kwargs", "tool_choice"]), JSON, max_size=1),
)
def test_any_messages_are_a_prompt_or_refused(
    engines: dict[str, Engine], name: str, messages: list[Any], fields: dict[str, Any]
) -> None:
    try:
        ids = encode_chat(engines[name], chat(*messages, **fields))
    except ApiError as error:
        assert error.status == 400
    else:
        assert all(type(token) is int for token in ids)


@pytest.fixture(scope="module")
def engines(engine_of: Callable[..., Engine]) -> dict[str, Engine]:
    shared = TemplateProcess()
    made = {name: engine_of(template) for name, template in TEMPLATES.items()}
    for engine in made.values():
        engine.templates = shared
    return made


# -- numbers -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "most"),
    [
        ({}, None),
        ({"max_tokens": None}, None),
        ({"max_tokens": -1}, None),
        ({"max_tokens": 0}, None),
        ({"max_tokens": 20.0}, 20),
        ({"max_tokens": 32000}, 32000),
        ({"max_tokens": 7, "max_completion_tokens": 5}, 5),
        ({"max_completion_tokens": -1, "max_tokens": 5}, None),
    ],
)
def test_how_long_an_answer_may_be(chatml: Engine, fields: dict[str, Any], most: int | None) -> None:
    assert chat(**fields).asked == most
    assert room_for(chatml, [5] * 200, most, "messages") == min(100, most or 100)


def test_how_long_a_completion_may_be() -> None:
    assert completion().asked == 16 and completion(max_tokens=None).asked is None
    assert completion(max_tokens=-1).asked is None and completion(max_tokens=3.0).asked == 3
    with pytest.raises(ApiError, match="max_tokens is 0, expected at least 1"):
        completion(max_tokens=0)


@pytest.mark.parametrize(
    ("fields", "sampling"),
    [
        ({}, Sampling()),
        ({"temperature": 0}, Sampling(temperature=0)),
        ({"temperature": 1, "top_p": 1, "min_p": 0}, Sampling()),
        ({"top_k": -1}, Sampling()),
        ({"top_k": 40.0, "seed": 7.0}, Sampling(top_k=40, seed=7)),
        ({"top_k": 10**9}, Sampling(top_k=10**9)),
        ({"seed": -1}, Sampling(seed=2**64 - 1)),
        ({"presence_penalty": 1, "frequency_penalty": -2}, Sampling(presence_penalty=1, frequency_penalty=-2)),
        ({"logit_bias": {"5": 1}}, Sampling(logit_bias={5: 1.0})),
    ],
)
def test_numbers_may_be_written_either_way(fields: dict[str, Any], sampling: Sampling) -> None:
    for request in (chat(**fields), completion(**fields)):
        assert request.sampling(300, NONE) == sampling
    for name in fields:
        assert parse(ChatRequest, json.dumps({"messages": [HI], name: None}).encode()).sampling(300, NONE) == Sampling()


def test_flags_of_probabilities() -> None:
    assert chat(logprobs=False, top_logprobs=0).top is None and chat(logprobs=True, top_logprobs=2.0).top == 2
    assert completion(logprobs=False).top is None and completion(logprobs=0).top == 0
    assert chat(n=1.0, stop=[str(i) for i in range(256)]).stops()[-1] == "255"


# -- stopping ------------------------------------------------------------------------------------------------


def test_a_stop_ends_a_rendering(
    store: Path, open_model: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_process, "SECONDS", 600.0)
    forever = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    tokenizer = load_tokenizer(write_tokenizer(tmp_path, forever))
    with ThreadPoolExecutor(1) as pool:
        with serving(lambda: (open_model(store), tokenizer)) as server:
            answer = pool.submit(server.post, "/v1/chat/completions", {"messages": [HI]})
            until(server.engine.templates._lock.locked)
            assert server.get("/health").status_code == 200
        assert answer.result().status_code == 503
    assert server.engine.templates.closed and server.engine.templates._worker is None


@pytest.mark.parametrize(
    ("field", "message"),
    [
        (r'"user": "\ud800"', r"(line 1 column 65): an escape such as \ud800 is half of a character; send both"),
        (r'"user": "\ud800\u0041"', r"an escape such as \ud800 is half of a character; send both"),
        ('"user": "\xff"', "it has bytes that are not UTF-8 text."),
        ('"user": ', "the body is not valid JSON (line 1 column 58): expected value."),
        ('"temperature": NaN', "temperature: Input should be a finite number."),
        ('"top_p": 1e999', "top_p: Input should be a finite number."),
        ('"presence_penalty": -Infinity', "presence_penalty: Input should be a finite number."),
        ('"max_tokens": NaN', "max_tokens: Input should be a valid integer."),
    ],
)
def test_what_is_not_quite_json(field: str, message: str) -> None:
    body = f'{{"messages": [{{"role": "user", "content": "a"}}], {field}}}'
    with pytest.raises(ApiError) as caught:
        parse(ChatRequest, body.encode("latin-1"))
    assert message in caught.value.message and caught.value.status == 400, caught.value.message
