"""llama-index, with its model for servers that speak OpenAI's API."""

from __future__ import annotations

from typing import Any, Literal

from cases import ASKED, QUESTION, RESULT, URL, run  # type: ignore[import-not-found]  # found beside this file
from llama_index.core.llms import ChatMessage
from llama_index.core.prompts import PromptTemplate
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel


class Weather(BaseModel):
    """How the weather is."""

    city: Literal["Paris", "Rome"]
    degrees: int


def model(**options: Any) -> OpenAILike:
    return OpenAILike(
        model="demo",
        api_base=f"{URL}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=8192,
        **options,
    )


def get_weather(city: str) -> str:
    """Tells the weather."""
    return str(RESULT)


def loop() -> Any:
    tool = FunctionTool.from_defaults(get_weather)
    answer = model().predict_and_call([tool], user_msg=QUESTION)
    return str(answer)


run(
    {
        "chat": lambda: model().chat([ChatMessage("Hello?")]).message.content,
        "stream": lambda: "".join(part.delta or "" for part in model().stream_chat([ChatMessage("Hello?")])),
        "call": loop,
        "typed, by a call": lambda: model().structured_predict(Weather, PromptTemplate(ASKED)).model_dump(),
        "typed, by a schema": lambda: (
            model(should_use_structured_outputs=True).structured_predict(Weather, PromptTemplate(ASKED)).model_dump()
        ),
    }
)
