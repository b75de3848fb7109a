"""The error that answers a request which cannot be served, in OpenAI's form."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import FlashError, GrammarError, ImageError
from ..source.failures import foreseen

log = logging.getLogger(__name__)


class ApiError(Exception):
    """An answer with a status other than 200. `body()` is {"error": {"message", "type", "param", "code"}}."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
        if status == 401:
            self.headers["WWW-Authenticate"] = "Bearer"

    @property
    def type(self) -> str:
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        return kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class PromptTooLong(ApiError):
    """A prompt that does not fit the context. tokens: at least so many it has. most: so many it may have."""

    def __init__(self, message: str, param: str, tokens: int, most: int) -> None:
        super().__init__(400, message, param=param, code="context_length_exceeded")
        self.tokens, self.most = tokens, most


def stopping() -> ApiError:
    return ApiError(503, "the server is stopping.", code="stopping")


def why_failed(error: Exception, job: str) -> ApiError:
    """The answer to a request whose generation raised an error. job: its id, for the log."""
    if isinstance(error, GrammarError):  # The grammar became too complex in the middle of the answer.
        return ApiError(400, str(error), code="invalid_grammar")
    if isinstance(error, ImageError):
        return ApiError(400, str(error), code="invalid_image")
    if isinstance(error, FlashError):
        return ApiError(500, str(error), code="read_failed")
    log.error("request %s failed", job, exc_info=error)
    what = foreseen(error) or f"{type(error).__name__}: {error}; the server's log has its traceback."
    return ApiError(500, f"this request failed: {what}", code="failed")
