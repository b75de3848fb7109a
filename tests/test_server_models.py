"""Several models on one server: which one a request names, what is loaded when, and what lists say."""

# ruff: noqa: F811

from __future__ import annotations

import json
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from serving import Gate, Server, gate, serving, until  # type: ignore[import-not-found]  # noqa: F401
from several_models import (  # type: ignore[import-not-found]  # noqa: F401
    NEEDS,
    OTHERS,
    OWN,
    Models,
    ask,
    folders,
    models,
    quick,
    server,
)

from mlx_flash.errors import BudgetError
from mlx_flash.loading import streaming_needs
from mlx_flash.server.access import Access
from mlx_flash.server.engine import Engine
from mlx_flash.server.library import Library
from mlx_flash.source import installed
from mlx_flash.source.installed import HUB, InstalledModel, installed_models, with_own_names

# -- naming -------------------------------------------------------------------------------------------------------


def test_a_request_loads_the_model_that_it_names(server: Server, models: Models) -> None:
    assert ask(server, "gpt-5").json()["model"] == OWN
    assert ask(server, "owner/first").json()["model"] == "owner/first"
    assert ask(server, "claude-opus").json()["model"] == "owner/first"  # another name means the loaded one
    assert ask(server, "owner/first:latest").json()["model"] == "owner/first"
    assert ask(server, OWN).json()["model"] == OWN
    assert models.loaded == [OWN, "owner/first", OWN]
    library = server.get("/stats").json()["library"]
    assert (library["loads"], library["unloads"], library["loading"]) == (3, 2, None)
    metrics = server.get("/metrics").text
    assert "mlx_flash_loads_total 3.0" in metrics and "mlx_flash_unloads_total 2.0" in metrics


def test_every_api_loads_and_streams(server: Server, models: Models) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    requests: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": messages, "max_tokens": 2},
        "/v1/responses": {"input": "Hi", "max_output_tokens": 2},
        "/v1/messages": {"messages": messages, "max_tokens": 2},
        "/v1/messages/count_tokens": {"messages": messages},
        "/api/chat": {"messages": messages, "options": {"num_predict": 2}},
        "/api/generate": {},
    }
    for path, body in requests.items():
        for name, stream in (("owner/first", True), ("owner/second", False)):
            answer = server.post(path, {**body, "model": name, "stream": stream})
            assert answer.status_code == 200 and '"error":{' not in answer.text, answer.text
            assert server.get("/health").json() == {"status": "ok", "model": name}
    assert models.loaded == [OWN, *len(requests) * OTHERS]


def test_a_stream_begins_while_its_model_is_loaded(server: Server, models: Models) -> None:
    models.may_load.clear()
    body = {"prompt": "Hi", "max_tokens": 2, "model": "owner/first", "stream": True}
    with server.client() as client, client.stream("POST", "/v1/completions", json=body) as answer:
        lines = answer.iter_lines()
        assert answer.status_code == 200 and next(lines) == ": waiting"
        until(
            lambda: (server.get("/library").json()["loading"] or {}).get("stage") == "planning"
        )  # the old one is closed
        stats = server.get("/stats").json()
        assert (
            stats["state"] == "loading"
            and stats["model"] is None
            and stats["library"]["loading"]["name"] == "owner/first"
        )
        report = server.get("/library").json()
        assert report["state"] == "loading" and report["loading"]["stage"] == "planning"
        assert server.get("/health").json()["status"] == "ok" and server.get("/metrics").status_code == 200
        models.may_load.set()
        rest = list(lines)
    assert rest[-2] == "data: [DONE]" and '"model":"owner/first"' in rest[1]


def test_strict_names(models: Models) -> None:
    access = Access(strict_names=True)
    with serving(models.load, OWN, access=access, library=models.of) as server:
        refused = ask(server, "gpt-5")
        assert refused.status_code == 404 and "owner/first, owner/second" in refused.text
        assert ask(server, "owner/second").status_code == ask(server, "default").status_code == 200
        assert server.get("/v1/models/gpt-5").status_code == 404
        assert models.loaded == [OWN, "owner/second"]


def test_a_model_that_does_not_fit_is_refused_and_the_old_one_stays(server: Server, models: Models) -> None:
    models.needs["owner/first"] = {**NEEDS, "smallest": 9_000_000_000}
    models.needs["owner/second"] = {**NEEDS, "smallest": None, "reason": "it is of another kind."}
    for stream in (False, True):
        refused = ask(server, "owner/first", stream=stream)
        assert refused.status_code == 400 and "needs at least 9" in refused.text and "3000 MB" in refused.text
    assert "it is of another kind" in ask(server, "owner/second").text
    assert models.loaded == [OWN] and server.engine.ready
    names = [entry["id"] for entry in server.get("/v1/models").json()["data"]]
    assert names == [OWN]
    reasons = {entry["name"]: entry["reason"] for entry in server.get("/library").json()["models"]}
    assert "needs at least" in reasons["owner/first"] and reasons["owner/second"] == "it is of another kind."


