"""python -m mlx_flash.launch: starts a coding agent that uses a model of this machine, and the server if none runs."""

from __future__ import annotations

import argparse
import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .cli.model_arguments import add_model_arguments, model_flags
from .cli.run import program, run_command, whole_number
from .cli.terminal import say
from .defaults import KEY_VARIABLE
from .errors import FlashError
from .source.children import child_environment

NO_KEY = "none"  # for programs that refuse to start without one
TIME_LIMIT_MS = 3_600_000  # for an answer; a model on an SSD may read a long prompt for minutes
AGENT_TOKENS = 16_384  # An agent's first prompt has 6,000 to 20,000 tokens.
ANSWER_S = 10.0  # time for a server to say how it is, and for the name of its model
KEPT_LINES = 40  # lines of the server's standard error that are kept


@dataclass(frozen=True)
class Agent:
    """A program that can be launched.

    install: the command that installs it. arguments, environment: made from (base URL, model name, key, context), for
    this run only. without: variables that would lead it elsewhere.
    """

    install: str
    arguments: Callable[[str, str, str, int], list[str]]
    environment: Callable[[str, str, str, int], dict[str, str]]
    without: tuple[str, ...] = ()


def _claude_environment(url: str, model: str, key: str, _context: int) -> dict[str, str]:
    names = ("MODEL", "DEFAULT_OPUS_MODEL", "DEFAULT_SONNET_MODEL", "DEFAULT_HAIKU_MODEL", "SMALL_FAST_MODEL")
    return {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_AUTH_TOKEN": key,
        **{f"ANTHROPIC_{name}": model for name in names},
        "API_TIMEOUT_MS": str(TIME_LIMIT_MS),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }


def _codex_arguments(url: str, model: str, _key: str, context: int) -> list[str]:
    provider = "model_providers.mlx_flash"
    settings = {
        "model": model,
        "model_provider": "mlx_flash",
        "model_context_window": context,
        f"{provider}.name": "mlx_flash",
        f"{provider}.base_url": f"{url}/v1",
        f"{provider}.env_key": KEY_VARIABLE,
        f"{provider}.wire_api": "responses",
        f"{provider}.stream_idle_timeout_ms": TIME_LIMIT_MS,
    }
    # JSON's texts and numbers are TOML's as well, apart from escapes of half a character.
    values = {name: json.dumps(value, ensure_ascii=False) for name, value in settings.items()}
    return [part for name, value in values.items() for part in ("-c", f"{name}={value}")]


