"""What the tests of other people's clients share: a server with a scripted model, and their programs in Node.js."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from scripted import Scripted, make_scripted  # type: ignore[import-not-found]  # found beside this file
from serving import Server, serving  # type: ignore[import-not-found]

CLIENTS = Path(__file__).with_name("clients")
NODE = shutil.which("node")
TIME_LIMIT_S = 300  # of one program; none needs a tenth of it on a quiet machine

QUESTION = "How is it in Paris?"
DESCRIPTION = "Tells the weather."
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
WEATHER: Any = {
    "type": "function",
    "function": {"name": "get_weather", "description": DESCRIPTION, "parameters": PARAMETERS},
}
RESULT = "22 degrees"  # what the tool says
THOUGHT = "<think>\nI should look.\n</think>\n\n"
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris"}}\n</tool_call>'


def script(prompt: str) -> str:
    """Calls the tool if there is one, and answers once it has its result."""
    if RESULT in prompt:
        return f"{THOUGHT}It is sunny."
    if '"name": "get_weather"' in prompt:
        return f"{THOUGHT}One moment.\n{CALL}"
    return f"{THOUGHT}Hello, you."


@contextmanager
def scripted_server(folder: Path, **options: Any) -> Iterator[tuple[Scripted, Server]]:
    """options: those of make_scripted, and the context."""
    with pytest.MonkeyPatch.context() as patch:
        context = options.pop("context", 8192)
        scripted = Scripted(make_scripted(folder, **options), patch, context)
        scripted.script = script
        with serving(scripted.load) as server:
            yield scripted, server


def run_node(program: Path, *arguments: str, **environment: str) -> Mapping[str, Any]:
    """What the program prints, as JSON: its cases, each with what came out of it or with its error."""
    assert NODE is not None
    done = subprocess.run(
        [NODE, str(program), *arguments],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    found: Mapping[str, Any] = json.loads(done.stdout)
    return found
