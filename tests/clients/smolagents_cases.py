"""smolagents: an agent that calls a tool, then the tool that ends its work."""

from __future__ import annotations

from typing import Any

from cases import QUESTION, RESULT, URL, run  # type: ignore[import-not-found]  # found beside this file
from smolagents import OpenAIModel, ToolCallingAgent, tool


@tool
def get_weather(city: str) -> str:
    """Tells the weather.

    Args:
        city: The city.
    """
    return str(RESULT)


def agent(stream: bool) -> Any:
    model = OpenAIModel(model_id="demo", api_base=f"{URL}/v1", api_key="none")
    agent = ToolCallingAgent(tools=[get_weather], model=model, verbosity_level=0, max_steps=3, stream_outputs=stream)
    return agent.run(QUESTION)


run({"agent": lambda: agent(False), "stream": lambda: agent(True)})
