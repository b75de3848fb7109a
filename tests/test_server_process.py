"""python -m mlx_flash.server in a process of its own: arguments, signals, output and exit."""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gated_server  # type: ignore[import-not-found]
import httpx2 as httpx
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]
from serving import PATIENCE_S, until  # type: ignore[import-not-found]

COMMAND = [sys.executable, "-m", "mlx_flash.server"]
LONG: dict[str, Any] = {"prompt": [7, 8, 9], "max_tokens": 500, "stream": True, "logit_bias": {"1": -100, "0": -100}}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=PATIENCE_S, env=os.environ | environment
    )


def imported(errors: str) -> set[str]:
    """The packages that `-X importtime` lists."""
    return {match.split(".")[0] for match in re.findall(r"\| +(\S+)$", errors, re.MULTILINE)}


@contextlib.contextmanager
def started(*arguments: str, held: Path | None = None) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """(process, its URL). The model may still be loading. held: a file that says where generations stop."""
    command, environment = COMMAND, dict(os.environ)
    if held is not None:
        command, environment[gated_server.VARIABLE] = gated_server.COMMAND, str(held)
    process = subprocess.Popen(
        [*command, "--port", "0", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None and process.stderr is not None
    try:
        assert select.select([process.stdout], [], [], PATIENCE_S)[0]
        line = process.stdout.readline()
        match = re.fullmatch(r"Serving (\S+) at (http://\S+:[1-9]\d+)\n", line)
        assert match is not None, line + process.stderr.read()
        yield process, match[2]
    finally:
        process.kill()
        process.communicate()


def get(url: str, **options: Any) -> httpx.Response:
    return httpx.get(url, verify=False, **options)  # see Server.client


def ready(url: str) -> bool:
    return get(f"{url}/health").status_code == 200


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_ends_a_generation_and_the_process(number: int, code: int, tmp_path: Path) -> None:
    gated_server.hold(tmp_path / "held", 10)  # the signal comes during generation
    with started(held=tmp_path / "held") as (process, url):
        until(lambda: ready(url))
        stream = httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=PATIENCE_S, verify=False)
        with stream as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: {")
            process.send_signal(number)
            rest = [line for line in lines if line]
        assert "stopping" in rest[-2] and rest[-1] == "data: [DONE]" and len(rest) < 400
        output, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == code and output == "", (process.returncode, output, errors)
        assert "Traceback" not in errors and "memory plan" in errors and errors.endswith("stopped\n"), errors


def test_the_port_is_open_before_the_model_is_there_and_a_signal_ends_open_connections() -> None:
    with started() as (process, url):
        assert get(f"{url}/health").status_code in (200, 503)
        until(lambda: ready(url))
        with httpx.Client(timeout=PATIENCE_S, verify=False) as client, client.stream("GET", f"{url}/events") as events:
            lines = events.iter_lines()
            assert next(lines) == "event: state"
            host, port = url.removeprefix("http://").split(":")
            with socket.create_connection((host, int(port))) as half:
                half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 10\r\n\r\n")
                assert ready(url)  # answered after the half request was read
                process.send_signal(signal.SIGTERM)
                assert list(lines)  # the stream ends
                assert b"the server is stopping" in half.makefile("rb").read()
                _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0 and "Traceback" not in errors, errors


def test_a_signal_while_loading() -> None:
    with started() as (process, _):
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 130 and "Traceback" not in errors, errors


def test_a_port_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("--port", port)
    assert done.returncode == 1 and done.stdout == "" and "Traceback" not in done.stderr
    assert f"127.0.0.1 port {port} cannot be used" in done.stderr and "--port" in done.stderr


def test_a_key_is_needed_beyond_this_machine() -> None:
    done = run("--host", "0.0.0.0", "--port", "0")
    assert done.returncode == 2 and "an API key is required" in done.stderr and done.stdout == ""
    for key in ("", "two\nlines", " spaces "):
        assert run("--port", "0", "--api-key", key).returncode == 2
    with started("--host", "0.0.0.0", "--api-key", "sesame") as (_, url):
        assert url.startswith("http://0.0.0.0:")
        assert get(f"{url}/v1/models").status_code == 401
        assert get(f"{url}/v1/models", headers={"Authorization": "Bearer sesame"}).status_code == 200


def test_the_key_may_come_from_the_environment_and_a_model_that_is_not_there_is_refused_at_once() -> None:
    environment = {"MLX_FLASH_API_KEY": "sesame", "PYTHONPROFILEIMPORTTIME": "1"}
    done = run("--host", "0.0.0.0", "--port", "0", "--model", "/nowhere/at/all", **environment)
    assert done.returncode == 2 and "/nowhere/at/all is neither a folder" in done.stderr
    modules = imported(done.stderr)
    assert {"mlx", "starlette"} <= modules and not modules & {"mlx_lm", "transformers"}


def test_a_model_that_cannot_be_loaded() -> None:
    small = run("--port", "0", "--memory", "1MB")
    assert small.returncode == 2 and "this model needs at least" in small.stderr
    assert "Traceback" not in small.stderr and small.stdout.startswith("Serving demo at http://127.0.0.1:")


def test_wrong_arguments() -> None:
    for wrong in (("--port", "65536"), ("--port", "x"), ("--host", "no.such.host.invalid"), ("--io", "tape")):
        done = run(*wrong)
        assert done.returncode == 2 and "Traceback" not in done.stderr, wrong


def test_help_imports_nothing_heavy() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mlx_flash.server", "--help"],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    modules = imported(done.stderr)
    assert done.returncode == 0 and "--api-key" in done.stdout and "mlx_flash" in modules
    assert not modules & {"mlx", "mlx_lm", "numpy", "transformers", "starlette", "uvicorn", "pydantic"}


def test_a_conversation_outlives_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    folder = make_mixture(tmp_path / "model", "mixtral")
    write_tokenizer(folder)
    body = {"prompt": list(range(5, 65)), "max_tokens": 3, "temperature": 0}
    for cached in (0, 59):
        with started("--model", str(folder)) as (process, url):
            until(lambda url=url: ready(url))  # type: ignore[misc]
            answer = httpx.post(f"{url}/v1/completions", json=body, timeout=PATIENCE_S, verify=False).json()
            assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == cached
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE_S) == 0
