"""Runs a client's cases, and prints as JSON what came out of each, or its error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

URL = sys.argv[1] if len(sys.argv) > 1 else ""
QUESTION = "How is it in Paris?"
ASKED = "Say it as JSON."
RESULT = "22 degrees"
PARAMETERS: dict[str, Any] = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Tells the weather.", "parameters": PARAMETERS},
}


def messages_of(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def run(cases: dict[str, Callable[[], Any]]) -> None:
    found = {}
    for name, case in cases.items():
        try:
            found[name] = case()
        except Exception as error:
            found[name] = {"error": f"{type(error).__name__}: {error}"}
    print("\n" + json.dumps(found))  # on a line of its own, whatever the client has printed
