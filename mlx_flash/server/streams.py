"""Answers that notice at once when the client leaves, even while they wait for something else."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Coroutine
from typing import Any, ClassVar, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Result = TypeVar("Result")


class Gone(Exception):
    """The client has closed its connection."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`. If the client leaves first, `work` is cancelled and Gone is raised.

    The request's body must have been read before.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((working, leaving), return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise Gone
    finally:
        leaving.cancel()
        working.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # An error was raised above, or is not needed.
            await working  # Wait until it has released its resources.


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends server-sent events until `events` ends or the client leaves. `events` is closed in both cases."""

    media_type = "text/event-stream"
    HEADERS: ClassVar = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(headers=self.HEADERS)
        del self.headers["content-length"]
        self.events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(Gone, OSError):
            await unless_gone(receive, self._send(send))

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        async with contextlib.aclosing(self.events) as events:
            async for event in events:
                if not event:
                    continue
                await send({"type": "http.response.body", "body": event.encode(errors="replace"), "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
