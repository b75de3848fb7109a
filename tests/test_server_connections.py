"""Connections to the server: how many, how slow, how wrong, and which of them appear in the log."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from serving import PATIENCE_S, Server, serving, until  # type: ignore[import-not-found]

from mlx_flash.server import answering, bodies, connections
from mlx_flash.server.access import Access
from mlx_flash.server.guard import Guard
from mlx_flash.server.jobs import Piece
from mlx_flash.server.serving import HttpThread, Sparing, bind

CHAT = "/v1/chat/completions"
SHORT: dict[str, Any] = {"messages": [{"role": "user", "content": "He said"}], "max_tokens": 2}
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"


@pytest.fixture(scope="module")
def server(load_speaker: Callable[[], Any]) -> Iterator[Server]:
    with serving(load_speaker) as running:
        yield running


@pytest.fixture
def connect(server: Server) -> Iterator[Callable[..., socket.socket]]:
    with contextlib.ExitStack() as stack:

        def connect(*sent: bytes) -> socket.socket:
            made = stack.enter_context(socket.create_connection(("127.0.0.1", server.port), PATIENCE_S))
            for part in sent:
                made.sendall(part)
            return made

        yield connect


def rest_of(connection: socket.socket) -> bytes:
    """Reads until the server closes the connection."""
    parts = []
    with contextlib.suppress(ConnectionResetError):
        while part := connection.recv(65536):
            parts.append(part)
    return b"".join(parts)


def open_ones(server: Server) -> set[Any]:
    return server.http._server.server_state.connections  # type: ignore[no-any-return]


# -- many connections -----------------------------------------------------------------------------------------


def test_honest_clients_are_served_beside_a_thousand_silent_ones(
    server: Server, connect: Callable[..., socket.socket]
) -> None:
    with server.client() as kept:
        assert kept.get("/health").status_code == 200
        silent = []
        for _ in range(10):
            silent += [connect() for _ in range(50)] + [connect(HEALTH[:9]) for _ in range(50)]
            assert server.post(CHAT, SHORT).status_code == 200
        assert kept.get("/health").status_code == 200  # with a new connection if its own was closed
    until(lambda: len(open_ones(server)) <= connections.MOST + 1)
    assert rest_of(silent[0]) == b""  # the oldest was closed to make room


def test_more_requests_than_may_are_refused(
    server: Server, connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "MOST", 2)
    events = [connect(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n") for _ in range(2)]
    for one in events:
        assert one.recv(65536)
    refused = server.get("/health")
    assert refused.status_code == 503 and refused.json()["error"]["code"] == "too_many_requests"
    for one in events:
        one.close()
    until(lambda: server.get("/health").status_code == 200)


OUT_OF_DESCRIPTORS = """
import os, resource, socket, sys
from starlette.responses import Response
from mlx_flash.server import connections
from mlx_flash.server.serving import HttpThread, bind
connections.MOST = 10**6
bound = bind("127.0.0.1", 0)
port = bound.getsockname()[1]
with HttpThread(Response(b"here"), bound):
    made = [socket.create_connection(("127.0.0.1", port)) for _ in range(5)]
    for one in made:
        one.sendall(b"GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
        one.recv(1000)
    clients = [socket.socket() for _ in range(40)]
    used = max(map(int, os.listdir("/dev/fd")))
    resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for one in clients:
        one.connect(("127.0.0.1", port))
    print("full", flush=True)
    sys.stdin.readline()
    for one in clients[:39]:
        one.close()
    clients[39].sendall(b"GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    assert clients[39].recv(1000).startswith(b"HTTP/1.1 200")
"""


def test_descriptors_that_run_out_are_a_line_in_the_log() -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", OUT_OF_DESCRIPTORS], stdin=pipe, stdout=pipe, stderr=pipe) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        try:
            assert process.stdout.readline() == b"full\n"
            assert b"Too many open files" in process.stderr.readline()
            _, errors = process.communicate(b"\n", timeout=PATIENCE_S)
        finally:
            process.kill()
    assert process.returncode == 0 and errors == b""


# -- slow connections -----------------------------------------------------------------------------------------


def test_a_request_that_does_not_come(
    server: Server, connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "REQUEST_S", 0.05)
    assert rest_of(connect()) == b""
    assert rest_of(connect(HEALTH[:20])).startswith(b"HTTP/1.1 408 ")
    answered = rest_of(connect(HEALTH, HEALTH[:20]))  # a second request
    assert answered.startswith(b"HTTP/1.1 200 ") and answered.count(b"HTTP/1.1") == 1
    ignored = b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\n"
    assert rest_of(connect(ignored)).startswith(b"HTTP/1.1 404 ")  # the server does not wait for the body


def test_a_long_answer_is_not_cut_by_the_time_for_a_request(
    server: Server, connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = json.dumps({**SHORT, "max_tokens": 50}).encode()
    connection = connect(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    monkeypatch.setattr(connections, "REQUEST_S", 0.001)
    assert b"finish_reason" in rest_of(connection)


def slow_body(size: int) -> bytes:
    return POST + b"Content-Length: %d\r\n\r\n" % size + b" " * (size - 1)


def test_slow_bodies_give_way(
    server: Server, connect: Callable[..., socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bodies, "HELD_S", 0.0)
    slow = []
    for number in range(1, bodies.MOST_BODIES + 1):
        slow.append(connect(slow_body(bodies.MOST_BYTES)))
        until(lambda number=number: server.held.held_bytes == number * (bodies.MOST_BYTES - 1))
    full = connect(slow_body(bodies.MOST_BYTES))  # replaces the first
    assert slow[0].recv(1000).startswith(b"HTTP/1.1 408 ")
    # A request that asks whether it has arrived would need room itself, and could be why one of them is refused.
    until(lambda: server.held.held_bytes == bodies.MOST_BODIES * (bodies.MOST_BYTES - 1))
    monkeypatch.setattr(bodies, "HELD_S", 600.0)
    assert server.post(CHAT, {**SHORT, "user": "x" * 2000}).status_code == 429
    monkeypatch.setattr(bodies, "HELD_S", 0.0)
    assert server.post(CHAT, {**SHORT, "user": "x" * 2000}).status_code == 200
    assert slow[1].recv(1000).startswith(b"HTTP/1.1 408 ")
    full.sendall(b" ")  # a slow body that is complete now
    assert full.recv(1000).startswith(b"HTTP/1.1 400 ")


def test_a_client_that_does_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "READING_S", 0.05)
    import threading

    gone = threading.Event()

    async def endless(_scope: Any, receive: Any, send: Any) -> None:
        await receive()
        leaving = asyncio.ensure_future(receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        while not leaving.done():
            await send({"type": "http.response.body", "body": b"x" * 65536, "more_body": True})
            await asyncio.sleep(0)
        gone.set()

    bound = bind("127.0.0.1", 0)
    with HttpThread(endless, bound), socket.create_connection(bound.getsockname()) as client:
        client.sendall(HEALTH)
        assert gone.wait(PATIENCE_S)


def test_answers_do_not_wait_for_acknowledgements(server: Server) -> None:
    with server.client() as client:
        assert client.get("/health").status_code == 200
        for one in set(open_ones(server)):
            assert one.transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# -- invalid requests -----------------------------------------------------------------------------------------

WRONG = {
    "nonsense": b"\x16\x03\x01\x1b]0;title\x07\r\n\r\n",
    "a chunk without a length": POST + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
    "nonsense behind a request": HEALTH + b"nonsense\r\n\r\n",
    "nonsense behind two requests": HEALTH * 2 + b"GET /\x00 HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n",
    "a WebSocket": HEALTH[:-2] + b"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\r\n",
    "another upgrade": HEALTH[:-2] + b"Connection: Upgrade\r\nUpgrade: h2c\r\n\r\n",
    "a body cut short": POST + b"Content-Length: 9\r\n\r\n{",
    "a proxy's request": b"GET http://evil.example/health HTTP/1.1\r\nHost: localhost\r\n\r\n",
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_what_is_wrong_leaves_nothing_in_the_log(
    server: Server, connect: Callable[..., socket.socket], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, "uvicorn.error")
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    connection = connect(WRONG[kind])
    connection.shutdown(socket.SHUT_WR)
    answer = rest_of(connection)
    statuses = [line.split()[1] for line in answer.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]
    assert set(statuses) <= {b"200", b"400", b"403", b"404", b"499"}, answer
    if kind in ("nonsense", "two hosts"):
        assert json.loads(answer.split(b"\r\n\r\n")[1])["error"]["type"] == "invalid_request_error"
    assert server.get("/health").status_code == 200
    assert caplog.text == ""


def test_the_log_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("a-test")
    log.addFilter(Sparing())
    for number in range(100):
        log.error("accepting failed: %s", number)
    log.error("another thing")
    assert [record.getMessage() for record in caplog.records] == ["accepting failed: 0", "another thing"]


def test_names_of_this_server() -> None:
    guard = Guard(lambda *_: None, Access("127.0.0.1"))  # type: ignore[arg-type, return-value]

    def refused(host: str, target: str = "/health") -> bool:
        statuses: list[int] = []

        async def send(message: Any) -> None:
            statuses.extend([message["status"]] if message["type"] == "http.response.start" else [])

        async def app(_scope: Any, _receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})

        guard.app = app
        scope = {"type": "http", "path": target, "method": "GET", "headers": [(b"host", host.encode())]}
        asyncio.run(guard(scope, None, send))  # type: ignore[arg-type]
        return statuses == [403]

    for host in (
        *("evil.com@127.0.0.1", "evil.com:80@localhost", "@localhost", "user:pass@[::1]", "localhost@evil.com"),
        *("localhost/", "localhost/evil.com", "localhost?x", "localhost#x", "localhost\\", "localhost:80:80"),
        *("localhost.", "127.0.0.1.", "[::1%25lo]", "[::1]x", "[::1", "::1", "localhost:x", "localhost:", "local host"),
        *("0x7f.1", "127.1", "0", "0.0.0.0", "[::]", "[::ffff:127.0.0.1]", "loc\u00e4lhost", "localhost,evil.com"),
    ):  # fmt: skip
        assert refused(host), host
    for host in ("localhost", "LocalHost:8080", "127.0.0.1", "127.0.0.1:1", "[::1]", "[::1]:65535"):
        assert not refused(host), host


# -- the engine's thread --------------------------------------------------------------------------------------


def test_telling_a_client_whose_loop_has_ended_does_no_harm(monkeypatch: pytest.MonkeyPatch) -> None:
    async def wait() -> answering.Waiting:
        return answering.Waiting(lambda _: None, ids=[1], max_tokens=1, sampling=None, stop=(), top_logprobs=None)

    waiting = asyncio.run(wait())
    monkeypatch.setattr(waiting._loop, "is_closed", lambda: False)  # as it was a moment before
    waiting.job.tell(Piece("late"))
