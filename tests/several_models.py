"""A server with several models: its own, and two in a cache of the Hub."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from scripted import make_scripted  # type: ignore[import-not-found]  # found beside this file
from serving import Server, serving  # type: ignore[import-not-found]

from mlx_flash.loading import load as loading
from mlx_flash.loading.load import load
from mlx_flash.loading.options import LoadOptions
from mlx_flash.server import model_switch
from mlx_flash.server.engine import Engine
from mlx_flash.server.library import Library
from mlx_flash.server.model_plans import ModelPlans
from mlx_flash.source import installed

NEEDS = {"smallest": 50_000_000, "everything": 60_000_000, "images": False, "reason": ""}
OWN, OTHERS = "own", ("owner/first", "owner/second")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The Hub's cache with two models, and a folder with the server's own."""
    hub = tmp_path_factory.mktemp("hub")
    own = make_scripted(tmp_path_factory.mktemp("own"))
    made = {OWN: own, "": hub}
    for name in OTHERS:
        repository = hub / f"models--{name.replace('/', '--')}"
        (repository / "refs").mkdir(parents=True)
        (repository / "refs" / "main").write_text("c0ffee")
        made[name] = Path(shutil.copytree(own, repository / "snapshots" / "c0ffee"))
    return made


class Models:
    """The library of a server in this process. Its models load from `folders`; nothing starts a process."""

    def __init__(self, folders: dict[str, Path]) -> None:
        self.folders = folders
        self.loaded: list[str] = []  # names, in the order of loading
        self.needs: dict[str, dict[str, Any]] = {}
        self.failing: dict[str, Exception] = {}
        self.memory = "3GB"
        self.may_load = threading.Event()
        self.may_load.set()
        self.library: Library | None = None

    def of(self, engine: Engine) -> Library:
        models = self

        class Plans(ModelPlans):
            def make(self, chosen: Any) -> None:
                for model in chosen:
                    self._keep(model, models.needs.get(model.name, NEEDS))

        self.library = Library(engine, (OWN,), str(self.folders[OWN]), LoadOptions(memory=self.memory))
        self.library.plans = Plans(self.library._options_to_plan)
        return self.library

    def load(self, name: str = OWN) -> tuple[Any, Any]:
        assert self.may_load.wait(60)
        self.loaded.append(name)
        if name in self.failing:
            raise self.failing[name]
        return load(self.folders[name], memory="3GB", context=256, prompt_cache=0)


@pytest.fixture
def models(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Models:
    monkeypatch.setattr(installed, "hub_cache", lambda: folders[""])
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path))
    made = Models(folders)
    monkeypatch.setattr(loading, "load", lambda path, *_, **__: made.load(path if path in OTHERS else OWN))
    return made


@pytest.fixture
def server(models: Models) -> Iterator[Server]:
    with serving(models.load, OWN, library=models.of) as running:
        yield running


def ask(server: Server, model: str | None = None, **more: Any) -> Any:
    return server.post("/v1/completions", {"prompt": "Hi", "max_tokens": 2, "model": model, **more})


@pytest.fixture
def quick(models: Models, monkeypatch: pytest.MonkeyPatch) -> Iterator[Models]:
    """The models, loaded once, so that a change from one to another takes no time. `model.named` says which it is."""
    monkeypatch.setattr(model_switch, "gc", SimpleNamespace(collect=lambda: 0))  # takes a tenth of a second here
    kept = {name: models.load(name) for name in (OWN, *OTHERS)}
    closes = [model.flash.close for model, _ in kept.values()]
    for name, (model, _) in kept.items():
        model.flash.close = lambda: None
        model.named = name

    def load(name: str = OWN) -> tuple[Any, Any]:
        models.loaded.append(name)
        return kept[name]

    models.loaded.clear()
    models.load = load  # type: ignore[method-assign]
    yield models
    for close in closes:
        close()
