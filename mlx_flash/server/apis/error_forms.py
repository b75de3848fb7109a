"""The form of an error in the API that a request speaks."""

from __future__ import annotations

from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import Scope

from ..api_errors import ApiError, PromptTooLong

ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
OVERLOADED = 529  # Anthropic's status in place of 503


def anthropic_error(error: ApiError) -> dict[str, Any]:
    kind = ANTHROPIC_TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    message = error.message
    if isinstance(error, PromptTooLong):  # Clients recognise this by its text, and shorten the conversation.
        message = f"prompt is too long: {error.tokens} tokens > {error.most} maximum: {message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


def ollama_error(error: ApiError) -> dict[str, Any]:
    return {"error": error.message}


def speaks_anthropic(scope: Scope) -> bool:
    """Whether a request comes from a client of Anthropic's API, which shares some paths with OpenAI's."""
    return "anthropic-version" in Headers(scope=scope) or "messages" in scope["path"].split("/")


def error_response(scope: Scope, error: ApiError) -> JSONResponse:
    """The answer with an error, in the form of the request's API."""
    body, status = error.body(), error.status
    if scope["path"].startswith("/api/"):
        body = ollama_error(error)
    elif speaks_anthropic(scope):
        body, status = anthropic_error(error), OVERLOADED if status == 503 else status
    return JSONResponse(body, status, error.headers)
