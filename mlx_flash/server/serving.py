"""HTTP in a thread of its own, so that the main thread, which signals go to, can own the model."""

from __future__ import annotations

import ipaddress
import socket
import threading

import uvicorn
from starlette.types import ASGIApp

from ..errors import FlashError, UsageError

GRACE_S = 3  # for connections that are still open when the server stops


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens soon; port 0 for any free one. Raises FlashError if the port is taken."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r:.80} is no address of this machine: {error}.") from None
    bound = socket.socket(family, socket.SOCK_STREAM)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)
    except OSError as error:
        bound.close()
        raise FlashError(
            f"{host} port {port} cannot be used: {error.strerror}. Choose another with --port (0 for any free one)."
        ) from None
    return bound


def is_loopback(bound: socket.socket) -> bool:
    """Whether only this machine can reach it."""
    return ipaddress.ip_address(bound.getsockname()[0]).is_loopback


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class HttpThread:
    """uvicorn on a bound socket, from `with` to its end."""

    def __init__(self, app: ASGIApp, bound: socket.socket) -> None:
        config = uvicorn.Config(
            app, http="h11", ws="none", lifespan="off", log_level="warning", access_log=False,
            server_header=False, proxy_headers=False, timeout_graceful_shutdown=GRACE_S,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._bound = bound
        self._thread = threading.Thread(target=self._server.run, args=([bound],), name="http", daemon=True)

    def __enter__(self) -> HttpThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(2 * GRACE_S)
        self._bound.close()
