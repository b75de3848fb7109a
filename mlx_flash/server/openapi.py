"""The OpenAPI description of the server, at /openapi.json. It comes from the classes that check the requests."""

from __future__ import annotations

import functools
from typing import Any

from pydantic import BaseModel

from .. import __version__
from .apis.anthropic import MessagesRequest, TokenCountRequest
from .apis.ollama import OllamaChatRequest, OllamaGenerateRequest
from .apis.openai_chat import ChatRequest
from .apis.openai_completions import CompletionRequest
from .apis.responses import ELSEWHERE, ResponsesRequest
from .model_routes import LoadRequest

Schema = dict[str, Any]


def _object(**properties: Schema) -> Schema:
    return {"type": "object", "required": list(properties), "properties": properties}


TEXT = {"type": "string", "minLength": 1}
TEXT_OR_NULL = {"type": ["string", "null"]}
ERRORS = {  # in the form of each API
    "openai": _object(error=_object(message=TEXT, type=TEXT, param=TEXT_OR_NULL, code=TEXT_OR_NULL)),
    "anthropic": _object(type={"const": "error"}, error=_object(type=TEXT, message=TEXT)),
    "ollama": _object(error=TEXT),
}
PROBLEMS = (400, 401, 403, 404, 405, 408, 413, 415, 429, 500, 503, 529)
SSE, NDJSON = "text/event-stream", "application/x-ndjson"
REQUESTS: dict[str, tuple[type[BaseModel], str, str | None]] = {  # path -> (request, API, media type of a stream)
    "/v1/chat/completions": (ChatRequest, "openai", SSE),
    "/v1/completions": (CompletionRequest, "openai", SSE),
    "/v1/responses": (ResponsesRequest, "openai", SSE),
    "/v1/messages": (MessagesRequest, "anthropic", SSE),
    "/v1/messages/count_tokens": (TokenCountRequest, "anthropic", None),
    "/api/chat": (OllamaChatRequest, "ollama", NDJSON),
    "/api/generate": (OllamaGenerateRequest, "ollama", NDJSON),
}
GETS = {
    "/v1/models": "openai",
    "/health": "openai",
    "/stats": "openai",
    "/library": "openai",
    "/api/tags": "ollama",
    "/api/ps": "ollama",
    "/api/version": "ollama",
}
NOT_DESCRIBED: dict[type[BaseModel], set[str]] = {
    ResponsesRequest: set(ELSEWHERE)
}  # fields that are only there to be refused with a hint


@functools.cache
def description() -> Schema:
    """The description. Do not change it."""
    schemas: dict[str, Schema] = {f"{api}_error": schema for api, schema in ERRORS.items()}
    paths: dict[str, Schema] = {}
    for path, (request, api, stream) in REQUESTS.items():
        schema = request.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(schema.pop("$defs", {}))
        for name in NOT_DESCRIBED.get(request, ()):
            schema["properties"].pop(name, None)
        schemas[request.__name__] = schema
        body = {"required": True, "content": _json({"$ref": f"#/components/schemas/{request.__name__}"})}
        answers = _json({"type": "object"}) | ({stream: {"schema": {}}} if stream else {})
        paths[path] = {"post": {"requestBody": body, "responses": _responses(answers, api)}}
    schemas["LoadRequest"] = LoadRequest.model_json_schema()
    accepted = _json({"type": "object"})
    order = {"required": True, "content": _json({"$ref": "#/components/schemas/LoadRequest"})}
    paths["/library/load"] = {"post": {"requestBody": order, "responses": _responses(accepted, "openai", "202")}}
    paths["/library/unload"] = {"post": {"responses": _responses(accepted, "openai", "202")}}
    for path, api in GETS.items():
        paths[path] = {"get": {"responses": _responses(_json({"type": "object"}), api)}}
    parameter = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    responses = _responses(_json({"type": "object"}), "openai")
    paths["/v1/models/{name}"] = {"get": {"parameters": [parameter], "responses": responses}}
    text = {"text/plain": {"schema": {"type": "string"}}}
    paths["/metrics"] = {"get": {"responses": _responses(text, "openai")}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx_flash", "version": __version__},
        "paths": paths,
        "components": {"schemas": schemas, "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}}},
        "security": [{}, {"key": []}],
    }


def _json(schema: Schema) -> Schema:
    return {"application/json": {"schema": schema}}


def _responses(content: Schema, api: str, status: str = "200") -> Schema:
    refused = {"description": "refused", "content": _json({"$ref": f"#/components/schemas/{api}_error"})}
    answers = {status: {"description": "the answer", "content": content}}
    return answers | {str(problem): refused for problem in PROBLEMS}
