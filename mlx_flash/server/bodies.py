"""Request bodies: bounded each, and all of them together."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request

from .errors import ApiError

MOST_BYTES = 4 << 20  # of one body
MOST_BYTES_TOGETHER = 16 << 20  # of those that are being read and understood; part of the process's share of the plan


class Bodies:
    def __init__(self) -> None:
        self.bytes = 0  # held now

    @contextlib.asynccontextmanager
    async def json_of(self, request: Request) -> AsyncIterator[Any]:
        """The body as JSON; its bytes are counted until the block ends. Raises ApiError."""
        taken = 0
        chunks = []
        try:
            if int(request.headers.get("content-length") or 0) > MOST_BYTES:  # uvicorn has checked that it is a number
                raise _too_large()
            async for chunk in request.stream():
                taken += len(chunk)
                self.bytes += len(chunk)
                if taken > MOST_BYTES:
                    raise _too_large()
                if self.bytes > MOST_BYTES_TOGETHER:
                    raise ApiError(429, "too much is being sent at once; try again later.", retry_after_s=5)
                chunks.append(chunk)
            try:
                body = json.loads(b"".join(chunks))
            except (ValueError, RecursionError) as error:
                raise ApiError(400, f"the body is no JSON: {error}.", code="invalid_json") from None
            yield body
        finally:
            self.bytes -= taken


def _too_large() -> ApiError:
    return ApiError(413, f"the body is larger than {MOST_BYTES >> 20} MiB.", code="body_too_large")
