"""Names of the model, and clients that are allowed by name: further hosts, pages of other origins, two kinds of key."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import PATIENCE_S, Server, serving  # type: ignore[import-not-found]

from mlx_flash.errors import UsageError
from mlx_flash.server.access import Access, model_name

CHAT = "/v1/chat/completions"
SHORT: dict[str, Any] = {"messages": [{"role": "user", "content": "He said"}], "max_tokens": 2}
OBSIDIAN = "app://obsidian.md"
ASKING = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-stainless-lang"}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with a key that pages of three kinds of origins may use."""
    origins = (OBSIDIAN, "null", "vscode-webview://*", "http://localhost:3000")
    access = Access(key="sesame", hosts=("host.docker.internal",), origins=origins, names=("second", "demo"))
    with serving(access=access) as running:
        yield running


def preflight(server: Server, path: str, origin: str, **headers: str) -> Any:
    with server.client() as client:
        return client.request("OPTIONS", path, headers={"Origin": origin, **ASKING, **headers})


KEY = {"Authorization": "Bearer sesame"}


# -- names -----------------------------------------------------------------------------------------------------


def test_all_names_are_listed_and_the_first_is_in_the_answers(server: Server) -> None:
    listed = server.get("/v1/models", headers=KEY).json()["data"]
    assert [entry["id"] for entry in listed] == ["demo", "second"]
    context = server.engine.model.flash.plan.context
    assert all(entry["context_length"] == entry["max_model_len"] == context for entry in listed)
    for name in ("second", "claude-sonnet-4", "", None, "default"):
        assert server.post(CHAT, {**SHORT, "model": name}, headers=KEY).json()["model"] == "demo", name
    for name, found in (("second", "second"), ("default", "demo")):
        assert server.get(f"/v1/models/{name}", headers=KEY).json()["id"] == found
    missing = server.get("/v1/models/gpt-5", headers=KEY)
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"


def test_strict_names() -> None:
    with serving(access=Access(names=("second",), strict_names=True)) as server:
        for name in ("demo", "second", "default", "", None):
            assert server.post(CHAT, {**SHORT, "model": name}).status_code == 200, name
        refused = server.post(CHAT, {**SHORT, "model": "gpt-5"})
        assert refused.status_code == 404 and refused.json()["error"]["param"] == "model"
        asked = {"model": "gpt-5", "messages": [{"role": "user", "content": "hi"}]}
        assert server.post("/v1/messages/count_tokens", asked).status_code == 404


def test_entries_before_the_model_is_loaded() -> None:
    def load() -> Any:
        raise UsageError("no model.")

    with serving(load, wait=False) as server:
        assert set(server.get("/v1/models").json()["data"][0]) == {"id", "object", "created", "owned_by", "loaded"}


def test_the_name_of_a_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "opt-store").mkdir()
    for model in ("opt-store", "./opt-store/", str(tmp_path / "opt-store")):
        assert model_name(model) == "opt-store"
    assert model_name(".") == tmp_path.name
    assert model_name("/") == "/"
    assert model_name("owner/some-model") == "owner/some-model"
    assert model_name("x" * 5000) == "x" * 5000
    assert model_name(None) == "demo"


# -- origins ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origin", [OBSIDIAN, "null", "vscode-webview://1a2b3c", "http://localhost:3000"])
def test_pages_of_allowed_origins(server: Server, origin: str) -> None:
    asked = preflight(server, CHAT, origin)
    assert asked.status_code == 204 and asked.content == b""
    assert asked.headers["access-control-allow-origin"] == origin
    assert "POST" in asked.headers["access-control-allow-methods"]
    assert asked.headers["access-control-allow-headers"] == ASKING["Access-Control-Request-Headers"]
    assert int(asked.headers["access-control-max-age"]) > 0
    vary = ", ".join(asked.headers.get_list("vary"))
    assert "Origin" in vary and "Access-Control-Request-Headers" in vary
    answers = [
        server.post(CHAT, SHORT, headers={**KEY, "Origin": origin}),
        server.post(CHAT, {**SHORT, "stream": True}, headers={**KEY, "Origin": origin}),
        server.post(CHAT, {**SHORT, "n": 9}, headers={**KEY, "Origin": origin}),
        server.post(CHAT, SHORT, headers={"Origin": origin}),
        server.get("/nothing", headers={**KEY, "Origin": origin}),
    ]
    assert [answer.status_code for answer in answers] == [200, 200, 400, 401, 404]
    for answer in answers:
        assert answer.headers.get_list("access-control-allow-origin") == [origin]
        assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize(
    "origin",
    ["http://evil.example", "http://localhost:3001", "https://localhost:3000", "app://other", "vscode-webview"],
)
def test_pages_of_other_origins(server: Server, origin: str) -> None:
    for answer in (preflight(server, CHAT, origin), server.post(CHAT, SHORT, headers={**KEY, "Origin": origin})):
        assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_not_allowed"
        assert "access-control-allow-origin" not in answer.headers and "Origin" in answer.headers["vary"]


