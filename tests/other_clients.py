"""What the tests of other people's clients share: a server with a scripted model, and their programs in Node.js."""

from __future__ import annotations

import json
import os
import re
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
INSTALLED = Path(os.environ.get("MLX_FLASH_CLIENTS") or CLIENTS / ".env").absolute()  # by clients/setup.sh
NODE = shutil.which("node")
TIME_LIMIT_S = 300  # of one program; none needs a tenth of it on a quiet machine
NOWHERE = "http://127.0.0.1:9"  # Nothing listens there.

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
ARGUMENTS = '{"city": "Rome", "degrees": 21}'  # what it says when it is asked for JSON
THOUGHT = "<think>\nI should look.\n</think>\n\n"


def script(prompt: str) -> str:
    """What the model says to this prompt.

    Asked for JSON, it says ARGUMENTS: as the call of the tool that takes `degrees`, if there is one, else as its text.
    Otherwise it calls the tool if there is one, and answers once it has the result.
    """
    if "as JSON" in prompt:
        before, degrees, _ = prompt.partition('"degrees"')
        names = re.findall(r'"name": "(\w+)"', before) if degrees else []
        return THOUGHT + (call_of(names[-1], ARGUMENTS) if names else ARGUMENTS)
    forced = "As you like." in prompt or '"name": "final_answer"' in prompt  # The latter is smolagents'.
    if RESULT in prompt:
        return THOUGHT + (call_of("final_answer", {"answer": "It is sunny."}) if forced else "It is sunny.")
    if '"name": "get_weather"' in prompt:
        # An answer that must be a call has no text before it.
        return THOUGHT + ("" if forced else "One moment.\n") + call_of("get_weather", {"city": "Paris"})
    return f"{THOUGHT}Hello, you."


def call_of(name: str, arguments: Any) -> str:
    text = arguments if isinstance(arguments, str) else json.dumps(arguments)
    return f'<tool_call>\n{{"name": "{name}", "arguments": {text}}}\n</tool_call>'


@contextmanager
def scripted_server(folder: Path, **options: Any) -> Iterator[tuple[Scripted, Server]]:
    """options: those of make_scripted, and the context."""
    with pytest.MonkeyPatch.context() as patch:
        context = options.pop("context", 8192)
        scripted = Scripted(make_scripted(folder, **options), patch, context)
        scripted.script = script
        with serving(scripted.load) as server:
            yield scripted, server


def environment_in(home: Path) -> dict[str, str]:
    """The environment of a program whose files all lie in this folder, without keys, and without a way to the net."""
    folders = {f"XDG_{name}_HOME": str(home / name.lower()) for name in ("CONFIG", "DATA", "CACHE", "STATE")}
    return {"PATH": os.environ["PATH"], "HOME": str(home), "LANG": "C.UTF-8", "HTTPS_PROXY": NOWHERE, **folders}


def run_cases(*command: str | Path, environment: Mapping[str, str] | None = None) -> Mapping[str, Any]:
    """What a program prints as JSON: its cases, each with what came out of it or with its error."""
    done = subprocess.run(
        [str(part) for part in command],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
    )
    assert done.returncode == 0, done.stderr
    found: Mapping[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