def test_a_load_that_fails(server: Server, models: Models) -> None:
    models.failing["owner/first"] = OSError("the disk is gone")
    refused = ask(server, "owner/first")
    assert refused.status_code == 500 and "the disk is gone" in refused.text
    report = server.get("/library").json()
    assert report["state"] == "failed" and "the disk is gone" in report["failure"]
    assert server.get("/health").json() == {"status": "ok", "model": OWN}
    assert ask(server, "gpt-5").json()["model"] == OWN  # the old model comes back
    assert models.loaded == [OWN, "owner/first", OWN] and server.get("/library").json()["state"] == "ready"


def test_a_plan_counts_the_process_once_the_old_model_is_gone(
    server: Server, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = weakref.ref(server.engine.model)
    gone: list[bool] = []

    def measure() -> int:
        gone.append(old() is None)
        return 700_000_000

    monkeypatch.setattr(streaming_needs, "current_memory_bytes", measure)
    assert ask(server, "owner/first").status_code == 200
    assert gone == [True] and server.engine.model.flash.plan.demand.process > 700_000_000
    assert models.library is not None and models.library.process_bytes > 700_000_000


def test_a_model_that_does_not_fit_after_all(server: Server, models: Models) -> None:
    """It gets the numbers, and does not close another model again soon."""
    models.failing["owner/first"] = BudgetError("this model needs at least 3100MB.", 3_100_000_000)
    refused = ask(server, "owner/first")
    assert refused.status_code == 400 and refused.json()["error"]["code"] == "no_memory"
    assert "needs at least 3100MB" in refused.text and "a restart may help" in refused.text
    assert ask(server, OWN).status_code == 200
    again = ask(server, "owner/first")
    assert again.status_code == 400 and "needs at least 3100MB" in again.text and "restart" in again.text
    assert models.loaded == [OWN, "owner/first", OWN]
    models.failing.clear()
    assert server.post("/library/load", {"name": "owner/first", "memory": "3200MB"}).status_code == 202
    until(lambda: server.engine.name == "owner/first" and server.engine.ready)


# -- the order ----------------------------------------------------------------------------------------------------


def test_requests_behind_a_load_wait_in_order(server: Server, models: Models, gate: Gate) -> None:
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(ask, server)]
        gate.go_on_to("prompt", 0)
        for waiting, name in enumerate(("owner/first", "gpt-5", OWN), 1):
            answers.append(pool.submit(ask, server, name))
            until(lambda waiting=waiting: server.engine.waiting == waiting)
        report = server.get("/library").json()
        assert report["loading"] == {
            **{"name": "owner/first", "stage": "waiting for the answers before it"},
            **{"done": 0, "total": 0},
        }
        assert models.loaded == [OWN]  # the running answer ends first
        gate.open()
        assert [each.result().json()["model"] for each in answers] == [OWN, "owner/first", "owner/first", OWN]
    assert models.loaded == [OWN, "owner/first", OWN]


def test_several_answers_of_one_request_come_from_one_model(
    server: Server,
    models: Models,
    gate: Gate,
) -> None:
    with ThreadPoolExecutor(2) as pool:
        several = pool.submit(ask, server, n=3, temperature=1)
        gate.go_on_to("prompt", 0)
        other = pool.submit(ask, server, "owner/first")
        until(lambda: server.engine.waiting == 1)
        gate.open()
        assert len(several.result().json()["choices"]) == 3 and other.result().status_code == 200
    assert models.loaded == [OWN, "owner/first"]


def test_a_client_that_leaves_while_its_model_is_to_be_loaded(server: Server, models: Models) -> None:
    models.may_load.clear()
    body = {"prompt": "Hi", "max_tokens": 2, "model": "owner/second", "stream": True}
    with ThreadPoolExecutor(1) as pool, server.client() as client:
        first = pool.submit(ask, server, "owner/first")
        until(lambda: server.engine.state == "loading")
        with client.stream("POST", "/v1/completions", json=body) as answer:
            lines = answer.iter_lines()
            assert next(lines) == ": waiting"
            until(lambda: server.engine.waiting == 2)
        until(lambda: server.engine.waiting == 1)
        models.may_load.set()
        assert first.result().status_code == 200
    assert models.loaded == [OWN, "owner/first"]


