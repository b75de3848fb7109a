"""pydantic-ai."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any, Literal

import openai
import pytest
from other_clients import QUESTION, RESULT, scripted_server  # type: ignore[import-not-found]
from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput, PromptedOutput, ToolOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    degrees: int


@pytest.fixture(scope="module")
def run() -> Iterator[Callable[..., Any]]:
    """Runs a coroutine. The client keeps its connections open, so all of them share one event loop."""
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture(scope="module", params=["chat", "responses"])
def model(
    request: pytest.FixtureRequest, run: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    with scripted_server(tmp_path_factory.mktemp("scripted")) as (_, server):
        client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        provider = OpenAIProvider(openai_client=client)
        yield {"chat": OpenAIChatModel, "responses": OpenAIResponsesModel}[request.param]("demo", provider=provider)
        run(client.close())


def test_a_loop_with_a_tool(model: Any, run: Callable[..., Any]) -> None:
    agent = Agent(model)
    cities = []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        cities.append(city)
        return str(RESULT)

    result = run(agent.run(QUESTION))
    assert result.output == "It is sunny." and cities == ["Paris"]
    (thoughts,) = [part for part in result.all_messages()[1].parts if part.part_kind == "thinking"]
    # As of responses, pydantic-ai takes summaries for the text. What was thought is beside it.
    assert "I should look." in (thoughts.content, *(thoughts.provider_details or {}).get("raw_content", ()))
    assert result.usage.requests == 2


def test_a_stream(model: Any, run: Callable[..., Any]) -> None:
    async def stream() -> list[str]:
        async with Agent(model).run_stream(QUESTION) as result:
            return [text async for text in result.stream_text(delta=True, debounce_by=None)]

    assert "".join(run(stream())) == "Hello, you."


@pytest.mark.parametrize("form", [ToolOutput, NativeOutput, PromptedOutput])
def test_output_of_a_type(model: Any, run: Callable[..., Any], form: Any) -> None:
    agent = Agent(model, output_type=Weather if form is ToolOutput else form(Weather))
    assert run(agent.run("Say it as JSON.")).output == Weather(city="Rome", degrees=21)
