"""The server's own OpenAPI description, with short answers."""

from __future__ import annotations

import copy
from typing import Any

from mlx_flash.server import openapi

ANSWER_TOKENS = 3  # tokens of a valid request; few, because the fuzzer looks for errors, not for long texts
LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")


def description() -> dict[str, Any]:
    made = copy.deepcopy(openapi.description())
    for request, _, _ in openapi.REQUESTS.values():
        schema = made["components"]["schemas"][request.__name__]
        limits = [name for name in LIMITS if name in schema["properties"]]
        for name in limits:
            schema["properties"][name] = {"type": "integer", "minimum": 1, "maximum": ANSWER_TOKENS}
        if limits:
            schema["required"] = sorted({*schema.get("required", []), limits[0]})
        elif "options" in schema["properties"]:
            few = {"type": "integer", "minimum": 1, "maximum": ANSWER_TOKENS}
            schema["properties"]["options"] = openapi._object(num_predict=few)
            schema["required"] = sorted({*schema.get("required", []), "options"})
    return made