def test_two_hundred_requests_over_three_models(quick: Models) -> None:
    """Each answer comes from the model that its request named, and none is lost."""
    names = [OWN, *OTHERS]
    with serving(quick.load, OWN, library=quick.of) as server:
        served: list[str] = []
        serve = server.engine._serve

        def noted(job: Any) -> None:
            served.append(server.engine.model.named)
            serve(job)

        server.engine._serve = noted
        with server.client() as client:

            def one(number: int) -> tuple[str, str]:
                name = names[number * number % 7 % 3]
                body = {"prompt": "Hi", "max_tokens": 1, "model": name, "stream": number % 2 == 0}
                answer = client.post("/v1/completions", json=body)
                assert answer.status_code == 200, answer.text
                if number % 2:
                    return name, str(answer.json()["model"])
                events = [line for line in answer.text.splitlines() if line.startswith("data: {")]
                return name, str(json.loads(events[0].removeprefix("data: "))["model"])

            with ThreadPoolExecutor(20) as pool:
                answers = list(pool.map(one, range(200)))
    assert len(answers) == 200 and all(asked == answered for asked, answered in answers)
    assert sorted(served) == sorted(asked for asked, _ in answers)


# -- /library -----------------------------------------------------------------------------------------------------


def test_the_library_lists_loads_and_unloads(server: Server, models: Models) -> None:
    report = server.get("/library").json()
    assert [entry["name"] for entry in report["models"]] == [OWN, *OTHERS]
    until(lambda: all(entry["runs"] for entry in server.get("/library").json()["models"]))
    report = server.get("/library").json()
    first, second = report["models"][:2]
    assert (first["source"], first["loaded"], second["source"], second["loaded"]) == ("folder", True, "hub", False)
    assert second["smallest_bytes"] > 50_000_000 and second["images"] is False and second["size_bytes"] > 1000
    assert report["state"] == "ready" and report["loading"] is None and report["idle_unload_s"] is None
    assert report["budget_bytes"] > 0 and report["budgets"][0]["text"] == "smallest"
    listed = server.get("/v1/models").json()["data"]
    assert [entry["id"] for entry in listed] == [OWN, *OTHERS]
    assert [entry["loaded"] for entry in listed] == [True, False, False] and "context_length" not in listed[1]
    assert [tag["name"] for tag in server.get("/api/tags").json()["models"]] == [
        *(f"{name}:latest" for name in (OWN, *OTHERS)),
    ]
    assert server.post("/api/show", {"model": "owner/first"}).json()["model_info"]["general.basename"] == "owner/first"
    assert models.loaded == [OWN]

    assert server.post("/library/load", {"name": "owner/first"}).status_code == 202
    until(lambda: server.get("/stats").json()["state"] == "ready" and server.engine.name == "owner/first")
    assert server.get("/v1/models").json()["data"][0]["id"] == "owner/first"
    assert server.get("/api/ps").json()["models"][0]["name"] == "owner/first:latest"

    assert server.post("/library/unload", {}).status_code == 202
    until(lambda: server.get("/library").json()["state"] == "unloaded")
    stats = server.get("/stats").json()
    assert (
        stats["model"] is None and stats["totals"]["requests"] == 0 and server.get("/api/ps").json() == {"models": []}
    )
    assert server.get("/health").json() == {"status": "ok", "model": "owner/first"}
    assert not any(entry["loaded"] for entry in server.get("/library").json()["models"])
    assert ask(server).json()["model"] == "owner/first"  # loaded again


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"name": "nobody/nothing"}, "there is no model"),
        ({"name": "ü" * 10_000}, "there is no model"),
        ({"name": "../../etc"}, "there is no model"),
        ({"name": ""}, "name"),
        ({}, "name"),
        ({"name": "owner/first", "memory": "x"}, "expected a number with a unit"),
        ({"name": "owner/first", "memory": "1TB"}, "expected a number with a unit"),
        ({"name": "owner/first", "memory": "900000GB"}, "this machine has"),
        ({"name": "owner/first", "memory": "0B"}, "needs at least"),
    ],
)
def test_orders_that_are_refused(server: Server, models: Models, body: dict[str, Any], said: str) -> None:
    refused = server.post("/library/load", body)
    assert refused.status_code == 400 and said in refused.text, refused.text
    assert models.loaded == [OWN] and server.engine.ready


def test_a_budget_that_was_ordered_stays(server: Server, models: Models) -> None:
    assert server.post("/library/load", {"name": OWN, "memory": "2GB"}).status_code == 202
    until(lambda: len(models.loaded) == 2 and server.engine.ready)
    assert models.library is not None and models.library.memory == "2GB"
    assert ask(server, OWN).status_code == 200 and models.loaded == [OWN, OWN]


