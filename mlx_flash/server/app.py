"""The routes of the server, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import time
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

from .access import DEFAULT_MODEL, Access
from .answering import answer
from .api_errors import ApiError
from .apis.answer_form import AnswerForm
from .apis.anthropic import MessagesForm, MessagesRequest, TokenCountRequest, anthropic_model, anthropic_models
from .apis.error_forms import error_response, speaks_anthropic
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
from .metrics import exposition
from .ollama_model import AboutModel
from .openapi import description
from .preparing import jobs_for
from .prompts import encode_dialogue
from .stats_report import statistics
from .streams import EventStream, Gone

PAGE = Path(__file__).parent / "page"
FRESH = {"Cache-Control": "no-cache"}  # A newer server must not be used with an older page.


def make_app(engine: Engine, access: Access) -> ASGIApp:
    """The server's ASGI application."""
    routes = Routes(engine, access)
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
    def __init__(self, engine: Engine, access: Access) -> None:
        self.engine = engine
        self.names = tuple(dict.fromkeys((engine.name, *access.names)))
        self.strict_names = access.strict_names
        self.bodies = Bodies()
        self.recent = RecentItems()
        self.created = int(time.time())

    def api(self, prefix: str) -> list[Route]:
        """The routes of OpenAI's and Anthropic's APIs."""
        return [
            self._answers(f"{prefix}/chat/completions", ChatRequest, ChatForm),
            self._answers(f"{prefix}/completions", CompletionRequest, CompletionForm),
            self._answers(f"{prefix}/responses", ResponsesRequest, partial(ResponsesForm, recent=self.recent)),
            self._answers(f"{prefix}/messages", MessagesRequest, MessagesForm),
            Route(f"{prefix}/messages/count_tokens", self.count_tokens, methods=["POST"]),
            Route(f"{prefix}/responses/{{id}}", self.response, methods=["GET", "DELETE"]),
            Route(f"{prefix}/models", self.models),
            Route(f"{prefix}/models/{{name:path}}", self.model),
        ]

    def ollama(self) -> list[Route]:
        """The routes of Ollama's API."""
        about = AboutModel(self.engine)
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
            async with self._parsed(request, kind) as asked:
                if isinstance(asked, ResponsesRequest):
                    asked.find_references(self.recent)
                question = asked.question(asked.sampling(engine.model.flash.vocabulary, engine.model.flash.defaults))
                jobs = await asyncio.to_thread(jobs_for, engine, question)
            return await answer(request, engine, jobs, form(asked, engine.name), bool(asked.stream))

        return Route(path, respond, methods=["POST"])

    async def response(self, request: Request) -> Response:
        raise ApiError(404, f"there is no response {request.path_params['id']!r:.80}: this server keeps no responses.")

    async def count_tokens(self, request: Request) -> Response:
        async with self._parsed(request, TokenCountRequest) as asked:
            ids, _ = await asyncio.to_thread(encode_dialogue, self.engine, asked.dialogue())
        return JSONResponse({"input_tokens": len(ids)})

    @contextlib.asynccontextmanager
    async def _parsed(self, request: Request, kind: type[Any]) -> AsyncIterator[Any]:
        """The checked request, an instance of `kind`. Its body counts as held until the block ends."""
        self.engine.check_ready()
        _check_encoding(request)
        flash = self.engine.model.flash
        async with self.bodies.body_of(request, flash.plan.context, flash.images is not None) as body:
            asked = parse(kind, body)
            del body  # which is large if it has images
            asked.check()
            if self.strict_names and asked.model:
                self._known(asked.model)
            yield asked

    def _known(self, model: str) -> str:
        """The name in the list of models. Raises ApiError if `model` does not name the loaded model."""
        if model == DEFAULT_MODEL:
            return self.engine.name
        if model.removesuffix(":latest") in self.names:  # Ollama's clients add the tag.
            model = model.removesuffix(":latest")
        if model not in self.names:
            raise ApiError(
                404,
                f"there is no model {model!r:.200}; this server runs {self.engine.name!r}.",
                param="model",
                code="model_not_found",
            )
        return model

    def _entry(self, name: str) -> dict[str, Any]:
        """A model in OpenAI's form. Once it is loaded, with the planned context, in the words of other servers."""
        entry = {"id": name, "object": "model", "created": self.created, "owned_by": "mlx_flash"}
        if not self.engine.ready:
            return entry
        context = self.engine.model.flash.plan.context
        return {**entry, "context_length": context, "max_model_len": context}

    async def models(self, request: Request) -> Response:
        if speaks_anthropic(request.scope):
            return JSONResponse(anthropic_models(self.engine.name, self.created))
        return JSONResponse({"object": "list", "data": [self._entry(name) for name in self.names]})

    async def model(self, request: Request) -> Response:
        if not request.path_params["name"]:
            return await self.models(request)
        if speaks_anthropic(request.scope) and not self.strict_names:
            return JSONResponse(anthropic_model(self.engine.name, self.created))
        return JSONResponse(self._entry(self._known(request.path_params["name"])))

    async def openapi(self, _request: Request) -> Response:
        return JSONResponse(description())

    async def health(self, _request: Request) -> Response:
        engine = self.engine
        if engine.state == LOADING:
            return JSONResponse({"status": "loading"}, 503, {"Retry-After": "2"})
        if engine.state == FAILED:
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
