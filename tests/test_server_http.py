"""The server's other answers, and its answers to unusual or hostile HTTP."""

from __future__ import annotations

import base64
import gzip
import json
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from serving import PATIENCE_S, Gate, Server, gate, serving, until  # type: ignore[import-not-found]  # noqa: F401

from mlx_flash.errors import BudgetError
from mlx_flash.flash.system import peak_memory_bytes
from mlx_flash.server import app, bodies, engine
from mlx_flash.server.access import Access
from mlx_flash.server.cache_watch import MOST_BINS
from mlx_flash.server.engine import FAILED
from mlx_flash.server.events import EventHub
from mlx_flash.server.guard import Guard
from mlx_flash.text.encoding import PART_CHARACTERS

CHAT = "/v1/chat/completions"
SHORT: dict[str, Any] = {"messages": [{"role": "user", "content": "He said"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving() as running:
        yield running


def error_of(response: Any) -> dict[str, Any]:
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"].endswith(".")
    return error  # type: ignore[no-any-return]


# -- health, statistics, events ------------------------------------------------------------------------------


def test_an_idle_server_looks_at_the_memory(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[None] = []
    server.idle()
    monkeypatch.setattr(engine, "IDLE_CHECK_S", 0.01)
    monkeypatch.setattr(server.engine.model.flash.keeper, "check", lambda: looked.append(None))
    server.engine._wake.put(None)  # ends the longer wait that began before
    until(lambda: len(looked) > 2)


def test_health_statistics_and_metrics(server: Server) -> None:
    before = server.get("/stats").json()
    assert server.post(CHAT, {**SHORT, "max_tokens": 9}).status_code == 200
    server.idle()
    assert server.get("/health").json() == {"status": "ok", "model": "demo"}
    stats = server.get("/stats").json()
    assert set(stats) == {
        *("model", "plan", "memory", "resident", "totals", "last", "now", "queue", "uptime_s", "prompt_caches"),
        *("state", "library", "choices", "given_back"),
    }
    assert set(stats["given_back"]) == {"now_bytes", "given_bytes", "taken_bytes", "pressure"}
    model = stats["model"]
    assert (
        (model["id"], model["kind"], model["layers"]) == ("demo", "neurons", 5)
        and model["unit_size"] == 3
        and model["parameters_bytes"] > 15e6
        and model["sampling"] == {}
    )
    assert len(stats["resident"]["slots"]) == len(stats["resident"]["units"]) == 5
    assert 0 < stats["resident"]["share"] <= 1 and max(stats["resident"]["units"]) <= model["units_per_layer"]
    assert stats["plan"]["context"] == 512 and stats["plan"]["budget"] == stats["memory"]["budget_bytes"]
    assert 0 < stats["memory"]["current_bytes"] <= stats["memory"]["peak_bytes"]
    assert stats["prompt_caches"].keys() == {"contexts", "tokens", "used_bytes", "planned_bytes", "on_disk"}
    assert stats["choices"]["io"] == {"choice": "direct", "by": "default", "trying": False}
    assert stats["now"] is None and stats["queue"] == {"waiting": 0, "limit": 64, "running": 0, "parallel": 1}
    assert stats["last"]["generated_tokens"] == 9 and stats["last"]["prompt_tokens"] == stats["last"]["prompt_tokens"]
    assert set(stats["last"]) == {
        *("tokens_per_second", "prompt_tokens", "generated_tokens", "first_token_s", "hit_rate", "bytes_per_token"),
        *("bytes_per_second", "wait_s", "manage_s", "compute_s", "drafted_tokens", "accepted_tokens", "ranks"),
    }
    totals = {name: stats["totals"][name] - before["totals"][name] for name in stats["totals"]}
    assert (totals["requests"], totals["failed"], totals["generated_tokens"]) == (1, 0, 9)
    assert totals["seconds_generating"] > 0 and totals["prompt_tokens"] == stats["last"]["prompt_tokens"]
    answer = server.get("/metrics")
    families = {family.name: family for family in text_string_to_metric_families(answer.text)}
    value = families["mlx_flash_generated_tokens"].samples[0].value
    assert value == stats["totals"]["generated_tokens"] and answer.headers["content-type"].startswith("text/plain")
    assert families["mlx_flash_memory_budget_bytes"].samples[0].value == stats["plan"]["budget"]
    assert families["mlx_flash_slots_given_back_bytes"].samples[0].value >= 0


def events_of(lines: Iterator[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    name = ""
    for line in lines:
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            yield name, json.loads(line.removeprefix("data: "))


def test_events_tell_of_prompt_tokens_and_end(server: Server, gate: Gate) -> None:  # noqa: F811
    gate.open()
    loaded = server.engine.switch.loaded
    assert loaded is not None and loaded.monitor is not None
    with server.client() as client, client.stream("GET", "/events") as listening:
        assert listening.headers["content-type"].startswith("text/event-stream")
        events = events_of(listening.iter_lines())
        assert next(events)[1]["state"] == "idle"
        answer = server.post("/v1/completions", {"prompt": [7] * 100, "max_tokens": 12, "temperature": 0})
        seen = []
        for event in events:
            seen.append(event)
            if event[1].get("state") == "idle":
                break
    ids = {data["id"] for _, data in seen}
    assert ids == {answer.json()["id"]}
    states = [data for name, data in seen if name == "state"]
    assert [data["state"] for data in states] == ["prompt"] * (len(states) - 2) + ["generating", "idle"]
    assert [data["done"] for data in states[:-2]] == [0, 16, 32, 48, 64, 80, 96, 99] and states[0]["total"] == 100
    tokens = [data for name, data in seen if name == "token"]
    assert tokens and tokens[-1]["n"] == 12 and [data["n"] for data in tokens] == sorted(data["n"] for data in tokens)
    for data in tokens:
        assert set(data) == {
            *("id", "n", "tokens_per_second", "hit_rate", "bytes", "bytes_per_second", "wait_s", "manage_s"),
            *("compute_s", "layers", "ranks"),
        }
        assert len(data["layers"]) == 5
        for kinds in data["layers"]:
            resident, hit, _ = (base64.b64decode(kind) for kind in kinds)
            assert len(resident) == MOST_BINS and any(hit)
    until(lambda: not server.engine.hub.listening)
    server.post(CHAT, SHORT)
    server.idle()
    assert not loaded.monitor.live.watching  # it costs nothing now


def test_an_idle_event_stream_is_kept_alive_and_ends_with_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    monkeypatch.setattr("mlx_flash.server.events.KEEP_ALIVE_S", 0.01)
    hub = EventHub()

    async def listen() -> list[str]:
        seen = []
        async for text in hub.listen():
            seen.append(text)
            if len(seen) == 3:
                for number in range(100):
                    hub.publish("token", {"n": number})
                hub.close()
                await asyncio.sleep(0)
        return seen

    first, *rest = asyncio.run(listen())
    assert first.startswith("event: state") and rest[0] == rest[1] == ": still here\n\n" and not hub.listening


# -- wrong requests ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize("body", [b"", b"{", b"hello", b"[]", b"\xff", b'{"model": "\\ud800"}', b"[" * 99999])
def test_bad_json(server: Server, path: str, body: bytes) -> None:
    with server.client() as client:
        response = client.post(path, content=body)
    assert response.status_code == 400 and error_of(response)["type"] == "invalid_request_error"


def test_paths_and_methods(server: Server) -> None:
    with server.client() as client:
        missing, wrong = client.get("/v1/nothing"), client.get(CHAT)
    assert missing.status_code == 404 and "/v1/nothing" in error_of(missing)["message"]
    assert wrong.status_code == 405 and "POST" in wrong.headers["allow"] and error_of(wrong)
    assert server.get("/page/../../../../etc/passwd").status_code == 404
    assert server.get("/page/%2e%2e/__main__.py").status_code == 404


def test_other_ways_to_write_the_paths(server: Server) -> None:
    for path in ("/v1/models", "/v1/models/", "/models", "/models/"):
        assert [model["id"] for model in server.get(path).json()["data"]] == ["demo"]
    for path in ("/chat/completions", "/v1/chat/completions/"):
        with server.client(follow_redirects=True) as client:
            assert client.post(path, json=SHORT).status_code == 200
    assert server.post("/completions", {"prompt": "a", "max_tokens": 1, "model": ""}).status_code == 200


def test_bodies_that_are_compressed(server: Server) -> None:
    with server.client() as client:
        response = client.post(CHAT, content=gzip.compress(b"{}"), headers={"Content-Encoding": "gzip"})
    assert response.status_code == 415 and "'gzip'" in error_of(response)["message"]


def test_other_wrong_values(server: Server) -> None:
    for body, param in (
        ({**SHORT, "messages": [{"role": "user", "content": 5}]}, "messages"),
        ({**SHORT, "seed": 2**64}, "seed"),
        ({**SHORT, "max_tokens": 10**4299}, "max_tokens"),
        ({**SHORT, "max_completion_tokens": 10**4299}, "max_completion_tokens"),
        ({**SHORT, "repetition_penalty": 1e-38, "logprobs": True}, "repetition_penalty"),
    ):
        response = server.post(CHAT, body)
        assert response.status_code in (400, 404) and error_of(response)["param"] == param
    for body, param in (
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": "a", "echo": "yes"}, "echo"),
        ({"prompt": "a", "max_tokens": 0}, "max_tokens"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 2}, "best_of"),
        ({"prompt": "a", "logprobs": 6}, "logprobs"),
        ({"prompt": {}}, "prompt"),
    ):
        response = server.post("/v1/completions", body)
        assert response.status_code == 400 and error_of(response)["param"] == param, body


def test_what_is_wrong_is_said_of_the_kind_that_was_sent(server: Server) -> None:
    sound = {"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}
    for body, where, what in (
        ({**SHORT, "stop": ["a"] * 257}, "stop: ", "at most 256"),
        ({**SHORT, "messages": [{"role": "user", "content": [sound]}]}, "messages.0.content.0.type: ", "'text'"),
    ):
        message = error_of(server.post(CHAT, body))["message"]
        assert message.startswith(where) and what in message


def test_large_bodies(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    large = json.dumps({**SHORT, "user": "x" * bodies.MOST_BYTES}).encode()
    with server.client() as client:
        for content in (large, iter([large[: 1 << 19], large[1 << 19 :]])):  # the second request has no length
            response = client.post(CHAT, content=content)
            assert response.status_code == 413 and error_of(response)["code"] == "body_too_large"
    monkeypatch.setattr(bodies, "MOST_BODIES", 0.001)
    response = server.post(CHAT, {**SHORT, "user": "x" * 2000})
    assert response.status_code == 429 and response.headers["retry-after"] and error_of(response)
    assert server.post(CHAT, SHORT).status_code == 200  # those bodies no longer count


def test_a_body_that_does_not_come(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "BODY_S", 0.05)
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection:
        connection.sendall(b"POST " + CHAT.encode() + b" HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
        assert connection.recv(1000).startswith(b"HTTP/1.1 408 ")


@pytest.mark.parametrize(
    "request_", [b"\x16\x03\x01\x02\x00\x01", b"GET / HTTP/9\r\n\r\n", b"GET /health HTTP/1.1\r\n\r\n", b"x" * 100000]
)
def test_what_is_no_http(server: Server, request_: bytes) -> None:
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection:
        connection.sendall(request_)
        connection.shutdown(socket.SHUT_WR)
        assert re.match(rb"HTTP/1.1 4\d\d |$", connection.recv(1000))
    assert server.get("/health").status_code == 200


def test_one_that_speaks_only_half(server: Server) -> None:
    """A client that closes its sending side counts as disconnected, at any position. The others are served."""
    body = json.dumps(SHORT).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    whole = head + body
    for length in (5, len(head) - 2, len(head), len(whole) - 3, len(whole)):
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection:
            connection.sendall(whole[:length])
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1000):
                pass
    server.idle()
    assert server.post(CHAT, SHORT).status_code == 200


# -- access ----------------------------------------------------------------------------------------------------


def test_other_sites_may_not(server: Server) -> None:
    for host in ("evil.example", "evil.example:80", "localhost.evil.example", "127.0.0.1.evil.example", "[::2]"):
        response = server.get("/health", headers={"Host": host})
        assert response.status_code == 403 and error_of(response)["code"] == "host_not_allowed", host
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1", "[::1]:5"):
        assert server.get("/health", headers={"Host": host}).status_code == 200, host
    own = f"127.0.0.1:{server.port}"
    for origin in ("http://evil.example", "null", "http://localhost:1", f"http://{own}.evil.example", "http://["):
        response = server.post(CHAT, SHORT, headers={"Origin": origin})
        assert response.status_code == 403 and error_of(response)["code"] == "origin_not_allowed", origin
    assert server.post(CHAT, SHORT, headers={"Origin": f"http://{own}"}).status_code == 200
    assert "access-control-allow-origin" not in server.get("/health", headers={"Origin": f"http://{own}"}).headers


def raw(server: Server, request: bytes) -> tuple[int, dict[str, str], bytes]:
    """(status, headers, body) of the answer before the connection is closed."""
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection:
        connection.sendall(request)
        answer = b""
        while part := connection.recv(1 << 16):
            answer += part
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    return int(status.split()[1]), {line.split(": ")[0].lower(): line.split(": ", 1)[1] for line in lines}, body


def test_a_request_without_a_host(server: Server) -> None:
    for request in (b"GET /health HTTP/1.0\r\n\r\n", b"GET /health HTTP/1.1\r\nHost:\r\nConnection: close\r\n\r\n"):
        status, _, body = raw(server, request)
        error = json.loads(body)["error"]
        assert status == 400 and error["code"] == "host_missing" and "`Host: 127.0.0.1`" in error["message"]
    assert raw(server, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n")[0] == 200


@pytest.mark.parametrize(
    ("target", "status"),
    [
        ("http://127.0.0.1:{port}/health", 200),
        ("HTTP://LOCALHOST/v1/models?x=http://evil.example", 200),
        ("http://127.0.0.1:{port}", 200),
        ("http://evil.example/health", 403),
        ("http://127.0.0.1@evil.example/health", 403),
        ("http:///health", 400),
        ("http://127.0.0.1:{port}/http://127.0.0.1/health", 404),
        ("ftp://127.0.0.1/health", 404),
    ],
)
def test_a_request_for_a_whole_url(server: Server, target: str, status: int) -> None:
    """The host of the URL counts, not the Host header (RFC 9112, 3.2.2)."""
    line = f"GET {target.format(port=server.port)} HTTP/1.1\r\n"
    host = "evil.example" if status == 200 else "127.0.0.1"
    assert raw(server, f"{line}Host: {host}\r\nConnection: close\r\n\r\n".encode())[0] == status


def test_other_methods(server: Server) -> None:
    for path, allowed in (
        ("/health", "GET, HEAD"),
        ("/events", "GET, HEAD"),
        ("/stats", "GET, HEAD"),
        ("/", "GET, HEAD"),
        ("/page/app.js", "GET, HEAD"),
        ("/v1/models", "GET, HEAD"),
        (CHAT, "POST"),
        ("/completions", "POST"),
    ):
        with server.client() as client:
            head = client.head(path)
            assert head.content == b"" and head.status_code == (405 if allowed == "POST" else 200), path
            for method in {"GET", "POST", "PUT", "DELETE", "OPTIONS", "PATCH", "TRACE"} - {*allowed.split(", ")}:
                response = client.request(method, path)
                assert (response.status_code, response.headers["allow"]) == (405, allowed), (method, path)
                assert error_of(response)["message"] == (
                    f"{path} does not allow {method}; use {allowed.replace(', ', ' or ')}."
                )
    with server.client() as client, client.stream("GET", "/events") as listening:
        kept = ("content-type", "cache-control", "x-accel-buffering")
        head = client.head("/events")
        assert [head.headers[name] for name in kept] == [listening.headers[name] for name in kept]
    until(lambda: not server.engine.hub.listening)


def test_a_key_is_demanded() -> None:
    with serving(key="sesame", name="owner/some-model") as server:
        assert server.get("/health").status_code == 200
        for path in ("/stats", "/metrics", "/events", "/v1/models", "/nothing"):
            for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic sesame"}):
                response = server.get(path, headers=headers)
                assert response.status_code == 401 and error_of(response)["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
        key = {"Authorization": "Bearer sesame"}
        assert server.post(CHAT, SHORT).status_code == 401
        assert server.post(CHAT, SHORT, headers=key).status_code == 200
        assert server.get("/stats", headers={**key, "Host": "my-mac.local"}).status_code == 200
        assert server.get("/v1/models/owner/some-model", headers=key).json()["id"] == "owner/some-model"


def test_the_page(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "index.html").write_text("<!doctype html>")
    (tmp_path / "app.js").write_text("1")
    monkeypatch.setattr(app, "PAGE", tmp_path)
    with serving(key="sesame") as server:  # the page needs no key, because it asks for the key
        page, script = server.get("/"), server.get("/page/app.js")
        assert page.text == "<!doctype html>" and page.headers["content-type"].startswith("text/html")
        assert page.headers["cache-control"] == script.headers["cache-control"] == "no-cache"
        assert script.text == "1" and "javascript" in script.headers["content-type"]
        policy = page.headers["content-security-policy"]
        assert "default-src 'self'" in policy and "frame-ancestors 'none'" in policy
        assert server.get("/page/other.js").status_code == 404
        (tmp_path / "index.html").unlink()
        assert server.get("/").status_code == 404


# -- without a model -----------------------------------------------------------------------------------------


def test_before_the_model_is_there(gate: Gate) -> None:  # noqa: F811
    import threading

    from mlx_flash.loading import load as loading

    may = threading.Event()

    def load() -> Any:
        assert may.wait(PATIENCE_S)
        return loading.load()

    with serving(load, wait=False) as server:
        for path in ("/health", "/stats", "/metrics", "/events"):
            response = server.get(path)
            assert response.status_code == 503 and response.headers["retry-after"]
        assert server.get("/health").json() == {"status": "loading"}
        response = server.post(CHAT, SHORT)
        assert response.status_code == 503 and error_of(response)["code"] == "loading"
        may.set()
        until(lambda: server.get("/health").status_code == 200)


def test_when_the_model_cannot_be_loaded() -> None:
    def load() -> Any:
        raise BudgetError("the memory budget is too small.", 5)

    with serving(load, wait=False) as server:
        until(lambda: server.engine.state == FAILED)
        assert server.get("/health").status_code == 500
        assert server.get("/health").json() == {"status": "failed", "error": "the memory budget is too small."}
        assert error_of(server.post(CHAT, SHORT))["code"] == "load_failed"


def test_the_guard_knows_ipv6() -> None:
    guard = Guard(lambda *_: None, Access("fe80::1"))  # type: ignore[arg-type, return-value]
    assert guard.hosts >= {"fe80::1", "::1"}


def test_a_text_far_too_long_is_not_encoded_as_a_whole(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encoding it would take a hundred megabytes more than the plan allows."""
    tokenizer = server.engine.tokenizer
    longest = []
    encode = tokenizer.encode

    def watched(text: str, **options: Any) -> list[int]:
        longest.append(len(text))
        return list(encode(text, **options))

    monkeypatch.setattr(tokenizer._tokenizer, "encode", watched)
    text = "It was a dark night and " * 40_000
    for path, body in (
        ("/v1/completions", {"prompt": text}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
    ):
        error = error_of(server.post(path, body))
        assert error["code"] == "context_length_exceeded" and "has more than" in error["message"]
    assert len(longest) == 2 and max(longest) == PART_CHARACTERS
    spaces = server.post("/v1/completions", {"prompt": "So" + " " * 100_000, "max_tokens": 1})
    assert spaces.status_code == 200  # long, but with few tokens


@pytest.mark.parametrize(
    "body",
    [
        b'{"prompt": [' + b'"",' * 300_000 + b'""]}',
        b'{"prompt": [' + b"1," * 300_000 + b'""]}',
        b'{"messages": [' + b"{}," * 300_000 + b"{}]}",
        b'{"messages": [{"role": "user", "content": [' + b"{}," * 300_000 + b"{}]}]}",
        b'{"messages": [{"role": "user"}], "stop": [' + b"1," * 300_000 + b"1]}",
        b'{"messages": [{"role": "user"}], "logit_bias": {' + b'"":"",' * 150_000 + b'"":""}}',
    ],
)
def test_a_great_many_errors_take_no_more_than_one(server: Server, body: bytes) -> None:
    before = peak_memory_bytes()
    path = "/v1/completions" if b"prompt" in body else CHAT
    with server.client() as client:
        response = client.post(path, content=body)
    assert response.status_code == 400 and error_of(response)["param"] in ("prompt", "messages", "stop", "logit_bias")
    assert peak_memory_bytes() - before < 64 << 20
