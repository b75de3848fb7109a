"""The routes of the server, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp

from .access import Access
from .answering import Answering, LateStream, RequestTurn, answer
from .api_errors import ApiError
from .apis.answer_form import AnswerForm
from .apis.anthropic import MessagesForm, MessagesRequest, TokenCountRequest
from .apis.error_forms import error_response
from .apis.ollama import (
    OllamaChatForm,
    OllamaChatRequest,
    OllamaGenerateForm,
    OllamaGenerateRequest,
)
from .apis.openai_chat import ChatForm, ChatRequest
from .apis.openai_common import parse
from .apis.openai_completions import CompletionForm, CompletionRequest
from .apis.recent_items import RecentItems
from .apis.responses import ResponsesRequest
from .apis.responses_answer import ResponsesForm
from .bodies import Bodies
from .engine import FAILED, LOADING, Engine
from .guard import Guard
from .library import Library
from .metrics import exposition
from .model_routes import ModelRoutes
from .ollama_model import AboutModel
from .openapi import description
from .preparing import jobs_for
from .prompts import encode_dialogue
from .stats_report import statistics
from .streams import EventStream, Gone, unless_gone

PAGE = Path(__file__).parent / "page"
FRESH = {"Cache-Control": "no-cache"}  # A newer server must not be used with an older page.


def make_app(engine: Engine, access: Access, library: Library | None = None) -> ASGIApp:
    """The server's ASGI application. library: the models that it may load; None for its first one alone."""
    routes = Routes(engine, access, library)
    app = Starlette(
        routes=[
            *routes.api("/v1"),
            *routes.api(""),  # for clients whose base URL lacks /v1
            *routes.ollama(),
            Route("/openapi.json", routes.openapi),
            Route("/health", routes.health),
            Route("/stats", routes.stats),
            Route("/metrics", routes.metrics),
            Route("/events", routes.events),
            Route("/library", routes.models.listing),
            Route("/library/load", routes.models.load, methods=["POST"]),
            Route("/library/unload", routes.models.unload, methods=["POST"]),
            Route("/", routes.page),
            *([Mount("/page", _PageFiles(directory=PAGE))] if PAGE.is_dir() else []),
        ],
        exception_handlers={
            ApiError: _refused,
            HTTPException: _http_error,
            ClientDisconnect: _left,
            Gone: _left,
            Exception: _unexpected,
        },
    )
    return Guard(app, access)


class _PageFiles(StaticFiles):
    def file_response(self, *arguments: Any, **options: Any) -> Response:
        response = super().file_response(*arguments, **options)
        response.headers.update(FRESH)
        return response


