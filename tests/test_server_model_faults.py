"""What can go wrong while a server changes its models: clients leave, files vanish, processes crash or hang."""

# ruff: noqa: F811

from __future__ import annotations

import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Gate, Server, gate, serving, until  # type: ignore[import-not-found]  # noqa: F401
from several_models import (  # type: ignore[import-not-found]  # noqa: F401
    OTHERS,
    OWN,
    Models,
    ask,
    folders,
    models,
    quick,
    server,
)

from mlx_flash.loading.options import LoadOptions
from mlx_flash.server import bodies, model_plans
from mlx_flash.server.model_plans import ModelPlans
from mlx_flash.source.installed import HUB, InstalledModel

# -- clients ------------------------------------------------------------------------------------------------------


def test_clients_that_leave_at_random_moments(quick: Models) -> None:
    """Among them are orders to load and unload. No place and no body stays, and the server still answers."""
    names = [OWN, *OTHERS]
    with serving(quick.load, OWN, library=quick.of) as server:

        def one(number: int) -> int:
            rng = random.Random(number)
            with server.client() as client:
                kind, name = rng.randrange(6), rng.choice(names)
                if kind == 0:
                    return client.post("/library/load", json={"name": name}).status_code
                if kind == 1:
                    return client.post("/library/unload", json={}).status_code
                body = {"prompt": "Hi " * 20, "max_tokens": 20, "model": name, "stream": kind < 4}
                if kind == 2:
                    return client.post("/v1/completions", json=body).status_code
                if kind == 3:
                    with client.stream("POST", "/v1/completions", json=body) as answer:
                        for count, _ in enumerate(answer.iter_lines()):
                            if count == rng.randrange(5):
                                break
                        return answer.status_code
            sent = json.dumps(body).encode()
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n")
                connection.sendall(b"Content-Length: %d\r\n\r\n" % len(sent) + sent[: rng.choice((20, 200))])
                time.sleep(0.05 * rng.random())
            return 0

        with ThreadPoolExecutor(16) as pool:
            statuses = set(pool.map(one, range(60)))
        assert statuses <= {0, 200, 202}
        until(lambda: server.engine.places.empty and not server.held.held_bytes and not server.engine.running)
        for name in names:
            assert ask(server, name).json()["model"] == name


def test_a_burst_of_orders(quick: Models) -> None:
    """All are accepted, and the last one counts. Those between it and the first are not carried out."""
    with serving(quick.load, OWN, library=quick.of) as server:
        loading, may_load = threading.Event(), threading.Event()
        load = quick.load

        def slowly(name: str = OWN) -> Any:
            loading.set()
            assert may_load.wait(60)
            return load(name)

        quick.load = slowly  # type: ignore[method-assign]
        try:
            assert server.post("/library/load", {"name": OTHERS[0]}).status_code == 202
            assert loading.wait(60)
            with ThreadPoolExecutor(8) as pool:
                orders = [{"name": [OWN, *OTHERS][number % 3]} for number in range(60)]
                assert {each.status_code for each in pool.map(lambda o: server.post("/library/load", o), orders)} == {
                    202
                }
            assert server.post("/library/load", {"name": OTHERS[1]}).status_code == 202
        finally:
            may_load.set()
        until(lambda: server.engine.ready and server.engine.name == OTHERS[1])
        assert quick.loaded == [OWN, *OTHERS]


