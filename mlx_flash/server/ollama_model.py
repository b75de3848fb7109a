"""What Ollama's API says about the model: /api/tags, /api/show, /api/ps and /api/version."""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import ChatTemplateFailure
from ..text.chat_template import has_chat_template, takes_tools
from .apis.ollama import listed_name, timestamp
from .engine import Engine
from .loaded_model import LoadedModel
from .model_routes import ModelRoutes

FOLLOWED = "0.12.11"  # the version of Ollama whose API this is; some clients demand a recent one
NEVER = "2999-12-31T00:00:00Z"  # The model stays loaded.


class AboutModel:
    def __init__(self, engine: Engine, models: ModelRoutes) -> None:
        self.engine, self.models, self.created = engine, models, time.time()

    async def tags(self, _request: Request) -> Response:
        self.engine.check_ready()
        modified = {"modified_at": timestamp(self.created)}
        return JSONResponse({"models": [self._listed(entry) | modified for entry in await self.models.entries()]})

    async def ps(self, _request: Request) -> Response:
        self.engine.check_ready()
        found = []
        for entry in await self.models.entries():
            if entry["loaded"] and (loaded := self.engine.switch.loaded) is not None:
                plan = loaded.model.flash.plan
                running = {"expires_at": NEVER, "size_vram": plan.budget, "context_length": plan.context}
                found.append(self._listed(entry) | running)
        return JSONResponse({"models": found[:1]})

    async def show(self, request: Request) -> Response:
        """The details of the model that is named. Nothing is loaded, so of another model little is known."""
        self.engine.check_ready()
        async with self.models.bodies.body_of(request, 0) as body:
            asked = _name_in(body)
        entries = await self.models.entries()
        named = [entry for entry in entries if asked and entry["id"] == asked.removesuffix(":latest")]
        entry = (named or entries)[0]
        loaded = self.engine.switch.loaded if entry["loaded"] else None
        return JSONResponse(self._about(entry["id"], None) if loaded is None else self._about(self.engine.name, loaded))

    def _about(self, name: str, loaded: LoadedModel | None) -> dict[str, Any]:
        template, parameters, family = "", "", _family(loaded)
        information: dict[str, Any] = {"general.architecture": family, "general.basename": name}
        if loaded is not None:
            flash, template = loaded.model.flash, loaded.tokenizer.chat_template
            parameters = "\n".join(f"{name} {value:g}" for name, value in flash.defaults.sampling.items())
            information[f"{family}.context_length"] = flash.plan.context
        return {
            "modelfile": "",
            "license": "",
            "parameters": parameters,
            "template": template if isinstance(template, str) else "",
            "details": _details(family),
            "model_info": information,
            "capabilities": ["completion"] if loaded is None else _capabilities(loaded),
            "modified_at": timestamp(self.created),
        }

    async def version(self, _request: Request) -> Response:
        return JSONResponse({"version": FOLLOWED})

    def _listed(self, entry: dict[str, Any]) -> dict[str, Any]:
        name = listed_name(entry["id"])
        return {
            "name": name,
            "model": name,
            "size": entry.get("size_bytes", 0),
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": _details(_family(self.engine.switch.loaded if entry["loaded"] else None)),
        }


def _name_in(body: bytes) -> str:
    """The model that a request for /api/show names; empty if it names none."""
    with contextlib.suppress(ValueError, RecursionError):
        asked = json.loads(body)
        if isinstance(asked, dict):
            return next((asked[key] for key in ("model", "name") if isinstance(asked.get(key), str)), "")
    return ""


def _family(loaded: LoadedModel | None) -> str:
    return str((loaded and getattr(loaded.model, "model_type", None)) or "unknown")


def _capabilities(loaded: LoadedModel) -> list[str]:
    format, tokenizer = loaded.format, loaded.tokenizer
    tools = False
    with contextlib.suppress(ChatTemplateFailure):  # there are several templates, and none is the default
        tools = format.calls_tools and has_chat_template(tokenizer) and takes_tools(tokenizer, [{}])
    return ["completion", *(["tools"] if tools else []), *(["thinking"] if format.thinks else [])]


def _details(family: str) -> dict[str, Any]:
    return {
        "parent_model": "",
        "format": "mlx",
        "family": family,
        "families": [family],
        "parameter_size": "",
        "quantization_level": "",
    }
