"""The models that this server can load: what they are called, what they need, and how each is loaded.

What a model needs follows from a plan, and a plan imports the model's class. So another process makes the plans, and
they are kept in the cache folder for as long as no file of the model changes.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from ..errors import BudgetError, FlashError, UsageError
from ..source.installed import InstalledModel, folder_model, installed_models, may_be_installed, with_own_names
from .access import DEFAULT_MODEL
from .api_errors import ApiError
from .engine import Engine
from .model_plans import ModelPlans
from .model_switch import RESTART, Target, Tell

if TYPE_CHECKING:
    from ..loading.options import LoadOptions
    from ..ranks.leader import Leader

LOOKED_AT_S = 600.0  # After this time a model that cannot run is planned again for the list.
ASKED_S = 30.0  # The same for a request that names it.
MOST_NAME = 300  # characters


class Library:
    """The models of one server. Any thread may use it, but what scans or plans takes time.

    model: the value of --model. own_names: the names of that model. options: those of the first model; another one is
    loaded with them, except for what belongs to the first one alone. say: receives the plan and notes of a load.
    """

    def __init__(
        self,
        engine: Engine,
        own_names: tuple[str, ...],
        model: str | None,
        options: LoadOptions,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.engine, self.own_names, self.model, self.options, self.say = engine, own_names, model, options, say
        self.group: Leader | None = None  # the ranks that models are loaded on; None for this process alone
        self.memory = options.memory  # the budget; a request may change it
        self.plans = ModelPlans(self._options_to_plan)
        self._changed = False  # whether the budget was changed by a request
        self._begun = False  # whether the first model has been loaded once
        self._own_needs: dict[str, Any] | None = None  # of the first model: bytes without the process
        self._refused: dict[str, tuple[float, int]] = {}  # what did not fit after all: when, and its smallest budget
        self._surveying = threading.Lock()
        self._planning = asyncio.Lock()  # Requests that wait for a plan must not keep all threads from the others.

    # -- names ----------------------------------------------------------------------------------------------

    async def named(self, asked: str | None) -> Target | None:
        """The model that a request names; None if it means the loaded one. Raises ApiError if it cannot be loaded."""
        if not asked or asked == DEFAULT_MODEL:
            return None
        name = asked.removesuffix(":latest") if asked not in self.own_names else asked
        if name in self.own_names:
            return self._target(None)
        if len(name) > MOST_NAME or not await asyncio.to_thread(may_be_installed, name):
            return None
        found = await asyncio.to_thread(self.find, name)
        if found is None:
            return None
        if await asyncio.to_thread(self.plans.known, found, ASKED_S) is None:
            async with self._planning:
                await asyncio.to_thread(self.plans.plan_of, found, ASKED_S)
        return await asyncio.to_thread(self.checked, found, None)

    def find(self, name: str) -> InstalledModel | None:
        return next((model for model in self.others() if model.name == name), None)

    def others(self) -> list[InstalledModel]:
        """The models in the caches, without the server's own."""
        own = None if self.model is None else Path(self.model).expanduser()
        found = installed_models(own if own is not None and own.is_dir() else None)
        return with_own_names([model for model in found if not self._is_own(model)], {*self.own_names, DEFAULT_MODEL})

    def _is_own(self, model: InstalledModel) -> bool:
        if self.model is None or model.model is None:
            return self.model is model.model
        if self.model == model.model:
            return self.options.revision is None
        own = Path(self.model).expanduser()
        return own.is_dir() and own.resolve() == model.folder.resolve()

    # -- what fits ------------------------------------------------------------------------------------------

    def checked(self, model: InstalledModel | None, memory: str | None) -> Target:
        """How a model is loaded. model: None for the server's own. memory: another budget for it.

        Raises ApiError if it cannot run, or not within the budget.
        """
        target = self._target(model, memory)
        if self.engine.switch.loaded is not None and target == self.engine.switch.current:
            return target
        needs = self._own_needs if model is None else self.plans.plan_of(model, ASKED_S)
        problem, code = "" if needs is None else needs["reason"], "not_loaded"
        if needs is not None and not problem:
            problem, code = self._problem(needs, model, memory), "no_memory"
        if problem:
            raise ApiError(400, f"{target.name:.200} cannot be loaded: {problem}", param="model", code=code)
        return target

    def _problem(self, needs: dict[str, Any], model: InstalledModel | None, memory: str | int | None = None) -> str:
        """Why a model does not fit, with the numbers; empty if it fits."""
        from ..flash.system import available_memory_bytes, current_memory_bytes
        from ..loading.plan import parse_memory

        process = self.process_bytes
        when, refused = self._refused.get(_identity(model), (0.0, 0))
        if refused > needs["smallest"] + process and time.monotonic() - when < ASKED_S:
            process = refused - needs["smallest"]
        smallest = -(-(needs["smallest"] + process) // 10**6)
        budget = memory if memory is not None else self.memory
        if budget is None:
            most, what = current_memory_bytes() + available_memory_bytes(), "this machine has {} MB for it"
        else:
            most, what = parse_memory(budget), "the memory budget is {} MB"
        if smallest * 10**6 <= most:
            return ""
        return (
            f"it needs at least {smallest}MB ({process / 1e6:.0f} MB of them for this server's process), and "
            f"{what.format(most // 10**6)}. Choose a smaller model, or give more (--memory {smallest}MB)."
            + (RESTART if self.engine.switch.unloads else "")
        )

    @property
    def process_bytes(self) -> int:
        """The size of the process without a model: as the last plan counted it, or as the last model left it.

        A plan counts what loading needs beside the model, too, which is free again while nothing is loaded.
        """
        switch = self.engine.switch
        return max(switch.planned_process_bytes, switch.freed_bytes)

    # -- loading --------------------------------------------------------------------------------------------

    def order(self, name: str, memory: str | None) -> Target:
        """How a model is loaded that a user chose by name, with `memory` as the budget from then on, if it is given.

        Raises ApiError, also if there is no such model.
        """
        plain = name.removesuffix(":latest")
        own = name in self.own_names or plain in self.own_names
        model = None if own or len(plain) > MOST_NAME else self.find(plain)
        if model is None and not own:
            raise self.unknown(name, status=400)
        if memory is not None:
            self._check_budget(memory)
        return self.checked(model, memory)

    def _check_budget(self, memory: str) -> None:
        """Raises ApiError if it is not a size, or more than the machine has."""
        from ..loading.plan import parse_memory

        try:
            budget = parse_memory(memory)
        except UsageError as error:
            raise ApiError(400, str(error), param="memory") from None
        total = psutil.virtual_memory().total
        if budget > total:
            message = f"memory is {memory!r:.40}, but this machine has {total // 10**6}MB. Choose less."
            raise ApiError(400, message, param="memory", code="no_memory")

    def unknown(self, name: str, status: int = 404) -> ApiError:
        names = [*self.own_names, *(model.name for model in self.others())]
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        message = f"there is no model {name!r:.200}; this server has {shown}."
        return ApiError(status, message, param="model", code="model_not_found")

    def _target(self, model: InstalledModel | None, memory: str | None = None) -> Target:
        """model: None for the server's own."""
        budget = memory if memory is not None else self.memory
        chosen = str(budget) if memory is not None or self._changed else None
        name = self.own_names[0] if model is None else model.name
        path = self.engine.own_path if model is None else str(model.folder)
        load = self.load_own if model is None and chosen is None else self._loader(model, budget, memory is not None)
        return Target(name, path, load, (_identity(model), chosen))

    def load_own(self, tell: Tell) -> tuple[Any, Any]:
        """Loads the server's own model as its arguments say. The Hub is asked for it the first time only."""
        loaded = self._load(None, self.options, tell, fetch=not self._begun)
        self._begun = True
        return loaded

    def _loader(
        self, model: InstalledModel | None, memory: str | int | None, ordered: bool
    ) -> Callable[[Tell], tuple[Any, Any]]:
        """ordered: whether `memory` is the budget from then on, once the model is loaded."""
        options = self.options if model is None else self._options_for(model)

        def load(tell: Tell) -> tuple[Any, Any]:
            loaded = self._load(model, replace(options, memory=memory), tell, fetch=False)
            if ordered:
                self.memory, self._changed = memory, True
            return loaded

        return load

    def _options_for(self, model: InstalledModel) -> LoadOptions:
        plan = self.plans.known(model)
        sees = plan is not None and bool(plan["images"])
        return replace(self._options_to_plan(), images=self.options.images and sees)

    def _options_to_plan(self) -> LoadOptions:
        """The options that other models share with the first one."""
        own = self.options
        draft = own.draft if own.draft == "ngram" else "none"
        return replace(own, revision=None, predictor="auto", recall=None, draft=draft, draft_model=None, adapter=None)

    def _load(self, model: InstalledModel | None, options: LoadOptions, tell: Tell, fetch: bool) -> tuple[Any, Any]:
        from ..loading.load import load
        from ..loading.load_progress import watching

        path = self.model if model is None else model.model
        if model is not None and self.group is not None and (hosts := self.group.with_own_model):
            raise UsageError(
                f"the host file names the folder of the model on {', '.join(hosts)}, so the ranks have no other one. "
                "Start another server for it, or leave the key model out."
            )
        try:
            with watching(tell):
                loaded, tokenizer = load(path, options, say=self.say, fetch=fetch, group=self.group)
        except BudgetError as error:
            self._refused[_identity(model)] = time.monotonic(), error.smallest_bytes
            raise
        plan = loaded.flash.plan
        process = plan.demand.process
        if model is None:
            self._own_needs = {
                "smallest": plan.smallest - process,
                "everything": plan.everything - process,
                "images": loaded.flash.images is not None,
                "reason": "",
            }
        return loaded, tokenizer

    # -- lists ----------------------------------------------------------------------------------------------

    def listed(self) -> list[dict[str, Any]]:
        """Every model, the loaded one first, in the form of GET /library. What is not planned yet is planned meanwhile
        by another process."""
        switch = self.engine.switch
        loaded = _key_of(switch.current) if switch.loaded is not None else None
        found: list[InstalledModel | None] = [None, *self.others()]
        unknown = [model for model in found if model is not None and self.plans.known(model, LOOKED_AT_S) is None]
        if unknown:
            self._survey(unknown)
        entries = [self._entry(model, _identity(model) == loaded) for model in found]
        return sorted(entries, key=lambda entry: not entry["loaded"])

    def _entry(self, model: InstalledModel | None, loaded: bool) -> dict[str, Any]:
        own = self._own_model() if model is None else model
        plan = self._own_needs if model is None else self.plans.known(model)
        if loaded or (model is None and plan is None):
            reason = ""
        elif plan is None:
            reason = "it is being looked at; ask again."
        else:
            reason = plan["reason"] or self._problem(plan, model)
        needs = plan if plan is not None and plan["smallest"] is not None else None
        process = self.process_bytes
        return {
            "name": own.name,
            "source": own.source,
            "size_bytes": own.size_bytes,
            "loaded": loaded,
            "runs": not reason,
            "reason": reason,
            "smallest_bytes": None if needs is None else needs["smallest"] + process,
            "everything_bytes": None if needs is None else needs["everything"] + process,
            "images": None if plan is None else plan["images"],
        }

    def _own_model(self) -> InstalledModel:
        name = self.own_names[0]
        for model in installed_models():
            if self._is_own(model):
                return replace(model, name=name)
        return folder_model(name, Path(self.engine.own_path))

    def _survey(self, models: list[InstalledModel]) -> None:
        """Plans the models in another process, one after the other, unless that is under way."""

        def plan_all() -> None:
            try:
                self.plans.make(models)
            except FlashError:
                pass  # The server is stopping.
            finally:
                self._surveying.release()
            self.engine.hub.publish("library", self.engine.switch.report())

        if self._surveying.acquire(blocking=False):
            threading.Thread(target=plan_all, name="plans", daemon=True).start()

    def report(self) -> dict[str, Any]:
        """The answer of GET /library."""
        from ..loading.plan import parse_memory

        engine = self.engine
        switch, loaded = engine.switch, engine.switch.loaded
        progress, state = switch.progress, switch.state
        if progress is None and (coming := engine.places.coming) is not None:
            stage, state = "waiting for the answers before it", "loading"
            progress = {"name": coming.name, "stage": stage, "done": 0, "total": 0}
        plan = None if loaded is None else loaded.model.flash.plan
        budget = switch.budget_bytes if self.memory is None else parse_memory(self.memory)
        return {
            "models": self.listed(),
            "state": state,
            "loading": progress,
            "failure": switch.failure,
            "budget_bytes": budget if plan is None else plan.budget,
            "budgets": [] if plan is None else [{"bytes": size, "text": text} for text, size in plan.budgets().items()],
            "idle_unload_s": engine.idle_unload_s,
        }

    def close(self) -> None:
        """Ends the process that plans."""
        self.plans.close()


def _identity(model: InstalledModel | None) -> str:
    """Empty for the server's own model."""
    return "" if model is None else f"{model.source}:{model.model}"


def _key_of(target: Target) -> str:
    return target.key[0]
