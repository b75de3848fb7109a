"""The menu bar app's controller with a scripted server that has a list of models and loads them by name."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from mlx_flash.apps.menubar import controller as controllers
from mlx_flash.apps.menubar import model_choices, wording
from mlx_flash.apps.menubar.budgets import Budget
from mlx_flash.apps.menubar.controller import RUNNING, STOPPED, Controller, State
from mlx_flash.apps.menubar.settings import AppSettings, read_settings
from mlx_flash.source.installed import InstalledModel

SECONDS = 600.0
ENGINE = "import time; print('Serving at {}', flush=True); time.sleep(600)"
GB = 10**9
SIZES = {"smallest": 985 * 10**6, "25%": 1985 * 10**6, "50%": 2985 * 10**6, "100%": 4985 * 10**6}


def entry(name: str, source: str, **more: Any) -> dict[str, Any]:
    sizes = {"size_bytes": GB, "smallest_bytes": GB, "everything_bytes": 5 * GB, "images": False}
    return {"name": name, "source": source, "loaded": False, "runs": True, "reason": "", **sizes, **more}


class Server:
    """What the server says and was told. Tests change the fields."""

    def __init__(self) -> None:
        self.models = [entry("demo", "demo"), entry("a/b", "hub"), entry("no/runs", "hub", runs=False)]
        self.state, self.loaded, self.loads = "ready", "demo", 1
        self.failure, self.refusal = "", ""
        self.loading: dict[str, Any] | None = None
        self.posted: list[tuple[str, dict[str, Any]]] = []
        self.has_library = True

    def stats(self) -> dict[str, Any]:
        ready = self.state == "ready"
        totals = dict.fromkeys(("requests", "failed", "prompt_tokens", "generated_tokens", "bytes_read"), 0)
        of_model: dict[str, Any] = dict.fromkeys(("model", "plan", "prompt_caches", "resident", "last", "now"))
        if ready:
            of_model |= {"model": {"kind": "experts"}, "resident": {"share": 0.5}}
        return {
            **of_model,
            "memory": {"current_bytes": GB, "peak_bytes": GB, "budget_bytes": 2 * GB if ready else None},
            "totals": totals,
            "queue": {"waiting": 0, "limit": 8},
            "state": self.state,
            "library": {"loading": self.loading, "loads": self.loads, "unloads": 0, "idle_unload_s": None},
        }

    def library(self) -> dict[str, Any]:
        ready = self.state == "ready"
        return {
            "models": [{**each, "loaded": ready and each["name"] == self.loaded} for each in self.models],
            "state": self.state,
            "loading": self.loading,
            "failure": self.failure,
            "budget_bytes": 2 * GB,
            "budgets": [{"bytes": size, "text": text} for text, size in SIZES.items()] if ready else [],
            "idle_unload_s": None,
        }

    def answer(self, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        if path == "/health":
            return 200, {"status": "ok", "model": self.loaded}
        if path == "/stats":
            return 200, self.stats()
        if not self.has_library:
            return 404, {"error": {"message": "no such path"}}
        if body is not None:
            self.posted.append((path, body))
            if self.refusal:
                return 400, {"error": {"message": self.refusal}}
            return 202, self.library()
        return 200, self.library()


class Handler(BaseHTTPRequestHandler):
    script: Server

    def do_GET(self) -> None:
        self.reply(None)

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: dict[str, Any] | None) -> None:
        status, answer = self.script.answer(self.path, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def controller(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Controller]:
    """A controller whose engine is the scripted server."""
    monkeypatch.setattr(controllers, "planned_budgets", lambda _: None)
    monkeypatch.setattr(controllers, "POLL_SECONDS", 0.02)
    here = [
        InstalledModel("a/b", "hub", "a/b", tmp_path, GB, ""),
        InstalledModel("demo", "demo", None, tmp_path, GB, ""),
    ]
    monkeypatch.setattr("mlx_flash.source.installed.installed_models", lambda: here)
    with ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"script": server})) as listening:
        threading.Thread(target=listening.serve_forever, args=(0.02,), daemon=True).start()
        program = ENGINE.format(f"http://127.0.0.1:{listening.server_port}")
        made = Controller(tmp_path / "settings", command=lambda *_: [sys.executable, "-c", program])
        yield made
        made.close()
        listening.shutdown()


def wait(controller: Controller, condition: Callable[[State], object]) -> State:
    deadline = time.monotonic() + SECONDS
    while not condition(state := controller.state):
        assert time.monotonic() < deadline, state
        time.sleep(0.01)
    return state


def listed(controller: Controller) -> State:
    controller.start()
    return wait(controller, lambda state: state.phase == RUNNING and state.library and state.stats)


def test_the_menu_has_the_models_and_budgets_of_the_server(controller: Controller) -> None:
    state = listed(controller)
    assert model_choices.choices(state.settings, state.library) == [None, "a/b"]
    assert [wording.budget_label(budget, state).strip() for budget in wording.budgets_of(state)] == [
        "✓ Automatic: a share of free memory",
        *("1 GB: the smallest", "2 GB: a quarter of the experts in memory"),
        *("3 GB: half of the experts in memory", "5 GB: all experts in memory"),
    ]
    controller.stop()
    state = wait(controller, lambda state: state.phase == STOPPED)
    assert model_choices.choices(state.settings, state.library) == [None, "a/b"]  # the last list


def test_a_store_of_the_cache_folder_is_started_by_its_path(monkeypatch: pytest.MonkeyPatch) -> None:
    path = "/cache/kept-0123456789ab"
    here = [
        InstalledModel("kept", "cache", path, Path(path), GB, ""),
        InstalledModel("a/b", "hub", "a/b", Path("/x"), GB, ""),
    ]
    monkeypatch.setattr("mlx_flash.source.installed.installed_models", lambda: here)
    library = model_choices.with_values(
        {"models": [entry("kept", "cache"), entry("gone", "cache"), entry("a/b", "hub")]}
    )
    assert model_choices.choices(AppSettings(recent=("a/b",)), library) == [None, "a/b", path]
    assert model_choices.name_of(path, library, None, "demo") == "kept"
    assert model_choices.name_of(None, library, None, "demo") == "demo"
    assert model_choices.name_of("/elsewhere", library, None, "demo") is None
    assert model_choices.name_of(None, library, "/elsewhere", "own") is None  # "gone" is not the demo model


def test_a_running_engine_loads_another_model_and_another_budget(controller: Controller, server: Server) -> None:
    listed(controller)
    engine = controller._engine
    controller.choose_model("a/b")
    state = wait(controller, lambda state: state.settings.model == "a/b")
    assert server.posted == [("/library/load", {"name": "a/b"})] and controller._engine is engine
    server.state, server.loading = "loading", {"name": "a/b", "stage": "reading weights", "done": 1, "total": 4}
    state = wait(controller, lambda state: state.served == "loading")
    assert wording.headline(state) == "Loading a/b: reading weights 25%" and wording.icon_text(state) == "..."
    server.state, server.loading, server.loaded, server.loads = "ready", None, "a/b", 2
    wait(controller, lambda state: state.served == "ready")

    controller.choose_budget(2 * GB)
    state = wait(controller, lambda state: state.settings.budget == 2 * GB)
    assert server.posted[-1] == ("/library/load", {"name": "a/b", "memory": "2000000000B"})
    assert wording.budget_label(Budget(2 * GB, ""), state) == "✓ 2 GB" and controller._engine is engine

    controller.choose_model(None)  # back to the one that the server was started with, which has no budget of its own
    wait(controller, lambda state: state.settings.model is None and controller._engine not in (engine, None))
    assert len(server.posted) == 2  # Only a new start gives it a share of the free memory again.


def test_a_model_that_the_server_refuses_changes_nothing(
    controller: Controller, server: Server, tmp_path: Path
) -> None:
    listed(controller)
    server.refusal = "a/b cannot be loaded: it needs at least 9000MB."
    controller.choose_model("a/b")
    state = wait(controller, lambda state: state.notice)
    assert state.notice == server.refusal and state.settings.model is None
    controller.notice_was_shown()
    assert not controller.state.notice and not (tmp_path / "settings").exists()

    server.state, server.failure, server.loads = "failed", "the disk is gone", 3
    state = wait(controller, lambda state: state.served == "failed" and (state.library or {}).get("failure"))
    assert wording.headline(state) == "Not loaded: the disk is gone" and wording.icon_text(state) == "!"


def test_the_model_falls_asleep(controller: Controller, server: Server) -> None:
    listed(controller)
    controller.unload()
    wait(controller, lambda _: server.posted)
    assert server.posted == [("/library/unload", {})]
    server.state = "unloaded"
    state = wait(controller, lambda state: state.served == "unloaded")
    assert wording.headline(state) == "Asleep: the next question loads the model" and wording.icon_text(state) == "zzz"
    rows = dict(wording.statistics(state))
    assert rows["Memory"] == "1 GB" and "Resident experts" not in rows
    state = wait(controller, lambda state: state.library and not state.library["budgets"])
    assert len(wording.budgets_of(state)) == 5  # those of before
    controller.stop()
    assert wait(controller, lambda state: state.phase == STOPPED).served == ""
    controller.unload()
    assert len(server.posted) == 1


def test_a_folder_that_the_server_does_not_list_starts_it_again(
    controller: Controller, server: Server, tmp_path: Path
) -> None:
    listed(controller)
    engine = controller._engine
    controller.choose_model(str(tmp_path))
    wait(controller, lambda state: controller._engine not in (engine, None) and state.phase == RUNNING)
    assert server.posted == [] and read_settings(tmp_path / "settings").model == str(tmp_path)


def test_a_server_without_a_list_still_runs(controller: Controller, server: Server) -> None:
    server.has_library = False
    controller.start()
    state = wait(controller, lambda state: state.phase == RUNNING and state.stats)
    assert state.library is None and wording.headline(state) == "Ready"