def test_a_budget_that_was_refused_does_not_stay(server: Server, models: Models) -> None:
    models.failing["owner/first"] = BudgetError("this model needs at least 3100MB.", 3_100_000_000)
    assert models.library is not None
    before = models.library.memory
    assert server.post("/library/load", {"name": "owner/first", "memory": "2GB"}).status_code == 202
    until(lambda: models.loaded[-1] == "owner/first" and server.engine.switch.failure != "")
    assert models.library.memory == before


def test_a_sleeping_server_counts_its_process_as_the_last_plan_did(server: Server, models: Models) -> None:
    assert models.library is not None
    awake = models.library.process_bytes
    assert server.post("/library/unload", {}).status_code == 202
    until(lambda: server.engine.switch.loaded is None)
    server.engine.switch.freed_bytes = 0  # as if nothing at all were left
    assert models.library.process_bytes >= awake > 0


def test_events_tell_of_loading(server: Server) -> None:
    with server.client() as client, client.stream("GET", "/events") as events:
        lines = events.iter_lines()
        assert next(lines) == "event: state"
        server.post("/library/load", {"name": "owner/first"})
        found = []
        for line in lines:
            if line.startswith("data: ") and "stage" in line:
                found.append(json.loads(line.removeprefix("data: ")))
                if (found[-1]["state"], found[-1]["name"]) == ("ready", "owner/first"):
                    break
    found = [event for event in found if event["name"] != OWN]  # an event tells that all models were planned
    assert {event["name"] for event in found} == {"owner/first"} and found[0]["state"] == "loading"
    assert set(found[0]) == {"state", "name", "stage", "done", "total"}


def test_a_server_without_a_library(models: Models) -> None:
    with serving(models.load, OWN) as server:
        assert server.get("/library").status_code == 404
        assert ask(server, "owner/first").json()["model"] == OWN


# -- idle ---------------------------------------------------------------------------------------------------------


def test_an_idle_model_is_closed_and_loaded_again(models: Models) -> None:
    def of(engine: Engine) -> Library:
        engine.idle_unload_s = 0.05
        return models.of(engine)

    with serving(models.load, OWN, library=of) as server:
        until(lambda: server.engine.state == "unloaded")
        assert server.get("/health").json() == {"status": "ok", "model": OWN}
        assert server.get("/library").json()["idle_unload_s"] == 0.05
        assert server.get("/v1/models").status_code == 200
        assert ask(server).json()["model"] == OWN
        assert models.loaded == [OWN, OWN]
        until(lambda: server.engine.state == "unloaded")


# -- names of what is installed -----------------------------------------------------------------------------------


def test_names_are_made_unambiguous(tmp_path: Path) -> None:
    def of(name: str, source: str, folder: str) -> InstalledModel:
        return InstalledModel(name, source, folder, tmp_path / folder, 1, "stamp")

    models = [of("opt", "cache", "opt-0123456789ab"), of("opt", "cache", "opt-ba9876543210"), of("a/b", HUB, "c0ffee")]
    assert [model.name for model in with_own_names(models, set())] == ["opt-0123456789ab", "opt-ba9876543210", "a/b"]
    assert [model.name for model in with_own_names(models, {"a/b", "opt-0123456789ab"})] == [
        *("opt-ba9876543210", "a/b@c0ffee"),
    ]


def test_what_is_no_model_is_not_listed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(installed, "hub_cache", lambda: tmp_path / "hub")
    monkeypatch.setenv("MLX_FLASH_CACHE", str(tmp_path / "cache"))
    assert installed_models() == []
    for repository in ("datasets--a--b", "models--a--none", "models--a--outside", "models--a--empty"):
        (tmp_path / "hub" / repository / "refs").mkdir(parents=True)
        (tmp_path / "hub" / repository / "snapshots" / "c0ffee").mkdir(parents=True)
        (tmp_path / "hub" / repository / "refs" / "main").write_text("c0ffee")
    (tmp_path / "hub" / "models--a--none" / "refs" / "main").unlink()
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "hub" / "models--a--outside" / "refs" / "main").write_text("../../../..")
    assert installed_models() == []
    whole = tmp_path / "hub" / "models--a--empty" / "snapshots" / "c0ffee" / "config.json"
    whole.write_text("{}")
    (found,) = installed_models()
    assert (found.name, found.source, found.size_bytes) == ("a/empty", HUB, 2)
    whole.write_text("{} ")
    assert installed_models()[0].stamp != found.stamp
