"""Many clients, slow clients, and clients that disconnect."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from serving import PATIENCE_S, Gate, Server, gate, serving, until  # type: ignore[import-not-found]  # noqa: F401

from mlx_flash.errors import ReadError

# ruff: noqa: F811
PROMPT: dict[str, Any] = {"prompt": list(range(100, 180)), "max_tokens": 20, "temperature": 0}


@pytest.fixture(scope="module")
def server(load_speaker: Callable[[], Any]) -> Iterator[Server]:
    with serving(load_speaker) as running:
        yield running


class Caller:
    """A client that can disconnect at any time."""

    def __init__(self, server: Server, stream: bool, body: dict[str, Any] = PROMPT) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), PATIENCE_S)
        content = json.dumps({**body, "stream": stream}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(content)}\r\n\r\n"
        self.socket.sendall(head.encode() + content)

    def read_all(self) -> bytes:
        """Reads until the server closes the connection or the answer is complete."""
        received = b""
        while not received.endswith(b"0\r\n\r\n") and (some := self.socket.recv(1 << 16)):
            received += some
        return received

    def leave(self) -> None:
        self.socket.close()


@pytest.fixture(params=[True, False], ids=["streaming", "whole"])
def stream(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def wait_for_leaving(server: Server) -> None:
    job = server.engine.running[0]
    assert job is not None
    until(lambda: job.left)


def test_leaving_while_tokens_are_made(server: Server, gate: Gate, stream: bool) -> None:
    before = server.totals["generated_tokens"]
    caller = Caller(server, stream)
    gate.go_on_to("token", 5)
    caller.leave()
    wait_for_leaving(server)
    gate.open()
    server.idle()
    assert server.totals["generated_tokens"] - before == 5


def test_leaving_in_the_prompt(server: Server, gate: Gate, stream: bool) -> None:
    """The next request can use the part of the prompt that was read."""
    before = server.totals["generated_tokens"]
    prompt = [5 if stream else 6, *range(300, 379)]  # begins differently from all prompts before
    caller = Caller(server, stream, {**PROMPT, "prompt": prompt})
    gate.go_on_to("prompt", 48)
    caller.leave()
    wait_for_leaving(server)
    gate.open()
    server.idle()
    assert server.totals["generated_tokens"] == before
    usage = server.post("/v1/completions", {**PROMPT, "prompt": prompt}).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == 48


def test_leaving_in_the_queue(server: Server, gate: Gate, stream: bool) -> None:
    requests = server.totals["requests"]
    working = Caller(server, True)
    gate.go_on_to("token", 1)
    second, third = Caller(server, stream), Caller(server, True)
    until(lambda: server.engine.waiting == 2)
    second.leave()
    until(lambda: server.engine.waiting == 1)
    gate.open()
    assert working.read_all() and b"[DONE]" in third.read_all()
    server.idle()
    assert server.totals["requests"] - requests == 2
    working.leave()
    third.leave()


def test_a_full_queue(load_speaker: Callable[[], Any], gate: Gate) -> None:
    with serving(load_speaker, limit=2) as server:
        callers = [Caller(server, True)]
        gate.go_on_to("prompt", 0)
        callers += [Caller(server, True), Caller(server, True)]
        until(lambda: server.engine.waiting == 2)
        response = server.post("/v1/completions", PROMPT)
        assert response.status_code == 429 and response.json()["error"]["code"] == "queue_full"
        assert int(response.headers["retry-after"]) > 0
        assert server.get("/stats").json()["queue"] == {"waiting": 2, "limit": 2, "running": 1, "parallel": 1}
        callers[1].leave()
        until(lambda: server.engine.waiting == 1)
        callers.append(Caller(server, True))  # there is room again
        until(lambda: server.engine.waiting == 2)
        gate.open()
        for caller in (callers[0], *callers[2:]):
            assert b"[DONE]" in caller.read_all()
            caller.leave()


def test_a_full_queue_has_room_for_a_request_that_has_begun(load_speaker: Callable[[], Any], gate: Gate) -> None:
    with serving(load_speaker) as server:
        several = Caller(server, True, {**PROMPT, "n": 3, "max_tokens": 2})
        gate.go_on_to("prompt", 0)
        server.engine.places.limit = 0
        gate.open()
        answer = several.read_all()
        assert b"queue_full" not in answer and answer.count(b'"finish_reason":"length"') == 3
        several.leave()
        assert server.post("/v1/completions", PROMPT).status_code == 429


def test_fifty_at_once(server: Server) -> None:
    body = {**PROMPT, "max_tokens": 6}
    expected = server.post("/v1/completions", body).json()["choices"][0]["text"]
    failed = server.totals["failed"]

    def one(number: int) -> str:
        if number % 2:
            return str(server.post("/v1/completions", body).json()["choices"][0]["text"])
        caller = Caller(server, True, body)
        events = [line for line in caller.read_all().decode().splitlines() if line.startswith("data: {")]
        caller.leave()
        return "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in events)

    with ThreadPoolExecutor(50) as pool:
        texts = list(pool.map(one, range(50)))
    assert texts == [expected] * 50 and server.totals["failed"] == failed


def test_one_that_does_not_read_holds_up_nobody(server: Server, gate: Gate) -> None:
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    slow.connect(("127.0.0.1", server.port))
    body = json.dumps({**PROMPT, "max_tokens": 200, "stream": True, "logprobs": 5}).encode()
    slow.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode())
    slow.sendall(body)
    gate.go_on_to("token", 1)
    gate.open()
    assert server.post("/v1/completions", PROMPT).status_code == 200
    received = b""
    while not received.endswith(b"0\r\n\r\n"):  # the client receives everything in the end
        received += slow.recv(1 << 16)
    assert received.count(b"data: ") >= 200 and b"[DONE]" in received
    slow.close()


def test_stopping_while_one_is_worked_on_and_one_waits(
    load_speaker: Callable[[], Any], gate: Gate, stream: bool
) -> None:
    with serving(load_speaker) as server:
        working = Caller(server, stream)
        gate.go_on_to("token", 2)
        waiting = Caller(server, stream)
        until(lambda: any(place.job is not None for place in server.engine.places._places))
        server.engine.stop()
        gate.open()
        for caller in (working, waiting):
            received = caller.socket.recv(1 << 20)
            while b"stopping" not in received:
                more = caller.socket.recv(1 << 20)
                assert more, received
                received += more
            assert received.startswith(b"HTTP/1.1 200 " if stream else b"HTTP/1.1 503 ")
            caller.leave()


def test_a_read_that_fails(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failed read only costs that request and its prompt cache."""

    def fail() -> None:
        raise ReadError("the disk is gone.")

    failed = server.totals["failed"]
    with monkeypatch.context() as patched:
        patched.setattr(server.engine.model.flash, "verify_unchanged", fail)
        response = server.post("/v1/completions", PROMPT)
        assert response.status_code == 500 and response.json()["error"]["message"] == "the disk is gone."
        streamed = server.post("/v1/completions", {**PROMPT, "stream": True})
        assert streamed.status_code == 200 and "the disk is gone." in streamed.text
    server.idle()
    assert server.totals["failed"] == failed + 2
    after = server.post("/v1/completions", PROMPT).json()
    assert after["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_an_unforeseen_error_costs_one_request(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlx_flash.text import prompt_cache

    with monkeypatch.context() as patched:
        patched.setattr(prompt_cache, "stream_generate", lambda *_, **__: 1 / 0)
        response = server.post("/v1/completions", PROMPT)
    assert response.status_code == 500 and "ZeroDivisionError" in response.json()["error"]["message"]
    assert "ZeroDivisionError" in caplog.text  # for the operator
    assert server.post("/v1/completions", PROMPT).status_code == 200


def test_submitting_from_many_threads_never_exceeds_the_limit(load_speaker: Callable[[], Any], gate: Gate) -> None:
    with serving(load_speaker, limit=5) as server:
        first = Caller(server, True)
        gate.go_on_to("prompt", 0)
        statuses: list[int] = []

        def one() -> None:
            statuses.append(server.post("/v1/completions", {**PROMPT, "max_tokens": 1}).status_code)

        threads = [threading.Thread(target=one) for _ in range(20)]
        for thread in threads:
            thread.start()
        until(lambda: len(statuses) == 15)
        assert statuses == [429] * 15 and server.engine.waiting == 5
        gate.open()
        for thread in threads:
            thread.join()
        assert sorted(statuses) == [200] * 5 + [429] * 15
        first.leave()
