"""litellm, as a client of each API that it speaks."""

from __future__ import annotations

import json
import os
from functools import partial
from typing import Any, Literal

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it downloads a list

import litellm
from cases import ASKED, QUESTION, RESULT, URL, WEATHER, messages_of, run  # type: ignore[import-not-found]
from pydantic import BaseModel

APIS = {
    "chat": {"model": "openai/demo", "api_base": f"{URL}/v1", "api_key": "none"},
    "anthropic": {"model": "anthropic/demo", "api_base": URL, "api_key": "none"},
    "ollama": {"model": "ollama_chat/demo", "api_base": URL},
}


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    degrees: int


def chat(api: str) -> Any:
    message = litellm.completion(messages=messages_of("Hello?"), **APIS[api]).choices[0].message
    return [message.content, message.reasoning_content]


def stream(api: str) -> Any:
    text = thoughts = ""
    for chunk in litellm.completion(messages=messages_of("Hello?"), stream=True, **APIS[api]):
        delta = chunk.choices[0].delta
        text += delta.content or ""
        thoughts += getattr(delta, "reasoning_content", None) or ""
    return [text, thoughts]


def loop(api: str) -> Any:
    messages = messages_of(QUESTION)
    message = litellm.completion(messages=messages, tools=[WEATHER], **APIS[api]).choices[0].message
    (call,) = message.tool_calls
    messages += [message, {"role": "tool", "tool_call_id": call.id, "name": call.function.name, "content": RESULT}]
    answer = litellm.completion(messages=messages, tools=[WEATHER], **APIS[api]).choices[0].message
    return [call.function.name, json.loads(call.function.arguments), answer.content]


def streamed_call(api: str) -> Any:
    chunks = list(litellm.completion(messages=messages_of(QUESTION), tools=[WEATHER], stream=True, **APIS[api]))
    built: Any = litellm.stream_chunk_builder(chunks)
    (call,) = built.choices[0].message.tool_calls
    return [call.function.name, json.loads(call.function.arguments), built.choices[0].finish_reason]


def schema(api: str) -> Any:
    answer = litellm.completion(messages=messages_of(ASKED), response_format=Weather, **APIS[api])
    return json.loads(answer.choices[0].message.content)


def responses() -> Any:
    answer: Any = litellm.responses(input=QUESTION, **APIS["chat"])
    return [part.text for item in answer.output if item.type == "message" for part in item.content]


forms = (chat, stream, loop, streamed_call, schema)
run(
    {
        **{f"{form.__name__}, {api}": partial(form, api) for api in APIS for form in forms},
        "responses": responses,
    }
)