def test_options_that_is_no_preflight(server: Server) -> None:
    with server.client() as client:
        assert client.request("OPTIONS", CHAT, headers={**KEY, "Origin": OBSIDIAN}).status_code == 405
    assert "access-control-allow-origin" not in server.get("/health").headers
    strange = preflight(server, CHAT, OBSIDIAN, **{"Access-Control-Request-Headers": "a: b; c"})
    assert strange.status_code == 204 and "access-control-allow-headers" not in strange.headers


def test_all_origins() -> None:
    with serving(access=Access(origins=("*",))) as server:
        for origin in ("http://evil.example", "null", f"http://127.0.0.1:{server.port}"):
            assert preflight(server, CHAT, origin).headers["access-control-allow-origin"] == "*"
            answer = server.post(CHAT, SHORT, headers={"Origin": origin})
            assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "*"
        refused = server.get("/health", headers={"Origin": "null", "Host": "evil.example"})
        assert refused.status_code == 403 and refused.json()["error"]["code"] == "host_not_allowed"


def test_without_the_option_a_preflight_request_is_refused() -> None:
    with serving() as server:
        assert preflight(server, CHAT, OBSIDIAN).status_code == 403
        own = preflight(server, CHAT, f"http://127.0.0.1:{server.port}")
        assert own.status_code == 405 and "vary" not in own.headers


def test_an_origin_is_compared_as_browsers_write_it() -> None:
    access = Access(origins=("HTTPS://Example.com:443", "file://"))
    assert access.allows("https://example.com") and access.allows("file://")
    assert not access.allows("https://example.com:8443") and not access.allows("null")


# -- hosts and keys --------------------------------------------------------------------------------------------


def test_further_hosts() -> None:
    with serving(access=Access(hosts=("Host.Docker.Internal", "[fe80::1]"))) as server:
        for host in ("host.docker.internal", "HOST.docker.internal:8080", "[fe80::1]:1", "localhost"):
            assert server.get("/health", headers={"Host": host}).status_code == 200, host
        assert server.get("/health", headers={"Host": "docker.internal"}).status_code == 403
        origin = {"Host": "host.docker.internal:8080", "Origin": "http://host.docker.internal:8080"}
        assert server.post(CHAT, SHORT, headers=origin).status_code == 200


def test_both_kinds_of_key(server: Server) -> None:
    for headers, status in (
        ({"x-api-key": "sesame"}, 200),
        ({"x-api-key": "wrong", **KEY}, 200),
        ({"x-api-key": "sesame", "Authorization": "Bearer none"}, 200),
        ({"x-api-key": "wrong"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "sésame".encode("latin-1")}, 401),
    ):
        assert server.get("/v1/models", headers=headers).status_code == status, headers


# -- wrong values ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"origins": ("http://localhost:3000/",)}, "without a path"),
        ({"origins": ("localhost:3000",)}, "--allow-origin is 'localhost:3000'"),
        ({"origins": ("http://",)}, "--allow-origin"),
        ({"origins": ("http://*",)}, "--allow-origin"),
        ({"origins": ("https://*.example.com",)}, "--allow-origin"),
        ({"origins": ("http://user@example.com",)}, "--allow-origin"),
        ({"origins": ("",)}, "--allow-origin is ''"),
        ({"hosts": ("",)}, "--allow-host is ''"),
        ({"hosts": ("host.docker.internal:8080",)}, "without a port"),
        ({"hosts": ("http://a",)}, "--allow-host"),
        ({"hosts": ("*",)}, "--allow-host"),
        ({"names": ("",)}, "--name is ''"),
        ({"names": (" a",)}, "--name is ' a'"),
        ({"names": ("a\nb",)}, "--name"),
        ({"key": ""}, "the API key"),
    ],
)
def test_values_that_no_request_could_match(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as refused:
        Access(**wrong).check()
    assert message in str(refused.value)


def test_right_values() -> None:
    Access(
        origins=("*", "null", OBSIDIAN, "vscode-webview://*", "file://", "https://example.com", "http://[::1]:3000"),
        hosts=("host.docker.internal", "my_mac", "10.0.0.7", "fe80::1", "[::1]"),
        names=("gpt-5", "owner/model", "Größe 2"),
    ).check()


def test_the_command_refuses_them() -> None:
    command = [sys.executable, "-m", "mlx_flash.server", "--port", "0", "--allow-origin", "http://a/b"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 2 and "without a path" in done.stderr and done.stdout == ""


def test_what_is_described_is_there(server: Server) -> None:
    described = server.get("/openapi.json", headers=KEY).json()
    assert described["openapi"].startswith("3.") and len(described["paths"]) > 12
    for path, methods in described["paths"].items():
        if path.startswith("/library"):  # This server has no other models; test_server_models.py asks for these.
            continue
        for method in methods:
            if method == "get":
                name = path.replace("{name}", "default")
                assert server.get(name, headers=KEY).status_code == 200, path
            else:
                refused = server.post(path, {"messages": 5, "model": 5}, headers=KEY)
                assert refused.status_code == 400 and "error" in refused.json(), path