def _opencode_environment(url: str, model: str, key: str, context: int) -> dict[str, str]:
    limits = {"context": context, "output": max(1, context // 4)}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "mlx_flash",
        "options": {"baseURL": f"{url}/v1", "apiKey": key, "timeout": TIME_LIMIT_MS},
        "models": {model: {"name": model, "tool_call": True, "limit": limits}},
    }
    name = f"mlx_flash/{model}"
    content = {"provider": {"mlx_flash": provider}, "model": name, "small_model": name}
    return {"OPENCODE_CONFIG_CONTENT": json.dumps(content)}


AGENTS = {
    "claude": Agent(
        "npm install -g @anthropic-ai/claude-code",
        lambda *_: [],
        _claude_environment,
        ("ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK", "CLAUDE_CODE_USE_VERTEX", "CLAUDE_CODE_USE_FOUNDRY"),
    ),
    "codex": Agent("npm install -g @openai/codex", _codex_arguments, lambda *given: {KEY_VARIABLE: given[2]}),
    "opencode": Agent("npm install -g opencode-ai", lambda *_: [], _opencode_environment),
}


class _Parser(argparse.ArgumentParser):
    """Leaves what follows `--` to the agent."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        parsed = super().parse_args(given[:end], namespace)
        parsed.rest = given[end + 1 :]
        return parsed


def make_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog=program("launch"),
        description="Starts a coding agent that uses a model of this machine. If no server answers on --port, one is "
        "started for as long as the agent runs; else that one is used, with the model that it has. The agent's "
        "settings are set for this run only; its own files are not changed.",
        epilog="What follows -- goes to the agent: mlxflash launch claude --model MODEL -- -p 'Say hello'",
    )
    parser.add_argument("agent", choices=AGENTS, help="the program to start; it must be installed")
    parser.add_argument(
        "--port",
        type=whole_number(1, 65535),
        default=8080,
        metavar="N",
        help="port of the server on this machine (default: %(default)s)",
    )
    add_model_arguments(parser)
    return parser


def main(arguments: argparse.Namespace) -> int:
    agent = AGENTS[arguments.agent]
    command = shutil.which(arguments.agent)
    if command is None:
        raise FlashError(f"{arguments.agent} is not installed, or not on the PATH. Install it: {agent.install}")
    url, key = f"http://127.0.0.1:{arguments.port}", os.environ.get(KEY_VARIABLE) or NO_KEY
    with _server(url, arguments):
        model, context = _model_of(url, key)
        if context and context < AGENT_TOKENS:
            say(
                f"note: the server's context is {context} tokens; an agent's first prompt has 6,000 to 20,000. If it "
                "does not fit, start the server with a larger --context, or choose a model with more positions."
            )
        given = (url, model, key, context or AGENT_TOKENS)
        environment = {name: value for name, value in os.environ.items() if name not in agent.without}
        environment |= _past_proxies(environment) | agent.environment(*given)
        return _run([command, *agent.arguments(*given), *arguments.rest], environment)


def _past_proxies(environment: dict[str, str]) -> dict[str, str]:
    """Variables by which the agent asks this machine directly. Claude Code sends http too through HTTPS_PROXY."""
    given = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    if given.strip() == "*":
        return {}
    hosts = ",".join(filter(None, (given, "127.0.0.1")))
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def _run(command: list[str], environment: dict[str, str]) -> int:
    """Runs the agent in this terminal. Returns its exit code. Ctrl-C is for the agent only."""
    before = signal.signal(signal.SIGINT, lambda *_: None)  # A handler, unlike SIG_IGN, is not inherited.
    try:
        process = subprocess.Popen(command, env=environment)
        try:
            code = process.wait()
        except BaseException:  # such as a signal: the agent must not go on without its server
            process.terminate()
            raise
    except OSError as error:
        raise FlashError(f"{command[0]} cannot be started: {error.strerror}.") from None
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code


# -- the server ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _server(url: str, arguments: argparse.Namespace) -> Iterator[None]:
    """A server that is ready, inside the context. Raises FlashError."""
    if (status := _status(url)) is None:
        with _started(url, arguments):
            yield
        return
    flags = model_flags(arguments)
    if flags:
        say(f"note: a server runs at {url} already, so {' '.join(flags)} has no effect.")
    if status == 503:
        say(f"note: the server at {url} is loading its model; waiting for it.")
    while status == 503:
        time.sleep(0.5)
        status = _status(url)
    if status is None:
        raise FlashError(f"the server at {url} ended while it loaded its model. Start it again.")
    if status != 200:
        raise FlashError(f"what answers at {url} is not an mlx_flash server that is ready. Choose another --port.")
    yield


@contextlib.contextmanager
def _started(url: str, arguments: argparse.Namespace) -> Iterator[None]:
    command = [sys.executable, "-m", "mlx_flash.server", "--port", str(arguments.port), "--exit-with-stdin"]
    process = subprocess.Popen(
        [*command, *model_flags(arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=child_environment(),
        start_new_session=True,  # so that a Ctrl-C for the agent does not reach it
    )
    lines: deque[bytes] = deque(maxlen=KEPT_LINES)
    ready = threading.Event()

    def read() -> None:
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if not ready.is_set():  # Later the terminal belongs to the agent.
                with contextlib.suppress(OSError):
                    sys.stderr.buffer.write(line)
                    sys.stderr.flush()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        while _status(url) != 200:
            if process.poll() is not None:
                reader.join(5)
                raise FlashError(f"the server ended with code {process.returncode}; its own message is above.")
            time.sleep(0.2)
        ready.set()
        yield
        if process.poll() is not None:
            reader.join(5)
            say(f"the server ended with code {process.returncode}. It said last:")
            say(b"".join(lines).decode(errors="replace"))
    finally:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()


def _status(url: str) -> int | None:
    """The HTTP status of /health; None if nothing answers, 0 if it is not a server of this package."""
    try:
        try:
            response: Any = _opener().open(f"{url}/health", timeout=ANSWER_S)
        except urllib.error.HTTPError as error:
            response = error
        with response:
            body = json.loads(response.read())
            return int(response.status) if isinstance(body, dict) and "status" in body else 0
    except urllib.error.URLError:
        return None
    except (OSError, ValueError, http.client.HTTPException):
        return 0


def _model_of(url: str, key: str) -> tuple[str, int]:
    """(name of the model, its context in tokens or 0). Raises FlashError."""
    request = urllib.request.Request(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    try:
        with _opener().open(request, timeout=ANSWER_S) as response:
            found: Any = json.loads(response.read())["data"][0]
            return str(found["id"]), int(found.get("context_length") or 0)
    except (OSError, ValueError, LookupError, TypeError, http.client.HTTPException) as error:
        if isinstance(error, urllib.error.HTTPError) and error.code == 401:
            raise FlashError(f"the server at {url} wants an API key. Set {KEY_VARIABLE} to it.") from None
        raise FlashError(f"the server at {url} does not list its model: {error}. Choose another --port.") from None


def _opener() -> urllib.request.OpenerDirector:
    return urllib.request.build_opener(urllib.request.ProxyHandler({}))  # A proxy cannot reach this machine.


if __name__ == "__main__":
    run_command(make_parser(), main)
