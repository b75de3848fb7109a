"""Access control: checks the API key if there is one, and refuses requests from pages of other sites."""

from __future__ import annotations

import asyncio
import hmac
import re
from urllib.parse import unquote

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from . import connections
from .access import ALL, Access
from .api_errors import ApiError
from .apis.error_forms import error_response

HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([a-z0-9_.-]+))(?::[0-9]{1,5})?", re.IGNORECASE)
ABSOLUTE = re.compile(rb"https?://([^/]*)(/.*)?", re.IGNORECASE)
CONTENT_POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
ANSWER_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"content-security-policy", CONTENT_POLICY.encode()),
)
METHODS = "GET, HEAD, POST"
PREFLIGHT_S = 600  # Browsers may keep the answer to a preflight request for this time.
NAMED_HEADERS = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~, -]*")


class Guard:
    """Wraps the application and refuses requests that are not allowed.

    Without a key, the Host must be a loopback name, or the name that the server is bound to. This prevents DNS
    rebinding, where an attacker points the name of his own page at 127.0.0.1. With a key, every request needs it,
    except those for /health and the page's own files. In both cases, requests from pages of another origin are refused,
    unless that origin is allowed. Its pages may then read every answer, and their preflight requests need no key.

    At most `connections.MOST` requests are answered at once.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self.app, self.access, self.key = app, access, access.key
        names = (name.lower().removeprefix("[").removesuffix("]") for name in (access.host, *access.hosts))
        self.hosts = {"localhost", "127.0.0.1", "::1", *names}
        self.answering = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return

        scope = _in_origin_form(scope)
        headers = Headers(scope=scope)
        added = [*ANSWER_HEADERS, *self._sharing(headers)]
        begun = False

        async def send_more(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        self.answering += 1
        try:
            self._check_source(headers)
            if scope["method"] == "OPTIONS" and self.access.origins and "access-control-request-method" in headers:
                await _preflight(headers)(scope, receive, send_more)
                return
            self._check_key(scope["path"], headers)
            await self.app(scope, receive, send_more)
        except (ApiError, asyncio.CancelledError) as refused:
            # uvicorn cancels the request if the server stops and this client takes longer than the grace period.
            error = refused if isinstance(refused, ApiError) else ApiError(503, "the server is stopping.")
            if not begun:
                await error_response(scope, error)(scope, receive, send_more)
        finally:
            self.answering -= 1

    def _sharing(self, headers: Headers) -> list[tuple[bytes, bytes]]:
        """The headers of an answer that let a page of an allowed origin read it."""
        if not self.access.origins:
            return []
        origin = headers.get("origin")
        every = ALL in self.access.origins
        shared = [] if every else [(b"vary", b"Origin")]
        if origin is not None and self.access.allows(origin):
            shared.append((b"access-control-allow-origin", b"*" if every else origin.encode("latin-1")))
        return shared

    def _check_source(self, headers: Headers) -> None:
        """Raises ApiError for a request that comes from elsewhere, or that is one too many."""
        if self.answering > connections.MOST:
            raise ApiError(
                503, f"{connections.MOST} requests are being answered, which is the limit; try again later.",
                code="too_many_requests", retry_after_s=5,
            )  # fmt: skip
        host = headers.get("host", "")
        if self.key is None and not host.strip():
            message = "the request has no Host header; send one, such as `Host: 127.0.0.1`."
            raise ApiError(400, message, code="host_missing")
        if self.key is None and _name_of(host) not in self.hosts:
            raise ApiError(
                403, f"this server is not {host!r:.80}; use http://127.0.0.1 or localhost.", code="host_not_allowed"
            )
        for origin in headers.getlist("origin"):
            own = origin.lower() in (f"http://{host}".lower(), f"https://{host}".lower())
            if not own and not self.access.allows(origin):
                raise ApiError(403, f"pages from {origin!r:.80} may not use this server.", code="origin_not_allowed")

    def _check_key(self, path: str, headers: Headers) -> None:
        """Raises ApiError for a request that needs the key and does not carry it."""
        if self.key is None or path in ("/", "/health", "/favicon.ico") or path.startswith("/page/"):
            return
        scheme, _, given = headers.get("authorization", "").partition(" ")
        offered = [given.strip()] if scheme.lower() == "bearer" else []
        offered += headers.getlist("x-api-key")  # Anthropic's clients
        if not any([hmac.compare_digest(key.encode(), self.key.encode()) for key in offered]):
            raise ApiError(
                401,
                "the API key is missing or wrong; send `Authorization: Bearer KEY` or `x-api-key: KEY`.",
                code="invalid_api_key",
            )


def _preflight(headers: Headers) -> Response:
    """The answer to a browser that asks what a page of an allowed origin may send."""
    asked = headers.get("access-control-request-headers", "")
    allowed = {"Access-Control-Allow-Headers": asked} if NAMED_HEADERS.fullmatch(asked) and asked else {}
    return Response(
        status_code=204,
        headers={
            "Access-Control-Allow-Methods": METHODS,
            **allowed,
            "Access-Control-Max-Age": str(PREFLIGHT_S),
            "Vary": "Access-Control-Request-Method, Access-Control-Request-Headers",
        },
    )


def _in_origin_form(scope: Scope) -> Scope:
    """Turns a request for a whole URL, as sent to a proxy, into one for its path, with the URL's host as Host."""
    target = ABSOLUTE.fullmatch(scope.get("raw_path") or b"")
    if target is None:
        return scope
    headers = [(name, value) for name, value in scope["headers"] if name != b"host"]
    path = target[2] or b"/"
    return {**scope, "raw_path": path, "path": unquote(path), "headers": [(b"host", target[1]), *headers]}


def _name_of(host: str) -> str:
    """The name without its port and without the brackets of an IPv6 address; empty if invalid, such as "user@"."""
    found = HOST.fullmatch(host)
    return "" if found is None else (found[1] or found[2]).lower()
