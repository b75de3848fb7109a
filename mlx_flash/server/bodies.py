"""Request bodies: bounded each, and all of them together."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator

from starlette.requests import Request

from .errors import ApiError

MOST_BYTES = 4 << 20  # of one body
MOST_BYTES_TOGETHER = 16 << 20  # of those that are being read and understood; part of the process's share of the plan
BODY_S = 60.0  # in which a body must have come


class Bodies:
    def __init__(self) -> None:
        self.bytes = 0  # held now

    @contextlib.asynccontextmanager
    async def body_of(self, request: Request) -> AsyncIterator[bytes]:
        """The whole body, counted until the block ends. Raises ApiError."""
        taken = 0
        chunks = []
        try:
            if int(request.headers.get("content-length") or 0) > MOST_BYTES:  # uvicorn has checked that it is a number
                raise _too_large()
            async for chunk in _within(BODY_S, request):
                taken += len(chunk)
                self.bytes += len(chunk)
                if taken > MOST_BYTES:
                    raise _too_large()
                if self.bytes > MOST_BYTES_TOGETHER:
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


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MOST_BYTES >> 20} MiB.", code="body_too_large")
