"""Reads request bodies. Limits the size and the time of each, and the size of all together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from starlette.requests import Request

from .api_errors import ApiError

# A hostile body can take thirty times its size once it is parsed, and the memory plan leaves little room for it.
MOST_BYTES = 1 << 20  # size limit of one body, or BYTES_PER_TOKEN for each token of the context if that is more
BYTES_PER_TOKEN = 16
MOST_IMAGE_BYTES = 12 << 20  # size limit of one body where the model reads images: 8 MiB of them in base64, and a text
MOST_BODIES = 4  # number of bodies of that size that may be held at the same time
BODY_S = 60.0  # time limit for receiving a body
HELD_S = 2.0  # After this time an unfinished body may be dropped to make room for another.


class _Body:
    """A body that is being received, then parsed. What was parsed stays in memory while its model is loaded."""

    def __init__(self, began: float) -> None:
        self.began, self.bytes = began, 0
        self.chunks: list[bytes] = []
        self.coming = True
        self.limit: asyncio.Timeout | None = None  # timeout of the wait for its next bytes


class Bodies:
    def __init__(self) -> None:
        self._held: list[_Body] = []  # oldest first

    @property
    def held_bytes(self) -> int:
        return sum(body.bytes for body in self._held)

    @contextlib.asynccontextmanager
    async def body_of(self, request: Request, context: int, images: bool = False) -> AsyncIterator[bytes]:
        """The whole body; it counts as held until the block ends.

        context: in tokens. images: whether it may have images. Raises ApiError.
        """
        most = max(MOST_IMAGE_BYTES if images else MOST_BYTES, BYTES_PER_TOKEN * context)
        if int(request.headers.get("content-length") or 0) > most:  # uvicorn has checked that it is a number.
            raise _too_large(most)
        body = _Body(asyncio.get_running_loop().time())
        self._held.append(body)
        try:
            await self._receive(body, request, most)
            whole = [b"".join(body.chunks)]
            body.chunks.clear()  # so that it is in memory once
            yield whole.pop()
        finally:
            self._let_go(body)

    async def _receive(self, body: _Body, request: Request, most: int) -> None:
        stream = request.stream()
        while True:
            try:
                async with asyncio.timeout_at(body.began + BODY_S) as body.limit:
                    chunk = await anext(stream)
            except StopAsyncIteration:
                break
            except TimeoutError:
                raise ApiError(408, "the body did not arrive in time; send it again, faster.") from None
            if body not in self._held:  # It was dropped while more of it arrived.
                raise ApiError(408, "the body did not arrive in time; send it again, faster.")
            if body.bytes + len(chunk) > most:
                raise _too_large(most)
            while self.held_bytes + len(chunk) > MOST_BODIES * most:
                self._make_room(body)
            body.bytes += len(chunk)
            body.chunks.append(chunk)
        body.coming = False

    def _make_room(self, newest: _Body) -> None:
        """Drops the oldest unfinished body. Raises ApiError if none is older than HELD_S."""
        now = asyncio.get_running_loop().time()
        for body in self._held:
            if body is not newest and body.coming and now - body.began > HELD_S:
                self._let_go(body)
                assert body.limit is not None
                with contextlib.suppress(RuntimeError):  # Its timeout has expired already.
                    body.limit.reschedule(now)
                return
        message = "too many bytes of requests are arriving, or wait for a model to be loaded; try again later."
        raise ApiError(429, message, code="queue_full", retry_after_s=5)

    def _let_go(self, body: _Body) -> None:
        if body in self._held:
            self._held.remove(body)
        body.chunks.clear()


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes.", code="body_too_large")
