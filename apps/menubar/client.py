"""The app's HTTP client for the server. Every call blocks, so use it from a thread that may wait."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

TIMEOUT_SECONDS = 10.0
ANSWER_TIMEOUT_SECONDS = 600.0  # between two pieces of an answer; nothing arrives while a long prompt is read


class ServerError(Exception):
    """The server's own error message, or a message that it does not answer."""


class Client:
    def __init__(self, url: str) -> None:
        """url: such as `http://127.0.0.1:8080`."""
        parts = urlsplit(url)
        self._host, self._port = parts.hostname or "127.0.0.1", parts.port or 80

    def health(self) -> dict[str, Any]:
        """The answer of /health. status: "ok" (with model), "loading" or "failed" (with error). Raises ServerError."""
        return self._get("/health", allowed=(200, 500, 503))

    def stats(self) -> dict[str, Any]:
        """The answer of /stats: plan, resident units, totals and the running request. Raises ServerError.

        What belongs to a model is None while none is loaded.
        """
        return self._get("/stats", allowed=(200,))

    def library(self) -> dict[str, Any]:
        """The answer of /library: the models, which one is loaded, and its budgets. Raises ServerError."""
        return self._get("/library", allowed=(200,))

    def load(self, name: str, memory: int | None) -> dict[str, Any]:
        """Asks for another model, or another budget in bytes. Returns the answer of /library. Raises ServerError."""
        budget = {} if memory is None else {"memory": f"{memory}B"}
        return self._post("/library/load", {"name": name, **budget})

    def unload(self) -> dict[str, Any]:
        """Asks the server to free the model's memory. Returns the answer of /library. Raises ServerError."""
        return self._post("/library/unload", {})

    def ask(self, question: str, max_tokens: int) -> ServerAnswer:
        """Sends a question. Iterate over the result for the pieces of the answer. Raises ServerError."""
        body = {
            "model": "default",
            "messages": [{"role": "user", "content": question}],
            "max_tokens": max_tokens,
            "stream": True,
        }
        return ServerAnswer(self._host, self._port, body)

    def _get(self, path: str, allowed: tuple[int, ...]) -> dict[str, Any]:
        return self._answer("GET", path, None, allowed)

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return self._answer("POST", path, json.dumps(body), allowed=(202,))

    def _answer(self, method: str, path: str, body: str | None, allowed: tuple[int, ...]) -> dict[str, Any]:
        headers = {} if body is None else {"Content-Type": "application/json"}
        connection = http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_SECONDS)
        with contextlib.closing(connection), _as_server_error():
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            content = _parsed(response.read())
            if response.status not in allowed:
                raise ServerError(_message(response.status, content))
            return content


class ServerAnswer:
    """The pieces of an answer as they arrive. `cancel`, from any thread, ends the iteration and the generation.

    Raises ServerError.
    """

    def __init__(self, host: str, port: int, body: dict[str, Any]) -> None:
        self.cancelled = False
        self._connection = http.client.HTTPConnection(host, port, timeout=ANSWER_TIMEOUT_SECONDS)
        with _as_server_error():
            self._connection.connect()
            self._socket = self._connection.sock  # The connection drops it once a response is read to its end.
            self._connection.request(
                "POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"}
            )

    def __iter__(self) -> Iterator[str]:
        try:
            with contextlib.closing(self._connection), _as_server_error():
                yield from self._pieces()
        except ServerError:
            if not self.cancelled:
                raise

    def cancel(self) -> None:
        self.cancelled = True
        with contextlib.suppress(OSError):  # already closed
            self._socket.shutdown(socket.SHUT_RDWR)

    def _pieces(self) -> Iterator[str]:
        with contextlib.closing(self._connection.getresponse()) as response:
            if response.status != 200:
                raise ServerError(_message(response.status, _parsed(response.read())))
            for line in response:
                if not line.startswith(b"data:"):
                    continue  # comments and empty lines
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = _parsed(data)
                if "error" in event:
                    raise ServerError(_message(200, event))
                for choice in event.get("choices", []):
                    if text := choice.get("delta", {}).get("content"):
                        yield text
        raise ServerError("the connection to the engine broke before the answer ended. Ask again.")


@contextlib.contextmanager
def _as_server_error() -> Iterator[None]:
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"the engine does not answer ({type(error).__name__}: {error}).") from None


def _parsed(content: bytes) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except ValueError:
        value = None
    return value if isinstance(value, dict) else {}


def _message(status: int, content: dict[str, Any]) -> str:
    error = content.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    return str(message or f"the engine answered with HTTP status {status}.")
