"""What Ollama's API says about the model: /api/tags, /api/show, /api/ps and /api/version."""

from __future__ import annotations

import contextlib
import hashlib
import time
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from ..errors import ChatTemplateFailure
from ..text.chat_template import has_chat_template, takes_tools
from .apis.ollama import listed_name, timestamp
from .engine import Engine
from .stats_report import statistics

FOLLOWED = "0.12.11"  # the version of Ollama whose API this is; some clients demand a recent one
NEVER = "2999-12-31T00:00:00Z"  # The model stays loaded.


class AboutModel:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.created = engine, time.time()

    async def tags(self, _request: Request) -> Response:
        return JSONResponse({"models": [self._listed() | {"modified_at": timestamp(self.created)}]})

    async def ps(self, _request: Request) -> Response:
        listed = self._listed()
        plan = self.engine.model.flash.plan
        running = {"expires_at": NEVER, "size_vram": plan.budget, "context_length": plan.context}
        return JSONResponse({"models": [listed | running]})

    async def show(self, _request: Request) -> Response:
        self.engine.check_ready()
        flash, tokenizer = self.engine.model.flash, self.engine.tokenizer
        template = tokenizer.chat_template
        sampling = flash.defaults.sampling
        return JSONResponse(
            {
                "modelfile": "",
                "license": "",
                "parameters": "\n".join(f"{name} {value:g}" for name, value in sampling.items()),
                "template": template if isinstance(template, str) else "",
                "details": self._details(),
                "model_info": {
                    "general.architecture": self._family,
                    "general.basename": self.engine.name,
                    f"{self._family}.context_length": flash.plan.context,
                },
                "capabilities": self._capabilities(),
                "modified_at": timestamp(self.created),
            }
        )

    async def version(self, _request: Request) -> Response:
        return JSONResponse({"version": FOLLOWED})

    @property
    def _family(self) -> str:
        return str(getattr(self.engine.model, "model_type", None) or "unknown")

    def _capabilities(self) -> list[str]:
        format, tokenizer = self.engine.format, self.engine.tokenizer
        tools = False
        with contextlib.suppress(ChatTemplateFailure):  # there are several templates, and none is the default
            tools = format.calls_tools and has_chat_template(tokenizer) and takes_tools(tokenizer, [{}])
        return ["completion", *(["tools"] if tools else []), *(["thinking"] if format.thinks else [])]

    def _listed(self) -> dict[str, Any]:
        self.engine.check_ready()
        name = listed_name(self.engine.name)
        return {
            "name": name,
            "model": name,
            "size": statistics(self.engine)["model"]["parameters_bytes"],
            "digest": hashlib.sha256(name.encode()).hexdigest(),
            "details": self._details(),
        }

    def _details(self) -> dict[str, Any]:
        return {
            "parent_model": "",
            "format": "mlx",
            "family": self._family,
            "families": [self._family],
            "parameter_size": "",
            "quantization_level": "",
        }
