"""Loads, closes and changes the engine's model. One model is in memory at a time: the old one is freed first."""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ..errors import BudgetError, FlashError
from ..source.failures import foreseen
from .api_errors import ApiError
from .events import EventHub
from .loaded_model import FilesOf, LoadedModel

LOADING = "loading"
READY = "ready"
UNLOADED = "unloaded"
FAILED = "failed"
STOPPED = "stopped"
RESTART = " A server that had other models before needs a little more than a new one, so a restart may help."
EVENT_GAP_S = 0.1  # least time between two events about the progress of a load

Tell = Callable[[str, int, int], None]  # (stage, done, total), in bytes
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """A model that the engine can load. Two targets are the same if their keys are.

    name: in answers. path: its location, for people to read. load: returns (model, tokenizer).
    """

    name: str = field(compare=False)
    path: str = field(compare=False)
    load: Callable[[Tell], tuple[Any, Any]] = field(compare=False)
    key: tuple[str, str | None] = ("", None)  # which model, and with which budget


class ModelSwitch:
    """The model of the engine, or its absence. All methods but `report` are called in the engine's thread."""

    def __init__(self, current: Target, hub: EventHub) -> None:
        self.current = current  # what the next load without a name loads
        self.hub = hub
        self.state, self.failure = LOADING, ""
        self.loaded: LoadedModel | None = None
        self.progress: dict[str, Any] | None = {"name": current.name, "stage": "starting", "done": 0, "total": 0}
        self.files_of: FilesOf = lambda model: None
        self.loads = self.unloads = 0
        self.budget_bytes: int | None = None  # of the last model's plan
        self.planned_process_bytes = 0  # the process in the last model's plan
        self.freed_bytes = 0  # size of the process after the last model was closed; 0 before
        self._totals: dict[str, float] | None = None
        self._told_at = 0.0

    def load(self, target: Target, check: Callable[[], None] = lambda: None) -> None:
        """Loads a model. The one before it is closed and freed first.

        check: called once `state` is LOADING; may raise. Raises the errors of loading.
        """
        stage = "planning" if self.loaded is None else "closing the model before it"
        self.progress = {"name": target.name, "stage": stage, "done": 0, "total": 0}
        self._set(LOADING, target.name)
        try:
            check()
            self._free()
            self._tell("planning", 0, 0)
            model, tokenizer = target.load(self._tell)
            self.loaded = LoadedModel.of(model, tokenizer, self.hub, self._totals, self.files_of)
        except Exception as error:
            self.progress, self.failure = None, foreseen(error) or str(error) or type(error).__name__
            self._set(FAILED, target.name)
            raise
        except BaseException:  # such as a signal
            self.progress, self.state = None, STOPPED
            raise
        self.progress, self.current, self.failure = None, target, ""
        plan = model.flash.plan
        self.budget_bytes, self.planned_process_bytes = plan.budget, plan.demand.process
        self.loads += 1
        self._set(READY, target.name)

    def unload(self) -> None:
        """Closes the model, if there is one, and gives its memory back."""
        if self.loaded is not None:
            self._free()
            self._set(UNLOADED, self.current.name)

    def _free(self) -> None:
        """Gives the memory of the model back, as far as the allocators do so."""
        import mlx.core as mx

        from ..flash.system import current_memory_bytes, return_freed_memory

        if (old := self.loaded) is not None:
            assert old.monitor is not None
            self._totals, self.loaded = old.monitor.totals, None
            self.unloads += 1
            old.close()
            del old
        gc.collect()  # A model and its caches refer to each other.
        mx.clear_cache()
        return_freed_memory()
        if self.loads:
            self.freed_bytes = current_memory_bytes()

    def close(self) -> None:
        """Closes the model for good."""
        self.state = STOPPED
        if self.loaded is not None:
            self.loaded.close()

    def report(self) -> dict[str, Any]:
        """The event about what is loaded."""
        shown = self.progress or {"name": self.current.name, "stage": "", "done": 0, "total": 0}
        return {"state": self.state, **shown}

    @property
    def totals(self) -> dict[str, float] | None:
        """The totals of all models so far; None before the first one."""
        loaded = self.loaded
        return self._totals if loaded is None or loaded.monitor is None else loaded.monitor.totals

    def _tell(self, stage: str, done: int, total: int) -> None:
        """Receives the progress of a load, in bytes."""
        assert self.progress is not None
        changed = self.progress["stage"] != stage
        self.progress = {"name": self.progress["name"], "stage": stage, "done": done, "total": total}
        now = time.monotonic()
        if changed or done >= total or now - self._told_at >= EVENT_GAP_S:
            self._told_at = now
            self.hub.publish("library", self.report())

    def _set(self, state: str, name: str) -> None:
        self.state = state
        self.hub.publish("library", {**self.report(), "name": name})


def why_not_loaded(name: str, error: Exception) -> ApiError:
    """The answer to a request whose model could not be loaded."""
    said = foreseen(error) or (str(error) if isinstance(error, FlashError) else "")
    if not said:
        log.exception("loading %s failed", name)
        said = f"{type(error).__name__}: {error}; the server's log has its traceback."
    if isinstance(error, BudgetError):
        return ApiError(400, f"{name:.200} does not fit: {said}{RESTART}", param="model", code="no_memory")
    return ApiError(500, f"{name:.200} could not be loaded: {said}", param="model", code="load_failed")