def test_bodies_of_requests_that_wait_for_a_model(
    server: Server, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They stay in memory, so they count; those beyond the bound are refused with what to do."""
    monkeypatch.setattr(bodies, "MOST_BYTES", 10_000)
    models.may_load.clear()
    body = {"prompt": "Hi " * 3000, "model": OTHERS[0]}  # more than the context has room for
    with ThreadPoolExecutor(6) as pool:
        try:
            answers = [pool.submit(server.post, "/v1/completions", body) for _ in range(6)]
            until(lambda: server.engine.waiting + sum(each.done() for each in answers) >= 6)
            refused = [each.result() for each in answers if each.done()]
            assert [each.status_code for each in refused] == [429] * 2
            assert "wait for a model" in refused[0].text and "retry-after" in refused[0].headers
        finally:
            models.may_load.set()
        assert sorted(each.result().status_code for each in answers) == [400] * 4 + [429] * 2
    until(lambda: not server.held.held_bytes and server.engine.places.empty)


# -- files --------------------------------------------------------------------------------------------------------


def test_a_model_that_vanishes(server: Server, models: Models, gate: Gate, folders: dict[str, Path]) -> None:
    """Its files are removed while a request for it waits, after it was planned."""
    folder, kept = folders[OTHERS[0]], folders[""].parent / "kept"
    with ThreadPoolExecutor(2) as pool:
        running = pool.submit(ask, server)
        gate.go_on_to("prompt", 0)
        waiting = pool.submit(ask, server, OTHERS[0])
        until(lambda: server.engine.waiting == 1)
        shutil.move(folder, kept)
        try:
            gate.open()
            assert running.result().status_code == 200
            refused = waiting.result()
            assert refused.status_code in (400, 500) and "Traceback" not in refused.text
            assert refused.json()["error"]["message"].startswith(f"{OTHERS[0]} could not be loaded: ")
            assert ask(server, OTHERS[0]).json()["model"] == OWN  # no such model is there, so the name means any
            assert OTHERS[0] not in server.get("/v1/models").text
        finally:
            shutil.move(kept, folder)
    assert ask(server, OTHERS[0]).json()["model"] == OTHERS[0]


def test_an_order_to_unload_lets_a_stream_end(server: Server, models: Models, gate: Gate) -> None:
    body = {"prompt": "Hi", "max_tokens": 3, "stream": True}
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        gate.go_on_to("token", 1)
        assert server.post("/library/unload", {}).status_code == 202
        assert server.engine.ready
        gate.open()
        assert list(answer.iter_lines())[-2] == "data: [DONE]"
    until(lambda: server.engine.state == "unloaded")
    assert server.totals["generated_tokens"] == 3


# -- the process that plans ---------------------------------------------------------------------------------------

WORKER = """
import json, os, sys, time
request = json.loads(sys.stdin.readline())
for model in request["models"]:
    if model == "crash":
        os._exit(3)
    if model == "hang":
        open("hanging", "w").close()
        time.sleep(600)
    if model == "rubbish":
        print("rubbish", flush=True)
    print(json.dumps({"smallest": 1, "everything": 2, "images": False, "reason": ""}), flush=True)
"""


@pytest.fixture
def plans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelPlans:
    (tmp_path / "faulty_worker.py").write_text(WORKER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(model_plans, "WORKER", "faulty_worker")
    return ModelPlans(LoadOptions)


class TimerOfHanging(threading.Thread):
    """A limit of time that is over once the process hangs."""

    def __init__(self, _seconds: float, end: Callable[[], None]) -> None:
        super().__init__()
        self.end, self.over = end, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.01):
            if Path("hanging").exists():
                Path("hanging").unlink()
                return self.end()

    def cancel(self) -> None:
        self.over.set()
        self.join()


def installed(name: str) -> InstalledModel:
    return InstalledModel(name, HUB, name, Path(name), 1, name)


def test_processes_that_crash_hang_or_print(plans: ModelPlans, monkeypatch: pytest.MonkeyPatch) -> None:
    """One model's failure leaves the plans of the others whole, and is not kept in the file."""
    monkeypatch.setattr(model_plans.threading, "Timer", TimerOfHanging)
    names = ["a", "crash", "b", "hang", "c", "rubbish", "d"]
    plans.make([installed(name) for name in names])
    found = {name: plans.known(installed(name)) for name in names}
    assert all(found[name] is not None for name in names)
    assert [name for name, needs in found.items() if needs is not None and needs["reason"]] == [
        *("crash", "hang", "rubbish"),
    ]
    assert "took too long" in found["hang"]["reason"]  # type: ignore[index]
    kept = ModelPlans(LoadOptions)
    assert [kept.known(installed(name)) is not None for name in names] == [True, False] * 3 + [True]
    assert not plans._children


def test_a_pipe_in_place_of_the_plans(plans: ModelPlans, tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    os.mkfifo(tmp_path / "cache" / model_plans.PLANS)
    assert plans.known(installed("a")) is None


def test_a_server_that_stops_ends_the_planning(plans: ModelPlans) -> None:
    with ThreadPoolExecutor(1) as pool:
        planning = pool.submit(plans.plan_of, installed("hang"), 0.0)
        until(lambda: plans._children)
        plans.close()
        assert "stopping" in str(planning.exception(60))
    assert not plans._children


def test_what_a_library_prints_is_no_answer() -> None:
    """The worker's standard output has its answers only."""
    code = (
        "import mlx_flash.server.plan_worker as worker\n"
        "def planned(model, options):\n    print('printed')\n    return {'model': model}\n"
        "worker.planned = planned\nworker.main()\n"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(json.dumps({"options": {}, "models": ["a", "b"]}).encode() + b"\n")
    child.stdin.flush()
    assert [json.loads(line) for line in child.stdout] == [{"model": "a"}, {"model": "b"}]
    child.communicate()
