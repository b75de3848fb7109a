"""The server through OpenAI's own client."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import mlx.core as mx
import numpy as np
import openai
import pytest
from mlx_lm.models.cache import make_prompt_cache
from serving import Server, serving  # type: ignore[import-not-found]  # found beside this file

import mlx_flash
from mlx_flash.text.prompt_cache import LEAST_REUSED

PROMPT = "It was a dark night, and"


@pytest.fixture(scope="module")
def server(load_speaker: Callable[[], Any]) -> Iterator[Server]:
    with serving(load_speaker) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def texts(load_speaker: Callable[[], Any]) -> dict[str, Any]:
    """The text that `generate` makes from the prompt, and its form as a continuation of the prompt's text."""
    model, tokenizer = load_speaker()
    responses = list(mlx_flash.stream_generate(model, tokenizer, PROMPT, max_tokens=40))
    ids = tokenizer.encode(PROMPT)
    whole = tokenizer.decode(ids + [r.token for r in responses])
    model.flash.close()
    return {
        "text": "".join(r.text for r in responses),
        "continued": whole.removeprefix(tokenizer.decode(ids)),
        "prompt": ids,
        "prompt_text": tokenizer.decode(ids),
        "first": responses[0].logprobs,
    }


def say(text: str = PROMPT, role: str = "user") -> list[Any]:
    return [{"role": role, "content": text}]


