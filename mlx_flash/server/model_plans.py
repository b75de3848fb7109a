"""What models need, as another process plans it. Plans are kept in the cache folder, by the stamps of models' files."""

from __future__ import annotations

import contextlib
import hashlib
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import FlashError, UsageError
from ..source.cached import PLANS, cache_folder
from ..source.children import child_environment
from ..source.installed import InstalledModel
from ..source.ssd_writes import write_small

if TYPE_CHECKING:
    from ..loading.options import LoadOptions

WORKER = "mlx_flash.server.plan_worker"
PLAN_S = 120.0  # After this time the process that plans a model is ended.
MOST_KEPT = 1000  # plans
MOST_BYTES = 4 << 20  # of the file
BEHIND_A_PLAN = ("mlx-flash-runtime", "mlx", "mlx-lm", "mlx-vlm")  # packages; with another version it is made again
IRRELEVANT = ("memory", "revision", "verify", "draft_model")  # options that do not change what a model needs

Needs = dict[str, Any]  # see plan_worker.planned


class ModelPlans:
    """Any thread may use it. options: returns those that models are loaded with."""

    def __init__(self, options: Callable[[], LoadOptions]) -> None:
        self._options = options
        self._plans: dict[str, Needs] | None = None  # None until the file was read
        self._failed: dict[str, tuple[float, Needs]] = {}  # when, and why
        self._lock = threading.Lock()
        self._asked = threading.Lock()  # Requests for models have one process together, which takes memory.
        self._children: set[subprocess.Popen[bytes]] = set()
        self._closed = False

    def known(self, model: InstalledModel, failed_s: float | None = None) -> Needs | None:
        """The plan that was made for the model's files as they are; None if there is none.

        failed_s: the age from which a failure does not count; None if it always does.
        """
        key = self._key(model)
        with self._lock:
            if (found := self._read().get(key)) is not None:
                return found
            when, needs = self._failed.get(key, (0.0, None))
            fresh = failed_s is None or time.monotonic() - when < failed_s
            return needs if fresh else None

    def plan_of(self, model: InstalledModel, failed_s: float) -> Needs:
        """The plan of a model. Takes seconds if it is not known. Raises FlashError if the server stops."""
        if (known := self.known(model, failed_s)) is not None:
            return known
        with self._asked:
            if (known := self.known(model, failed_s)) is not None:  # Another request has waited for it.
                return known
            self.make([model])
        made = self.known(model)
        assert made is not None
        return made

    def make(self, models: Sequence[InstalledModel]) -> None:
        """Plans each model. Raises FlashError if the server stops."""
        left = list(models)
        while left:
            done = self._make(left)
            if done < len(left):  # The process did not answer for this one.
                self._keep(left[done], {**_nothing(), "reason": "planning it failed, or took too long."})
                done += 1
            left = left[done:]
        self._write()

    def close(self) -> None:
        """Ends the processes. Every wait for one raises FlashError."""
        with self._lock:
            self._closed = True
            children = list(self._children)
        for child in children:
            child.kill()

    def _make(self, models: Sequence[InstalledModel]) -> int:
        """Plans the models in one process. Returns how many of them it answered for."""
        options = {name: value for name, value in asdict(self._options()).items() if name not in IRRELEVANT}
        request = json.dumps({"options": options, "models": [model.model for model in models]}).encode() + b"\n"
        with self._lock:
            if self._closed:
                raise _stopping()
            child = subprocess.Popen(
                [sys.executable, "-m", WORKER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                process_group=0,  # A Ctrl-C in the terminal does not reach it.
                env=child_environment(),
            )
            self._children.add(child)
        assert child.stdin is not None and child.stdout is not None
        done = 0
        try:
            with contextlib.suppress(OSError):  # The process has ended, which its output shows.
                child.stdin.write(request)
                child.stdin.flush()
            for model in models:
                limit = threading.Timer(PLAN_S, child.kill)
                limit.daemon = True
                limit.start()
                try:
                    line = child.stdout.readline()
                finally:
                    limit.cancel()
                needs = _answer(line)
                if needs is None:
                    break
                self._keep(model, needs)
                done += 1
        finally:
            child.kill()
            child.wait()
            with contextlib.suppress(OSError):
                child.stdin.close()
            child.stdout.close()
            with self._lock:
                self._children.discard(child)
        if self._closed:
            raise _stopping()
        return done

    def _keep(self, model: InstalledModel, needs: Needs) -> None:
        key = self._key(model)
        with self._lock:
            if needs["reason"]:
                self._failed[key] = (time.monotonic(), needs)
            else:
                self._read()[key] = needs

    def _key(self, model: InstalledModel) -> str:
        options = {name: str(value) for name, value in asdict(self._options()).items() if name not in IRRELEVANT}
        packages = [_version(name) for name in BEHIND_A_PLAN]
        text = json.dumps([model.stamp, options, packages], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def _read(self) -> dict[str, Needs]:
        """The plans. The lock must be held."""
        if self._plans is None:
            self._plans = {}
            with contextlib.suppress(OSError, ValueError, UsageError, RecursionError):
                path = _file()
                whole = path.is_file() and path.stat().st_size <= MOST_BYTES  # a named pipe would wait for ever
                found = json.loads(path.read_bytes()) if whole else None
                if isinstance(found, dict):
                    self._plans = {key: needs for key, needs in found.items() if _is_plan(needs)}
        return self._plans

    def _write(self) -> None:
        """Writes the plans beside the file, then renames. If that fails, they are made again another time."""
        with self._lock:
            plans = self._read()
            for key in list(plans)[: max(0, len(plans) - MOST_KEPT)]:
                del plans[key]
            with contextlib.suppress(OSError, UsageError):
                write_small(_file(), json.dumps(plans))


def _file() -> Path:
    return cache_folder() / PLANS


def _nothing() -> Needs:
    return {"smallest": None, "everything": None, "images": None, "reason": ""}


def _answer(line: bytes) -> Needs | None:
    """What a process said of a model; None if it has ended, or did not say that."""
    with contextlib.suppress(ValueError):
        needs = json.loads(line)
        if isinstance(needs, dict) and needs.keys() == _nothing().keys():
            return needs
    return None


def _is_plan(needs: Any) -> bool:
    """Whether a value in the file is a plan that was made whole."""
    return (
        isinstance(needs, dict)
        and needs.keys() == _nothing().keys()
        and all(type(needs[name]) is int for name in ("smallest", "everything"))
        and type(needs["images"]) is bool
        and needs["reason"] == ""
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _stopping() -> FlashError:
    return FlashError("the server is stopping.")
