"""mlxflash launch, with programs that only write down how they were started."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]
from processes import runs  # type: ignore[import-not-found]
from serving import Server, serving, until  # type: ignore[import-not-found]

from mlx_flash.launch import AGENTS

AGENT = """#!{python}
import json, os, sys, urllib.request
said = {{"arguments": sys.argv[1:], "environment": dict(os.environ)}}
said["models"] = json.load(urllib.request.urlopen("http://127.0.0.1:{port}/v1/models"))
json.dump(said, open({out!r}, "w"))
sys.exit(7)
"""


# With less patience than for users: python -c IMPATIENT arguments
IMPATIENT = """
from mlx_flash import launch
from mlx_flash.cli.run import run_command
launch.ANSWER_S = 1.0
run_command(launch.make_parser(), launch.main)
"""


@pytest.fixture(scope="module")
def server(load_speaker: Callable[[], Any]) -> Iterator[Server]:
    with serving(load_speaker) as running:
        yield running


def launch(
    folder: Path, port: int, *arguments: str, run_as: Any = ("-m", "mlx_flash.launch"), **environment: str
) -> tuple[subprocess.CompletedProcess[str], Any]:
    """The finished command, and what the agent wrote down."""
    programs = folder / "programs"
    programs.mkdir(exist_ok=True)
    out = folder / "said.json"
    for name in AGENTS:
        program = programs / name
        program.write_text(AGENT.format(python=sys.executable, port=port, out=str(out)))
        program.chmod(0o755)
    done = subprocess.run(
        [sys.executable, *run_as, *arguments],
        env={**os.environ, "PATH": f"{programs}:/usr/bin:/bin", **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return done, json.loads(out.read_text()) if out.exists() else None


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as bound:
        return int(bound.getsockname()[1])


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_an_agent_gets_its_settings(name: str, server: Server, tmp_path: Path) -> None:
    port = str(server.port)
    elsewhere = {"ANTHROPIC_API_KEY": "mine", "CLAUDE_CODE_USE_BEDROCK": "1"}
    done, said = launch(tmp_path, server.port, name, "--port", port, "--", "-p", "Say hello", **elsewhere)
    assert done.returncode == 7, done.stderr  # the agent's own code
    assert said["arguments"][-2:] == ["-p", "Say hello"]
    environment = said["environment"]
    if name == "claude":
        assert environment["ANTHROPIC_BASE_URL"] == server.url and environment["ANTHROPIC_AUTH_TOKEN"] == "none"
        assert environment["ANTHROPIC_MODEL"] == environment["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "demo"
        assert not environment.keys() & {"ANTHROPIC_API_KEY", "CLAUDE_CODE_USE_BEDROCK"}
    elif name == "codex":
        settings = dict(each.split("=", 1) for each in said["arguments"][1:-2:2])
        assert settings["model_providers.mlx_flash.base_url"] == f'"{server.url}/v1"'
        assert settings["model"] == '"demo"' and settings["model_provider"] == '"mlx_flash"'
        assert environment[json.loads(settings["model_providers.mlx_flash.env_key"])] == "none"
    else:
        config = json.loads(environment["OPENCODE_CONFIG_CONTENT"])
        assert config["provider"]["mlx_flash"]["options"]["baseURL"] == f"{server.url}/v1"
        assert config["model"] == "mlx_flash/demo" and "demo" in config["provider"]["mlx_flash"]["models"]


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "127.0.0.1"), ({"NO_PROXY": "a.example"}, "a.example,127.0.0.1"), ({"no_proxy": "*"}, "*")],
)
def test_a_proxy_is_not_asked_for_this_machine(
    given: dict[str, str], expected: str, server: Server, tmp_path: Path
) -> None:
    given = {"NO_PROXY": "", "no_proxy": "", "HTTPS_PROXY": "http://proxy.example:1", **given}
    _, said = launch(tmp_path, server.port, "claude", "--port", str(server.port), **given)
    assert said["environment"]["HTTPS_PROXY"] == given["HTTPS_PROXY"]
    assert said["environment"]["no_proxy"] == expected
    assert said["environment"]["NO_PROXY"] == ("" if expected == "*" else expected)


def test_a_running_server_keeps_its_model(server: Server, tmp_path: Path) -> None:
    done, _ = launch(tmp_path, server.port, "claude", "--port", str(server.port), "--memory", "2GB", "--verify")
    assert "a server runs at" in done.stderr and "--memory=2GB --verify has no effect" in done.stderr


def test_a_server_is_started_and_ended(tmp_path: Path) -> None:
    write_tokenizer(make_mixture(tmp_path / "model", "qwen3_moe"))
    port = free_port()
    model = ("--model", str(tmp_path / "model"), "--context", "300")
    done, said = launch(tmp_path, port, "opencode", "--port", str(port), *model)
    assert done.returncode == 7 and "memory plan" in done.stderr
    assert "note: the server's context is 300 tokens" in done.stderr or "context_length" not in str(said["models"])
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5)
    assert not [process for process in psutil.process_iter() if runs(process, str(port))]


def test_what_cannot_be_started_is_said(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mlx_flash.launch", "codex"],
        env={**os.environ, "PATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1 and done.stderr.endswith("Install it: npm install -g @openai/codex\n")
    done, said = launch(tmp_path, 1, "claude", "--port", str(port := free_port()), "--model", str(tmp_path / "none"))
    assert done.returncode == 1 and said is None and "the server ended with code" in done.stderr
    with socket.create_server(("127.0.0.1", port)) as other:
        other.settimeout(1)
        model = ("--model", str(tmp_path / "none"))
        done, said = launch(tmp_path, 1, "claude", "--port", str(port), *model, run_as=("-c", IMPATIENT))
    assert done.returncode == 1 and said is None and "Choose another --port" in done.stderr


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-OpenSSH_9.9\r\n",
        b"",
        b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nbusy",
        b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
    ],
)
def test_another_program_on_the_port(answer: bytes, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    with other.accept()[0] as client:
                        client.recv(1 << 16)
                        client.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        done, said = launch(tmp_path, 1, "claude", "--port", str(other.getsockname()[1]))
        other.shutdown(socket.SHUT_RDWR)
    assert done.returncode == 1 and said is None
    assert len(done.stderr.splitlines()) == 1 and "Choose another --port" in done.stderr


def test_the_agent_ends_with_its_launcher(server: Server, tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    number = tmp_path / "number"
    (programs / "claude").write_text(
        f"#!/bin/sh\necho $$ > '{number}.new'\nmv '{number}.new' '{number}'\nexec sleep 600\n"
    )
    (programs / "claude").chmod(0o755)
    launcher = subprocess.Popen(
        [sys.executable, "-m", "mlx_flash.launch", "claude", "--port", str(server.port)],
        env={**os.environ, "PATH": f"{programs}:/usr/bin:/bin"},
        stderr=subprocess.DEVNULL,
    )
    until(number.exists)
    agent = psutil.Process(int(number.read_text()))
    launcher.terminate()
    assert launcher.wait(60) == 143
    agent.wait(60)


def test_a_key_is_passed_on(load_speaker: Callable[[], Any], tmp_path: Path) -> None:
    with serving(load_speaker, key="secret") as server:
        port = str(server.port)
        done, said = launch(tmp_path, server.port, "claude", "--port", port)
        assert done.returncode == 1 and said is None and "Set MLX_FLASH_API_KEY" in done.stderr
