"""A model whose files go away while a server runs it, and come back: an external disk that is pulled out."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]
from serving import Server, serving, until  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.errors import ReadError, UsageError
from mlx_flash.flash.unit_file import UnitFile
from mlx_flash.loading.load import load
from mlx_flash.server.engine import Engine
from mlx_flash.server.model_switch import Target
from mlx_flash.server.places import Load, Places, QueuePlace, Unload

BODY = {"prompt": "Hello", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def volume(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that stands for a volume, with a model in it."""
    root = tmp_path_factory.mktemp("volumes") / "disk"
    write_tokenizer(make_mixture(root / "model", "qwen3_moe", num_hidden_layers=4))
    return root


@pytest.fixture(params=[1])
def server(volume: Path, request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server. The parameter is the number of answers at once."""
    with serving(lambda: load(volume / "model", context=64, parallel=request.param)) as running:
        yield running


def pull_out(server: Server, volume: Path) -> None:
    """Takes the files away: their path leads nowhere, and their descriptors read nothing."""
    nothing = volume.parent / "nothing"
    nothing.write_bytes(b"")
    volume.rename(volume.parent / "away")
    dead = os.open(nothing, os.O_WRONLY)
    for file in server.engine.model.flash.streamer.files:
        os.dup2(dead, file.fd)
    os.close(dead)


def ask(server: Server) -> Any:
    return server.post("/v1/completions", BODY)


@pytest.mark.parametrize("server", [1, 2], indirect=True)
def test_a_server_outlives_its_models_volume(server: Server, volume: Path) -> None:
    expected = ask(server).json()["choices"]
    engine: Engine = server.engine
    pull_out(server, volume)
    try:
        failed = ask(server)
        assert failed.status_code == 500 and failed.json()["error"]["code"] == "read_failed"
        until(lambda: engine.switch.loaded is None)
        for _ in range(2):
            refused = ask(server)
            assert refused.status_code == 500 and refused.json()["error"]["code"] == "load_failed"
            assert "connect that" in refused.json()["error"]["message"]
        assert server.get("/health").status_code == 200
    finally:
        (volume.parent / "away").rename(volume)
    assert ask(server).json()["choices"] == expected
    assert engine.switch.loads == 2


def test_files_that_came_back_are_opened_again(server: Server, volume: Path) -> None:
    """The volume was away and is back before the next request, whose reads fail all the same."""
    expected = ask(server).json()["choices"]
    pull_out(server, volume)
    (volume.parent / "away").rename(volume)
    assert ask(server).status_code == 500
    assert ask(server).json()["choices"] == expected
    assert server.engine.switch.loads == 2


def test_an_error_of_a_file_that_is_there_costs_one_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise ReadError("the disk hiccuped.")

    with monkeypatch.context() as patched:
        patched.setattr(server.engine.model.flash.streamer, "verify_unchanged", fail)
        assert ask(server).status_code == 500
    assert ask(server).status_code == 200
    assert server.engine.switch.loads == 1


# -- the parts -----------------------------------------------------------------------------------------------


def test_a_file_is_lost_if_its_path_leads_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(8192))
    with UnitFile(path) as file:
        assert not file.is_lost()
        path.rename(tmp_path / "other")
        assert file.is_lost()
        (tmp_path / "other").rename(path)
        path.write_bytes(bytes(8192))
        assert file.is_lost(), "it was written to"
    assert not file.is_lost(), "it is closed"


def test_a_model_is_given_up_behind_the_requests_that_were_called() -> None:
    current = Target("own", "", lambda tell: (None, None))
    other = Target("other", "", lambda tell: (None, None), ("other", None))
    places = Places(10, current)
    places.set_model(current, loaded=True)
    called, waits = QueuePlace(None), QueuePlace(other)
    places.take(called)
    places.take(waits)
    places.give_up_model()
    places.give_up_model()
    late = QueuePlace(None)
    places.take(late)
    assert called.was_called and not waits.was_called and not late.was_called
    assert places.next() is None, "the request that was called is being encoded"
    places.leave(called)
    assert isinstance(places.next(), Unload)
    step = places.next()
    assert isinstance(step, Load) and step.target == other


def test_an_order_that_waits_is_kept() -> None:
    current = Target("own", "", lambda tell: (None, None))
    places = Places(10, current)
    places.set_model(current, loaded=True)
    places.take(QueuePlace(Target("other", "", lambda tell: (None, None), ("other", None)), errand=True))
    places.give_up_model()
    assert isinstance(places.next(), Load)


def test_a_folder_that_is_not_there_is_told_from_a_repository(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="If it is on another volume, connect that"):
        mlx_flash.plan(tmp_path / "nowhere")
