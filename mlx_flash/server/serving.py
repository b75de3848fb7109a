"""Runs the HTTP server in its own thread, so that the main thread, which gets the signals, can own the model."""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
import time
from typing import Any

import uvicorn
from starlette.types import ASGIApp

from ..errors import FlashError, UsageError
from . import connections

GRACE_S = 3  # time for connections that are still open when the server stops
QUIET_S = 60.0  # time between two lines of one kind in the log
BACKLOG = 64  # number of connections that the system holds, and that are accepted at once

log = logging.getLogger(__name__)


def bind(host: str, port: int) -> socket.socket:
    """A bound, listening socket; port 0 takes any free one.

    Raises UsageError for an invalid host, FlashError if the port cannot be used.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise UsageError(f"--host {host!r:.80} is not an address of this machine: {error}.") from None
    # Without a named protocol asyncio does not set TCP_NODELAY, and each answer would wait for an acknowledgement.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(BACKLOG)
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


class Sparing(logging.Filter):
    """Lets one line of each kind into the log per QUIET_S, so that clients cannot fill the disk."""

    def __init__(self) -> None:
        super().__init__()
        self._said: set[str] = set()
        self._until = 0.0

    def filter(self, record: logging.LogRecord) -> bool:
        now = time.monotonic()
        if now >= self._until:
            self._said.clear()
            self._until = now + QUIET_S
        kind = str(record.msg)[:40]
        said = kind in self._said
        self._said.add(kind)
        return not said


SPARING = Sparing()  # A single instance, because a logger adds the same filter only once.


class HttpThread:
    """Runs uvicorn on a bound socket inside a `with` block."""

    def __init__(self, app: ASGIApp, bound: socket.socket) -> None:
        config = uvicorn.Config(
            app, http=connections.Connection, ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, backlog=BACKLOG, timeout_graceful_shutdown=GRACE_S,
            timeout_keep_alive=int(connections.REQUEST_S),
        )  # fmt: skip
        logger = logging.getLogger("uvicorn.error")
        logger.setLevel(logging.ERROR)  # Its warnings are about clients, one line for each.
        for kept in (logger, log):
            kept.addFilter(SPARING)
        self._server = uvicorn.Server(config)
        self._bound = bound
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), name="http", daemon=True)

    async def _run(self) -> None:
        asyncio.get_running_loop().set_exception_handler(_tell)
        await self._server.serve([self._bound])

    def __enter__(self) -> HttpThread:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._thread.join(2 * GRACE_S)
        self._bound.close()


def _tell(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Logs asyncio's errors. Without a free descriptor for a connection, it reports one a thousand times a second."""
    error = context.get("exception")
    expected = error is None or isinstance(error, OSError)
    log.error(f"{context['message']}: %s", error, exc_info=None if expected else error)
