"""Request bodies: bounded each, and all of them together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.requests import Request

from .errors import ApiError

# Understood, a body takes up to thirty times its bytes, if somebody wants it to: the plan's process has little room.
MOST_BYTES = 1 << 20  # of one body, or BYTES_PER_TOKEN for each token of the context if that is more
BYTES_PER_TOKEN = 16
MOST_BODIES = 4  # of that size, at the same time
BODY_S = 60.0  # in which a body must have come


class Bodies:
    def __init__(self) -> None:
        self.bytes = 0  # held now

    @contextlib.asynccontextmanager
    async def body_of(self, request: Request, context: int) -> AsyncIterator[bytes]:
        """The whole body, counted until the block ends. context: the planned tokens. Raises ApiError."""
        most = max(MOST_BYTES, BYTES_PER_TOKEN * context)
        taken = 0
        chunks = []
        try:
            if int(request.headers.get("content-length") or 0) > most:  # uvicorn has checked that it is a number
                raise _too_large(most)
            async for chunk in _within(BODY_S, request):
                taken += len(chunk)
                self.bytes += len(chunk)
                if taken > most:
                    raise _too_large(most)
                if self.bytes > MOST_BODIES * most:
                    raise ApiError(429, "too much is being sent at once; try again later.", retry_after_s=5)
                chunks.append(chunk)
            yield b"".join(chunks)
        finally:
            self.bytes -= taken


async def _within(seconds: float, request: Request) -> AsyncGenerator[bytes, None]:
    """The body, as it comes. Raises ApiError if that takes too long: a connection is not kept for nothing."""
    stream = request.stream()
    deadline = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            async with asyncio.timeout_at(deadline):
                chunk = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise ApiError(408, f"the body did not arrive within {seconds:g} s.") from None
        yield chunk


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body is larger than {most} bytes.", code="body_too_large")
