"""Coding agents as whole programs, started by mlxflash launch. tests/clients/setup.sh installs them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from other_clients import (  # type: ignore[import-not-found]  # found beside this file
    INSTALLED,
    THOUGHT,
    call_of,
    environment_in,
    scripted_server,
)
from scripted import Scripted  # type: ignore[import-not-found]
from serving import Server  # type: ignore[import-not-found]

PROGRAMS = INSTALLED / "programs" / "node_modules" / ".bin"
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not PROGRAMS.is_dir(), reason="tests/clients/setup.sh installs the programs"),
]
AGENTS = {
    "claude": ["--dangerously-skip-permissions", "-p"],
    "codex": ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"],
    "opencode": ["run"],
}
TIME_LIMIT_S = 600
CONTEXT = 65536  # tokens; Claude Code's first prompt has 20,000 of a usual tokenizer


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Scripted, Server]]:
    with scripted_server(tmp_path_factory.mktemp("scripted"), words=True, context=CONTEXT) as running:
        yield running


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A repository with a file."""
    work = tmp_path / "work"
    work.mkdir()
    (work / "hello.txt").write_text("old text\n")
    subprocess.run(["git", "init", "-q", str(work)], check=True)
    return work


def launch(name: str, server: Server, work: Path, task: str) -> str:
    """What the agent prints."""
    home = work.parent / "home"
    home.mkdir()
    environment = environment_in(home)
    environment["PATH"] = f"{PROGRAMS}:{environment['PATH']}"
    if name == "claude":
        environment["IS_SANDBOX"] = "1"  # Otherwise it does not skip permissions for root.
    command = [sys.executable, "-m", "mlx_flash.launch", name, "--port", str(server.port), "--", *AGENTS[name], task]
    done = subprocess.run(
        command,
        cwd=work,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIME_LIMIT_S,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def steps_of(name: str, folder: Path) -> list[str]:
    """The calls by which this agent changes the file. Two of them must have read it before they may write it."""
    path = str(folder / "hello.txt")
    if name == "claude":
        write = {"file_path": path, "content": "new text\n"}
        return [call_of("Read", {"file_path": path}), call_of("Write", write)]
    if name == "opencode":
        write = {"filePath": path, "content": "new text\n"}
        return [call_of("read", {"filePath": path}), call_of("write", write)]
    return [
        call_of("exec_command", {"cmd": "cat hello.txt"}),
        call_of("exec_command", {"cmd": "echo new text > hello.txt"}),
    ]


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_an_agent_says_hello(name: str, running: tuple[Scripted, Server], folder: Path) -> None:
    scripted, server = running
    scripted.script = lambda prompt: f"{THOUGHT}Hello from here."
    assert "Hello from here." in launch(name, server, folder, "Say hello.")


@pytest.mark.parametrize("name", sorted(AGENTS))
def test_an_agent_changes_a_file(name: str, running: tuple[Scripted, Server], folder: Path) -> None:
    scripted, server = running
    calls: list[str] = []

    def script(prompt: str) -> str:
        if "Change the file." not in prompt or '"type": "function"' not in prompt:
            return f"{THOUGHT}A title"
        steps = steps_of(name, folder)
        if prompt.count("<tool_response>") < len(steps):
            calls.append(steps[prompt.count("<tool_response>")])
            return f"{THOUGHT}I change it.\n{calls[-1]}"
        return f"{THOUGHT}The file is changed."

    scripted.script = script
    assert "The file is changed." in launch(name, server, folder, "Change the file.")
    assert (folder / "hello.txt").read_text() == "new text\n"
    assert calls == steps_of(name, folder)
