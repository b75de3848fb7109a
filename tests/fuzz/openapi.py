"""An OpenAPI description of the server, made from the models that check its requests."""

from __future__ import annotations

from typing import Any

from mlx_flash.server.apis.openai_chat import ChatRequest
from mlx_flash.server.apis.openai_completions import CompletionRequest
from mlx_flash.server.apis.responses import ELSEWHERE, ResponsesRequest

ANSWER_TOKENS = 3  # tokens of a valid request; few, because the fuzzer looks for errors, not for long texts
ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string", "minLength": 1},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
REFUSED = {"description": "refused", "content": {"application/json": {"schema": ERROR}}}
PROBLEMS = {str(status): REFUSED for status in (400, 403, 404, 405, 408, 413, 429)}
OBJECT = {"schema": {"type": "object"}}  # in a stream: each event
ANY = {"description": "the answer", "content": {"application/json": OBJECT}}
EVENTS = {"description": "an answer", "content": {"application/json": OBJECT, "text/event-stream": OBJECT}}
REQUESTS: dict[str, type[ChatRequest] | type[CompletionRequest] | type[ResponsesRequest]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/v1/responses": ResponsesRequest,
}


def description() -> dict[str, Any]:
    components: dict[str, Any] = {}

    def body_of(model: type[ChatRequest] | type[CompletionRequest] | type[ResponsesRequest]) -> dict[str, Any]:
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        components.update(schema.pop("$defs", {}))
        limit = "max_tokens"
        if model is ResponsesRequest:
            limit = "max_output_tokens"
            for name in ELSEWHERE:
                schema["properties"].pop(name, None)
        for name in (limit, "max_completion_tokens"):
            if name in schema["properties"]:
                schema["properties"][name] = {"type": "integer", "minimum": 1, "maximum": ANSWER_TOKENS}
        schema["required"] = [*schema["required"], limit]
        return {"required": True, "content": {"application/json": {"schema": schema}}}

    def get(path: str, answer: dict[str, Any] = ANY, **parameters: Any) -> None:
        paths[path] = {"get": {"responses": {"200": answer, **PROBLEMS}, **parameters}}

    paths: dict[str, Any] = {
        path: {"post": {"requestBody": body_of(model), "responses": {"200": EVENTS, **PROBLEMS}}}
        for path, model in REQUESTS.items()
    }
    name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}}
    get("/v1/models")
    get("/v1/models/{name}", parameters=[name])
    get("/health")
    get("/stats")
    get("/metrics", {"description": "for Prometheus", "content": {"text/plain": {"schema": {"type": "string"}}}})
    return {
        "openapi": "3.1.0",
        "info": {"title": "mlx_flash", "version": "1"},
        "paths": paths,
        "components": {"schemas": components},
    }