def streamed(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_the_text_is_generates(client: openai.OpenAI, texts: dict[str, Any]) -> None:
    prompts = (PROMPT, [PROMPT], texts["prompt"], [texts["prompt"]])
    for prompt in prompts:
        done = client.completions.create(model="demo", prompt=prompt, max_tokens=40, temperature=0)
        assert done.choices[0].text == texts["continued"] == " " + texts["text"]
        assert done.choices[0].finish_reason == "length" and done.usage is not None
        assert done.usage.prompt_tokens == len(texts["prompt"]) and done.usage.completion_tokens == 40
    chat = client.chat.completions.create(model="default", messages=say(), max_completion_tokens=40, temperature=0)
    assert chat.choices[0].message.content == texts["text"] and chat.model == "demo"  # the model has no template
    assert chat.choices[0].message.role == "assistant" and chat.object == "chat.completion"


def test_a_stream_says_the_same(client: openai.OpenAI, texts: dict[str, Any]) -> None:
    create = client.chat.completions.create
    options: dict[str, Any] = {"stream_options": {"include_usage": True}, "max_tokens": 40, "temperature": 0}
    chunks = list(create(model="demo", messages=say(), stream=True, **options))
    assert streamed(chunks) == texts["text"] and len(chunks) > 30
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == "length" and set(reasons[:-1]) == {None}
    assert [chunk.usage is not None for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert chunks[-1].usage.total_tokens == len(texts["prompt"]) + 40 and chunks[-1].choices == []
    plain = list(client.completions.create(model="demo", prompt=PROMPT, stream=True, max_tokens=40, temperature=0))
    assert "".join(chunk.choices[0].text for chunk in plain) == texts["continued"] and plain[-1].usage is None


def test_stop_words_are_never_shown(client: openai.OpenAI, texts: dict[str, Any]) -> None:
    text = texts["text"]
    for stop in (text[20:31], [text[25:34], "nowhere at all"], [text[10:12], text[8:30]]):
        words = [stop] if isinstance(stop, str) else stop
        expected = text[: min((text.find(word) + len(word), text.find(word)) for word in words if word in text)[1]]
        options: dict[str, Any] = {"max_tokens": 40, "temperature": 0, "stop": stop, "model": "demo"}
        done = client.completions.create(prompt=PROMPT, **options)
        assert done.choices[0].text == f" {expected}" and done.choices[0].finish_reason == "stop"
        chunks = list(client.chat.completions.create(messages=say(), stream=True, **options))
        assert streamed(chunks) == expected and chunks[-1].choices[0].finish_reason == "stop"
    held = client.completions.create(
        model="demo", prompt=PROMPT, max_tokens=40, temperature=0, stop=text[-3:] + "and so on"
    )
    assert held.choices[0].text == texts["continued"]  # the text was only held back


def test_seeds(client: openai.OpenAI) -> None:
    def one(seed: int | None) -> str:
        options: dict[str, Any] = {"max_tokens": 30, "temperature": 0.9, "top_p": 0.95, "seed": seed}
        done = client.chat.completions.create(model="demo", messages=say("The old house stood"), **options)
        return str(done.choices[0].message.content)

    seeded = one(7)
    assert one(7) == seeded and one(8) != seeded and one(-1) == one(2**64 - 1)
    assert one(None) != one(None)  # a seed applies to one request


def test_the_next_turn_goes_on_where_the_last_one_ended(client: openai.OpenAI) -> None:
    story = (
        "The captain looked at the sea for a long time, and then he turned to his men and said that there was no hope"
    )
    messages = say(story)
    first = client.chat.completions.create(model="demo", messages=messages, max_tokens=20, temperature=0)
    answer = first.choices[0].message.content
    messages += [*say(str(answer), "assistant"), *say("But the oldest of them")]
    options: dict[str, Any] = {"model": "demo", "messages": messages, "max_tokens": 10, "temperature": 0}
    second = client.chat.completions.create(**options)
    assert first.usage is not None and second.usage is not None and second.usage.prompt_tokens_details is not None
    cached = second.usage.prompt_tokens_details.cached_tokens
    assert cached is not None and first.usage.prompt_tokens <= cached < second.usage.prompt_tokens
    again = client.chat.completions.create(**options)  # reuses the prompt; the decoded tokens are cut off
    assert again.usage is not None and again.usage.prompt_tokens_details is not None
    assert again.usage.prompt_tokens_details.cached_tokens == second.usage.prompt_tokens - 1
    assert again.choices[0].message.content == second.choices[0].message.content
    fresh = client.chat.completions.create(**options, seed=1)  # a seed makes the server read the prompt again
    assert fresh.usage is not None and fresh.usage.prompt_tokens_details is not None
    assert fresh.usage.prompt_tokens_details.cached_tokens == 0


def test_what_is_in_common_must_be_worth_it(client: openai.OpenAI) -> None:
    """A prompt's first tokens are read in the chunks of a whole prompt, because others may change the last bits."""

    def cached(ids: list[int]) -> int | None:
        done = client.completions.create(model="demo", prompt=ids, max_tokens=1, temperature=0)
        assert done.usage is not None and done.usage.prompt_tokens_details is not None
        return done.usage.prompt_tokens_details.cached_tokens

    first = list(range(200, 240))
    assert cached(first) == 0
    assert cached([*first[:39], 9, 9]) == 0, "the contexts part within the first chunk"
    assert cached([*first, 8, 8]) == len(first)
    few = list(range(300, 300 + LEAST_REUSED))
    assert cached(few[:-1]) == 0 and cached([*few[:-1], 9, 9]) == 0
    assert cached([*few, 8]) == 0 and cached([*few, 8, 7]) == LEAST_REUSED + 1


def test_probabilities(client: openai.OpenAI, texts: dict[str, Any]) -> None:
    options: dict[str, Any] = {"model": "demo", "max_tokens": 12, "temperature": 0}
    chat = client.chat.completions.create(messages=say(), logprobs=True, top_logprobs=3, **options)
    entries = chat.choices[0].logprobs.content  # type: ignore[union-attr]
    assert entries is not None and "".join(entry.token for entry in entries).strip() == chat.choices[0].message.content
    assert entries[0].logprob == pytest.approx(texts["first"].max().item(), abs=1e-3)
    for entry in entries:
        assert len(entry.top_logprobs) == 3 and entry.top_logprobs[0].token == entry.token  # greedy
        assert sum(math.exp(each.logprob) for each in entry.top_logprobs) <= 1
    plain = client.completions.create(prompt=PROMPT, logprobs=2, **options)
    logprobs = plain.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs == [entry.logprob for entry in entries]
    assert logprobs.text_offset is not None and len(logprobs.text_offset) == 12
    text = plain.choices[0].text
    stopped = client.chat.completions.create(messages=say(), logprobs=True, stop=[text[12:16]], **options)
    shown = stopped.choices[0].logprobs.content  # type: ignore[union-attr]
    assert shown is not None and [entry.token for entry in shown] == [entry.token for entry in entries][: len(shown)]
    assert 0 < len(shown) < 12


def test_logit_bias_and_penalties(client: openai.OpenAI, texts: dict[str, Any]) -> None:
    options: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    likeliest = int(texts["first"].argmax().item())
    assert client.completions.create(**options, logit_bias={"100": 100}).usage is not None
    banned = client.completions.create(**options, logit_bias={str(likeliest): -100})
    assert banned.choices[0].text != client.completions.create(**options).choices[0].text
    options["max_tokens"] = 40
    plain = client.completions.create(**options).choices[0].text
    assert client.completions.create(**options, frequency_penalty=2, presence_penalty=2).choices[0].text != plain


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").id == client.models.retrieve("default").id == "demo"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"n": 5}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"stop": ["a"] * 257}, "stop"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"logit_bias": {"word": 1}}, "logit_bias"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"response_format": {"type": "json"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"verbosity": "low"}, "verbosity"),
        ({"extra_body": {"chat_template_kwargs": {"x": 1}}}, "chat_template_kwargs"),
        ({"extra_body": {"min_tokens": 5}}, "min_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, "messages"),
    ],
)
def test_what_is_refused_names_its_parameter(client: openai.OpenAI, wrong: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "demo", "messages": say(), "max_tokens": 1, **wrong})
    assert caught.value.param == param and caught.value.status_code == 400