class Routes:
    def __init__(self, engine: Engine, access: Access, library: Library | None) -> None:
        self.engine = engine
        self.bodies = Bodies()
        self.models = ModelRoutes(engine, access, library, self.bodies)
        self.recent = RecentItems()

    def api(self, prefix: str) -> list[Route]:
        """The routes of OpenAI's and Anthropic's APIs."""
        return [
            self._answers(f"{prefix}/chat/completions", ChatRequest, ChatForm),
            self._answers(f"{prefix}/completions", CompletionRequest, CompletionForm),
            self._answers(f"{prefix}/responses", ResponsesRequest, partial(ResponsesForm, recent=self.recent)),
            self._answers(f"{prefix}/messages", MessagesRequest, MessagesForm),
            Route(f"{prefix}/messages/count_tokens", self.count_tokens, methods=["POST"]),
            Route(f"{prefix}/responses/{{id}}", self.response, methods=["GET", "DELETE"]),
            Route(f"{prefix}/models", self.models.models),
            Route(f"{prefix}/models/{{name:path}}", self.models.model),
        ]

    def ollama(self) -> list[Route]:
        """The routes of Ollama's API."""
        about = AboutModel(self.engine, self.models)
        return [
            self._answers("/api/chat", OllamaChatRequest, OllamaChatForm),
            self._answers("/api/generate", OllamaGenerateRequest, OllamaGenerateForm),
            Route("/api/show", about.show, methods=["POST"]),
            Route("/api/tags", about.tags),
            Route("/api/ps", about.ps),
            Route("/api/version", about.version),
        ]

    def _answers(self, path: str, kind: type[Any], form: Callable[..., AnswerForm]) -> Route:
        """The route of requests that the model answers. kind: their class, form: that of the answers, of one API."""

        async def respond(request: Request) -> Response:
            engine = self.engine
            async with contextlib.AsyncExitStack() as held:
                asked = await held.enter_async_context(self._parsed(request, kind))
                if isinstance(asked, ResponsesRequest):
                    asked.find_references(self.recent)
                turn = held.enter_context(RequestTurn(engine, await self.models.named(asked.model)))

                async def prepare() -> tuple[list[dict[str, Any]], AnswerForm]:
                    flash = engine.model.flash
                    question = asked.question(asked.sampling(flash.vocabulary, flash.defaults))
                    return await asyncio.to_thread(jobs_for, engine, question), form(asked, engine.name)

                stream = bool(asked.stream)
                if not turn.has_come:
                    if stream:
                        return LateStream(turn, prepare, form(asked, engine.name), held.pop_all())
                    await unless_gone(request.receive, turn.come())
                jobs, made = await prepare()
                if not jobs:
                    return JSONResponse(made.whole([]))
                answering = Answering(turn, jobs, made)
            return await answer(request, answering, stream)

        return Route(path, respond, methods=["POST"])

    async def response(self, request: Request) -> Response:
        raise ApiError(404, f"there is no response {request.path_params['id']!r:.80}: this server keeps no responses.")

    async def count_tokens(self, request: Request) -> Response:
        async with self._parsed(request, TokenCountRequest) as asked:
            with RequestTurn(self.engine, await self.models.named(asked.model), limited=False) as turn:
                if not turn.has_come:
                    await unless_gone(request.receive, turn.come())
                ids, _ = await asyncio.to_thread(encode_dialogue, self.engine, asked.dialogue())
        return JSONResponse({"input_tokens": len(ids)})

    @contextlib.asynccontextmanager
    async def _parsed(self, request: Request, kind: type[Any]) -> AsyncIterator[Any]:
        """The checked request, an instance of `kind`. Its body counts as held until the block ends."""
        self.engine.check_ready()
        _check_encoding(request)
        context, images = self.engine.bounds
        async with self.bodies.body_of(request, context, images) as body:
            asked = parse(kind, body)
            del body  # which is large if it has images
            asked.check()
            yield asked

    async def openapi(self, _request: Request) -> Response:
        return JSONResponse(description())

    async def health(self, _request: Request) -> Response:
        engine = self.engine
        if engine.state == LOADING and not engine.opened:
            return JSONResponse({"status": "loading"}, 503, {"Retry-After": "2"})
        if engine.state == FAILED and not engine.opened:
            return JSONResponse({"status": "failed", "error": engine.failure}, 500)
        engine.check_ready()
        return JSONResponse({"status": "ok", "model": engine.name})

    async def stats(self, _request: Request) -> Response:
        self.engine.check_ready()
        return JSONResponse(statistics(self.engine))

    async def metrics(self, _request: Request) -> Response:
        self.engine.check_ready()
        return Response(exposition(statistics(self.engine)), media_type="text/plain; version=0.0.4; charset=utf-8")

    async def events(self, request: Request) -> Response:
        self.engine.check_ready()
        if request.method == "HEAD":  # The stream of events would never end.
            return Response(headers=EventStream.HEADERS, media_type=EventStream.media_type)
        return EventStream(self.engine.hub.listen())

    async def page(self, request: Request) -> Response:
        accepted = request.headers.get("accept") or "*/*"
        if "html" not in accepted and "*/*" not in accepted:
            return PlainTextResponse("Ollama is running")  # the answer that Ollama's clients look for
        if not (PAGE / "index.html").is_file():
            raise ApiError(404, "this installation lacks the page. Reinstall mlx-flash-runtime.")
        return FileResponse(PAGE / "index.html", headers=FRESH)


def _check_encoding(request: Request) -> None:
    """Raises ApiError for a compressed body."""
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise ApiError(
            415, f"the body is encoded as {encoding!r:.40}; send it without encoding.", code="unsupported_encoding"
        )


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error_response(request.scope, error)


async def _left(_request: Request, _error: Exception) -> Response:
    return Response(status_code=499)  # The client has left, so it is never read.


async def _http_error(request: Request, error: Exception) -> Response:
    """Answers Starlette's own errors: an unknown path, or a method that is not allowed."""
    assert isinstance(error, HTTPException)
    message, headers = f"{request.method} {request.url.path:.200}: {error.detail}.", dict(error.headers or {})
    if error.status_code == 404:
        message = f"this server has no path {request.url.path:.200}; GET /openapi.json lists those that it has."
    elif error.status_code == 405:
        # Starlette's static files do not list their methods.
        methods = sorted(headers.get("Allow", "GET, HEAD").split(", "))
        message = f"{request.url.path:.200} does not allow {request.method:.20}; use {' or '.join(methods)}."
        headers = {"Allow": ", ".join(methods)}
    response = error_response(request.scope, ApiError(error.status_code, message))
    response.headers.update(headers)
    return response


async def _unexpected(request: Request, error: Exception) -> Response:
    return error_response(request.scope, ApiError(500, f"this request failed: {type(error).__name__}: {error}"))
