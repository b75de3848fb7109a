"""instructor: a type's fields, in each of its modes."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, Literal

import instructor
from cases import ASKED, URL, messages_of, run  # type: ignore[import-not-found]  # found beside this file
from openai import OpenAI
from pydantic import BaseModel

MODES = ("TOOLS", "TOOLS_STRICT", "PARALLEL_TOOLS", "JSON", "JSON_SCHEMA", "MD_JSON", "RESPONSES_TOOLS")


class Weather(BaseModel):
    city: Literal["Paris", "Rome"]
    degrees: int


def ask(mode: str) -> Any:
    client = instructor.from_openai(OpenAI(base_url=f"{URL}/v1", api_key="none"), mode=instructor.Mode[mode])
    wanted: Any = Iterable[Weather] if mode == "PARALLEL_TOOLS" else Weather
    found: Any = client.create(model="demo", messages=messages_of(ASKED), response_model=wanted, max_retries=0)
    return (next(iter(found)) if mode == "PARALLEL_TOOLS" else found).model_dump()


def stream() -> Any:
    client = instructor.from_openai(OpenAI(base_url=f"{URL}/v1", api_key="none"), mode=instructor.Mode.TOOLS)
    parts = list(client.create_partial(model="demo", messages=messages_of(ASKED), response_model=Weather))
    return parts[-1].model_dump()


run({**{mode: partial(ask, mode) for mode in MODES}, "stream": stream})