def test_every_name_stands_for_the_loaded_model(client: openai.OpenAI) -> None:
    for name in ("gpt-5", "claude-sonnet-4"):
        assert client.chat.completions.create(model=name, messages=say(), max_tokens=1).model == "demo"


def test_a_prompt_that_exceeds_the_context_is_refused_with_the_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="demo", prompt=[5] * 512, max_tokens=1)
    assert caught.value.code == "context_length_exceeded"
    for part in (
        "512 tokens",
        "needs at least 1",
        "the plan makes room for 512",
        "Shorten it: this model takes no more.",
    ):
        assert part in caught.value.message


@pytest.mark.parametrize("most", [12, 13, 32000, -1, 2**53])
def test_an_answer_is_as_long_as_fits(client: openai.OpenAI, most: int) -> None:
    full = client.completions.create(model="demo", prompt=[5] * 500, max_tokens=most, temperature=0)
    assert full.usage is not None and full.usage.total_tokens == 512 and full.choices[0].finish_reason == "length"


@pytest.mark.parametrize("settings", [{"temperature": 1e-8}, {"temperature": 1e-4}, {"temperature": 2, "top_p": 0}])
def test_hardly_any_chance_is_none(client: openai.OpenAI, settings: dict[str, float]) -> None:
    def text(**settings: float) -> str:
        done: Any = client.completions.create(model="demo", prompt=PROMPT, max_tokens=40, **settings)  # type: ignore[call-overload]
        return str(done.choices[0].text)

    assert text(**settings) == text(temperature=0)


def test_without_a_limit_a_chat_fills_the_context(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="demo", messages=say("a " * 480))
    assert (done.usage is not None and done.usage.total_tokens == 512) or done.choices[0].finish_reason == "stop"


def test_other_settings_are_taken(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(
        model="demo",
        messages=[
            {"role": "developer", "content": "A tale."},
            {"role": "user", "content": [{"type": "text", "text": "He"}]},
        ],
        max_tokens=3,
        user="somebody",
        extra_body={"top_k": 4096, "min_p": 0.05, "repetition_penalty": 1.1, "unknown": [1]},
    )
    assert done.usage is not None and done.usage.completion_tokens == 3


def test_echo(client: openai.OpenAI, texts: dict[str, Any], load_speaker: Callable[[], Any]) -> None:
    """As lm-eval asks for the likelihood of a text."""
    options: dict[str, Any] = {"model": "demo", "temperature": 0, "echo": True}
    model, tokenizer = load_speaker()
    text, ids = texts["prompt_text"], texts["prompt"]
    logits = model(mx.array(ids)[None], cache=make_prompt_cache(model))[0].astype(mx.float32)
    expected = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    chosen = [float(expected[place, token].item()) for place, token in enumerate(ids[1:])]
    model.flash.close()
    for tokens in (0, 1, 5):
        done = client.completions.create(prompt=ids, max_tokens=tokens, logprobs=2, **options).choices[0]
        probabilities = done.logprobs
        assert done.text.startswith(text) and done.finish_reason == "length" and probabilities is not None
        assert len(probabilities.tokens) == len(ids) + tokens and "".join(probabilities.tokens) == done.text
        assert probabilities.token_logprobs[0] is None and probabilities.top_logprobs[0] is None
        assert np.allclose(probabilities.token_logprobs[1 : len(ids)], chosen, atol=1e-4)
        lengths = [len(token) for token in probabilities.tokens]
        assert probabilities.text_offset == [sum(lengths[:place]) for place in range(len(lengths))]
        likeliest = int(np.argmax(np.array(expected[0])))
        assert tokenizer.decode([likeliest]) in "".join(probabilities.top_logprobs[1])
    plain = client.completions.create(prompt=[texts["prompt"], ids[:3]], max_tokens=4, **options)
    assert plain.choices[0].text == text + texts["continued"][: len(plain.choices[0].text) - len(text)]
    assert plain.choices[1].logprobs is None and plain.choices[1].text.startswith(tokenizer.decode(ids[:3]))
    chunks = list(client.completions.create(prompt=ids, max_tokens=3, stream=True, **options))
    assert "".join(chunk.choices[0].text for chunk in chunks).startswith(text)
    with pytest.raises(openai.BadRequestError, match="Only an echo may have 0"):
        client.completions.create(model="demo", prompt="a", max_tokens=0)


def test_a_forced_call_of_a_model_without_tools_names_the_tools(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "function": {"name": "f"}}
    with pytest.raises(openai.BadRequestError, match="has no chat template") as caught:
        client.chat.completions.create(model="demo", messages=say(), tools=[tool], tool_choice="required")
    assert caught.value.param == "tools"
