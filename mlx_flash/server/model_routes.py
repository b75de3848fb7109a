"""The models of a server: which one a request names, the lists of all APIs, and /library, which loads them."""

from __future__ import annotations

import asyncio
import time
from typing import Annotated, Any

from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from .access import DEFAULT_MODEL, Access
from .api_errors import ApiError
from .apis.anthropic import anthropic_model, anthropic_models
from .apis.error_forms import speaks_anthropic
from .apis.openai_common import StrictModel, parse
from .bodies import Bodies
from .engine import Engine
from .library import MOST_NAME, Library
from .model_switch import Target
from .places import QueuePlace
from .stats_report import parameters_bytes


class LoadRequest(StrictModel):
    """Asks to load a model. memory: the budget from then on, such as "6GB"."""

    name: Annotated[str, Field(min_length=1)]
    memory: str | None = None


class ModelRoutes:
    """library: the other models; None for a server that has only its own."""

    def __init__(self, engine: Engine, access: Access, library: Library | None, bodies: Bodies) -> None:
        self.engine, self.library, self.bodies = engine, library, bodies
        self.own_names = tuple(dict.fromkeys((engine.name, *access.names)))
        self.strict_names = access.strict_names
        self.created = int(time.time())

    async def named(self, asked: str | None) -> Target | None:
        """The model that a request names; None if it means the loaded one.

        Raises ApiError if it cannot be loaded, or, with strict names, if there is none of that name.
        """
        target = None if self.library is None else await self.library.named(asked)
        if target is None and self.strict_names and asked and self._own_name(asked) is None:
            raise await self._unknown(asked)
        return target

    def _own_name(self, asked: str) -> str | None:
        """One of the first model's names; None if it is another's."""
        if asked == DEFAULT_MODEL:
            return self.own_names[0]
        plain = asked.removesuffix(":latest")  # Ollama's clients add the tag.
        return plain if plain in self.own_names else asked if asked in self.own_names else None

    async def _unknown(self, name: str) -> ApiError:
        if self.library is not None:
            return await asyncio.to_thread(self.library.unknown, name)
        message = f"there is no model {name!r:.200}; this server runs {self.engine.name!r}."
        return ApiError(404, message, param="model", code="model_not_found")

    # -- lists ----------------------------------------------------------------------------------------------

    async def entries(self) -> list[dict[str, Any]]:
        """The models that would run, the loaded one first, in OpenAI's form."""
        if self.library is None:
            return [self._entry(name, None) for name in self.own_names]
        listed = await asyncio.to_thread(self.library.listed)
        found = []
        for model in listed:
            names = self.own_names if model["name"] == self.own_names[0] else (model["name"],)
            found += [self._entry(name, model) for name in names if model["runs"]]
        return found

    def _entry(self, name: str, listed: dict[str, Any] | None) -> dict[str, Any]:
        """A model in OpenAI's form. If it is loaded, with the planned context, in the words of other servers."""
        loaded = self.engine.switch.loaded
        if listed is not None and not listed["loaded"]:
            loaded = None
        entry = {"id": name, "object": "model", "created": self.created, "owned_by": "mlx_flash"}
        entry["loaded"] = loaded is not None
        if loaded is None:
            return entry if listed is None else {**entry, "size_bytes": listed["size_bytes"]}
        flash = loaded.model.flash
        context = flash.plan.context
        return {
            **entry,
            "size_bytes": parameters_bytes(flash),
            "context_length": context,
            "max_model_len": context,
        }

    async def models(self, request: Request) -> Response:
        entries = await self.entries()
        if speaks_anthropic(request.scope):
            names = [entry["id"] for entry in entries if entry["id"] not in self.own_names[1:]]
            return JSONResponse(anthropic_models(names, self.created))
        return JSONResponse({"object": "list", "data": entries})

    async def model(self, request: Request) -> Response:
        asked = request.path_params["name"]
        if not asked:
            return await self.models(request)
        name = self._own_name(asked) or asked.removesuffix(":latest")
        found = [entry for entry in await self.entries() if entry["id"] == name]
        anthropic = speaks_anthropic(request.scope)
        if not found and not (anthropic and not self.strict_names):
            raise await self._unknown(asked)
        if anthropic:
            own = not found or name in self.own_names
            return JSONResponse(anthropic_model(self.engine.name if own else name, self.created))
        return JSONResponse(found[0])

    # -- loading --------------------------------------------------------------------------------------------

    async def listing(self, _request: Request) -> Response:
        """GET /library."""
        return await self._report(200)

    async def load(self, request: Request) -> Response:
        """POST /library/load. Answers at once; the queue loads the model when its turn comes."""
        self.engine.check_ready()
        library = self._library()
        async with self.bodies.body_of(request, 0) as body:
            asked = parse(LoadRequest, body)
        if len(asked.name) > MOST_NAME:
            raise ApiError(400, f"there is no model {asked.name!r:.200}.", param="name", code="model_not_found")
        target = await asyncio.to_thread(library.order, asked.name, asked.memory)
        self.engine.take(QueuePlace(target, errand=True))
        return await self._report(202)

    async def unload(self, _request: Request) -> Response:
        """POST /library/unload. The next request loads the model again."""
        self.engine.check_ready()
        self.engine.take(QueuePlace(None, errand=True, unload=True))
        return await self._report(202)

    async def _report(self, status: int) -> Response:
        library = self._library()
        return JSONResponse(await asyncio.to_thread(library.report), status)

    def _library(self) -> Library:
        if self.library is None:
            raise ApiError(404, "this server has no library: it runs one model only.")
        return self.library
