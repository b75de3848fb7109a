"""The menu bar app's search and downloads: scripted processes, and the real ones with a local Hub. No toolkit."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Tiny, write_tokenizer  # type: ignore[import-not-found]
from hub_server import Hub, serve  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]
from test_hub import PIECE  # type: ignore[import-not-found]
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash.apps.menubar import hub_wording
from mlx_flash.apps.menubar.controller import Controller
from mlx_flash.apps.menubar.downloads import (
    BROKEN,
    DISCARDING,
    DONE,
    DOWNLOAD,
    IDLE,
    PAUSED,
    SEARCH,
    VERDICT,
    Download,
    Downloads,
    Found,
    HubState,
    Verdict,
    is_id,
)
from mlx_flash.apps.menubar.json_process import JsonProcess, ProcessFailed
from mlx_flash.apps.menubar.settings import AppSettings, read_settings, write_settings

SECONDS = 600.0
GB = 10**9
FILES = {"bytes": 4 * GB, "missing_bytes": 4 * GB, "free_bytes": 60 * GB, "folder": "/cache"}
PLAN = {"converts": False, "smallest": 3_100_000_000, "everything": 18_200_000_000}


def until(value: Callable[[], Any], otherwise: Callable[[], object] = lambda: "") -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := value()):
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.02)
    return found


class Scripted:
    """A process with answers that a test gives. A text ends it with that error; None ends it well."""

    def __init__(self, *arguments: str) -> None:
        self.arguments = arguments
        self.answers: list[dict[str, Any] | str | None] = []
        self.given = threading.Condition()
        self.stopped = False

    def give(self, *answers: dict[str, Any] | str | None) -> None:
        with self.given:
            self.answers += answers
            self.given.notify_all()

    def stop(self) -> None:
        self.stopped = True
        self.give(None)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            with self.given:
                self.given.wait_for(lambda: self.answers)
                answer = self.answers.pop(0)
            if answer is None or self.stopped:
                return
            if isinstance(answer, str):
                raise ProcessFailed(answer)
            yield answer


class Stage:
    """Downloads whose processes are scripted."""

    def __init__(self, unfinished: tuple[str, ...] = ()) -> None:
        self.begun: list[tuple[str, Scripted]] = []
        self.unfinished: list[tuple[str, ...]] = []
        self.downloaded: list[str] = []
        self.downloads = Downloads(lambda: None, self.unfinished.append, self.downloaded.append, unfinished, self.start)

    def start(self, module: str, *arguments: str) -> Any:
        process = Scripted(*arguments)
        self.begun.append((module, process))
        return process

    def process(self, module: str, number: int = 0) -> Scripted:
        """The process with this number, among those that ran the module."""
        return until(lambda: [each for name, each in self.begun if name == module][number:] or None)[0]  # type: ignore

    def wait(self, condition: Callable[[HubState], object]) -> HubState:
        return until(  # type: ignore[no-any-return]
            lambda: state if condition(state := self.downloads.state) else None, lambda: self.downloads.state
        )

    def look_at(self, name: str, **plan: Any) -> HubState:
        number = len([name for name, _ in self.begun if name == VERDICT])
        self.downloads.look_at(name)
        self.process(VERDICT, number).give(FILES, {**PLAN, **plan}, None)
        return self.wait(lambda state: not state.looking)


# -- scripted --------------------------------------------------------------------------------------------------


def test_a_search_shows_what_comes_and_a_new_one_replaces_it() -> None:
    stage = Stage()
    stage.downloads.search("  ")
    stage.downloads.search("qwen")
    first = stage.process(SEARCH)
    assert first.arguments == ("qwen",) and stage.downloads.state.searching
    first.give({"name": "a/qwen", "size_bytes": GB, "downloads": 12_345})
    state = stage.wait(lambda state: state.found)
    assert hub_wording.row(state.found[0], state) == ("a/qwen", "1 GB", "12.3k")
    stage.downloads.search("A/Qwen")
    second = stage.process(SEARCH, 1)
    assert first.stopped and stage.downloads.state.found == (Found("A/Qwen"),)  # A whole id need not be listed.
    second.give({"name": "a/qwen", "size_bytes": GB, "downloads": 1}, None)
    state = stage.wait(lambda state: not state.searching)
    assert [found.name for found in state.found] == ["a/qwen"] and hub_wording.search_note(state) == "One model"
    stage.downloads.search("x")
    stage.process(SEARCH, 2).give("The Hub cannot be reached (x). Are you online?")
    state = stage.wait(lambda state: state.search_trouble)
    assert hub_wording.search_note(state).endswith("Are you online?")


def test_the_verdict_comes_before_a_download() -> None:
    stage = Stage()
    stage.downloads.download()  # nothing is chosen
    stage.downloads.look_at("a/b")
    process = stage.process(VERDICT)
    assert "headers" in hub_wording.verdict_lines(stage.downloads.state)[1]
    process.give(FILES)
    state = stage.wait(lambda state: state.verdict)
    assert hub_wording.verdict_lines(state)[0] == "Size 4 GB; 60 GB free on the disk"
    assert not hub_wording.can_download(state)
    process.give(PLAN, None)
    state = stage.wait(lambda state: not state.looking)
    assert hub_wording.verdict_lines(state, 8 * GB)[1] == (
        "Fits into this machine's 8 GB: smallest budget 3.1 GB, all of it in memory 18.2 GB."
    )
    assert hub_wording.verdict_lines(state, 3 * GB)[1].startswith("Does not fit into this machine's 3 GB: smallest")
    assert hub_wording.can_download(state) and not hub_wording.is_here(state)
    stage.downloads.look_at("a/b")  # It is known.
    assert len(stage.begun) == 1
    assert hub_wording.verdict_lines(stage.look_at("c/d", converts=True, smallest=None))[1].startswith(
        "It is converted"
    )
    stage.downloads.look_at("e/f")
    stage.process(VERDICT, 2).give(FILES, "e/f is of model type 'x', which neither zoo knows.")
    state = stage.wait(lambda state: state.reason)
    assert hub_wording.verdict_lines(state)[1] == state.reason and not hub_wording.can_download(state)


def test_a_download_is_paused_continued_broken_and_finished() -> None:
    stage = Stage()
    stage.look_at("a/b")
    stage.downloads.download()
    stage.downloads.download()  # It is running.
    first = stage.process(DOWNLOAD)
    assert first.arguments == ("a/b", "--json", "--exit-with-stdin") and stage.unfinished == [("a/b",)]
    assert hub_wording.download_line(stage.downloads.state.download) == "a/b: beginning"
    assert hub_wording.download_button(stage.downloads.state) == "Pause"
    first.give({"done": GB, "total": 4 * GB, "rate": 5e7, "seconds_left": 60.0})
    state = stage.wait(lambda state: state.download.done)
    assert hub_wording.download_line(state.download) == "a/b: 1 GB of 4 GB · 50 MB/s · 1 min left"
    assert hub_wording.share_done(state.download) == 0.25

    stage.downloads.pause()
    until(lambda: first.stopped)
    state = stage.downloads.state
    assert state.download.phase == PAUSED and hub_wording.download_line(state.download) == "a/b: paused at 1 GB of 4 GB"
    assert hub_wording.download_button(state) == "Continue" and hub_wording.can_discard(state)
    stage.downloads.download()
    stage.process(DOWNLOAD, 1).give("downloading a/b failed: x. Run the same command again to continue.")
    state = stage.wait(lambda state: state.download.phase == BROKEN)
    assert hub_wording.download_line(state.download) == "a/b stopped at 1 GB of 4 GB: downloading a/b failed: x."

    stage.downloads.download()
    process = stage.process(DOWNLOAD, 2)
    process.give({"done": 4 * GB, "total": 4 * GB, "rate": None, "seconds_left": None}, {"folder": "/x"}, None)
    until(lambda: stage.downloaded)  # the last of several changes
    state = stage.downloads.state
    assert state.download.phase == DONE and hub_wording.is_here(state)
    assert stage.downloaded == ["a/b"] and stage.unfinished[-1] == ()
    assert not hub_wording.can_download(state) and not hub_wording.can_discard(state)
    stage.downloads.close()


def test_a_download_is_cancelled_with_all_that_came() -> None:
    stage = Stage(("c/d",))
    assert stage.downloads.state.found == (Found("c/d"),)  # An earlier run of the app began it.
    assert hub_wording.row(Found("c/d"), stage.downloads.state) == ("c/d", "", "not finished")
    stage.downloads.discard()
    assert not stage.begun
    stage.look_at("a/b")
    stage.downloads.download()
    process = stage.process(DOWNLOAD)
    stage.downloads.discard()
    removing = stage.process(DOWNLOAD, 1)
    assert process.stopped and removing.arguments == ("a/b", "--discard", "--json", "--exit-with-stdin")
    assert stage.downloads.state.download.phase == DISCARDING
    assert hub_wording.download_line(stage.downloads.state.download).startswith("Removing")
    removing.give({"freed": 5}, None)
    stage.wait(lambda state: state.download.phase == IDLE)
    assert stage.unfinished[-1] == ("c/d",)
    stage.look_at("c/d")
    stage.downloads.discard()
    stage.process(DOWNLOAD, 2).give("the disk is gone")
    state = stage.wait(lambda state: state.download.phase == BROKEN)
    assert state.download.trouble == "the disk is gone" and state.unfinished == ("c/d",)


def test_another_model_takes_the_place_of_a_download() -> None:
    stage = Stage()
    stage.look_at("a/b")
    stage.downloads.download()
    first = stage.process(DOWNLOAD)
    stage.look_at("c/d")
    assert hub_wording.can_download(stage.downloads.state)
    stage.downloads.download()
    assert stage.process(DOWNLOAD, 1).arguments[0] == "c/d" and first.stopped
    assert stage.downloads.state.unfinished == ("c/d", "a/b")
    stage.downloads.close()


def test_room_on_the_disk_and_words() -> None:
    verdict = Verdict(4 * GB, 3 * GB, GB, smallest=GB, everything=GB)
    state = HubState(chosen="a/b", verdict=verdict)
    assert hub_wording.size_line(verdict) == "Size 4 GB, 3 GB still to download; 1 GB free on the disk, too little"
    assert not hub_wording.can_download(state)
    here = HubState(chosen="a/b", verdict=Verdict(4 * GB, 0, GB, smallest=GB, everything=GB))
    assert hub_wording.is_here(here) and hub_wording.size_line(here.verdict or verdict).endswith("already downloaded")
    assert [hub_wording.duration_text(s) for s in (5.4, 700.0, 11_100.0)] == ["5 s", "12 min", "3 h 5 min"]
    assert [hub_wording.count_text(n) for n in (7, 1200, 3_400_000)] == ["7", "1.2k", "3.4M"]
    assert hub_wording.download_line(Download()) == ""
    assert [is_id(text) for text in ("a/b", "a/", "/b", "a", "a/b/c", "./x", "~/x")] == [True] + [False] * 6
    lines = hub_wording.wrapped("word " * 200).splitlines()
    assert len(lines) == hub_wording.LINES and max(map(len, lines)) <= hub_wording.LINE_CHARACTERS
    assert lines[-1].endswith(" …")


def test_settings_keep_unfinished_downloads(tmp_path: Path) -> None:
    file = tmp_path / "menubar.json"
    write_settings(file, AppSettings(model="a/b", unfinished=("c/d",)))
    assert read_settings(file).unfinished == ("c/d",)
    assert read_settings(file).with_recent("e/f") == AppSettings("a/b", ("e/f",), {}, ("c/d",))
    controller = Controller(file)
    assert controller.downloads.state.unfinished == ("c/d",)
    controller.downloads._note_unfinished("c/d", False)
    controller.downloads._on_downloaded("g/h")
    assert read_settings(file) == AppSettings("a/b", ("g/h",)) == controller.state.settings
    controller.close()


def test_a_process_that_cannot_start_or_says_why_it_ended() -> None:
    def start(*_: str) -> Any:
        raise OSError("no processes left")

    downloads = Downloads(start=start)
    downloads.search("x")
    assert until(lambda: downloads.state.search_trouble) == "no processes left"
    with pytest.raises(ProcessFailed, match="No module named"):
        list(JsonProcess("mlx_flash.apps.menubar.nothing"))


# -- with a local Hub ------------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as hub:
        for name in [name for name in os.environ if name.startswith(("HF_", "HUGGING"))]:
            monkeypatch.delenv(name)
        for name, value in hub.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield hub


def test_a_model_is_found_looked_at_downloaded_and_forgotten(hub: Hub, tmp_path: Path, tiny: Tiny) -> None:
    folder = make_mixture(tmp_path / "mixture", "qwen3_moe")
    write_tokenizer(folder)
    hub.add("owner/Mixture", folder)
    hub.add("owner/relu-mixture", tiny.checkpoint)
    hub.add("other/mixture-GGUF", tmp_path / "nothing", **{"config.json": b'{"model_type": "qwen3_moe"}'})
    hub.add("other/mixture-of-nobody", folder, **{"config.json": b'{"model_type": "nobody"}'})
    hub.add("owner/unrelated", folder)
    hub.downloads |= {"owner/relu-mixture": 7, "owner/Mixture": 1234}
    got: list[str] = []
    downloads = Downloads(on_downloaded=got.append)

    def wait(condition: Callable[[HubState], object]) -> HubState:
        found: HubState = until(lambda: s if condition(s := downloads.state) else None, lambda: downloads.state)
        return found

    downloads.search("mixture")
    state = wait(lambda state: not state.searching)
    assert [found.name for found in state.found] == ["owner/Mixture", "owner/relu-mixture"], state
    weights = (folder / "model.safetensors").stat().st_size
    assert 0.9 * weights < (state.found[0].size_bytes or 0) < weights and state.found[0].downloads == 1234

    downloads.look_at("owner/Mixture")
    state = wait(lambda state: not state.looking)
    assert hub_wording.can_download(state) and state.verdict is not None, state
    assert 0 < (state.verdict.smallest or 0) <= (state.verdict.everything or 0)
    assert all(span is not None for span in hub.fetched()["model.safetensors"])
    downloads.download()
    wait(lambda state: got or state.download.phase == BROKEN)
    state = downloads.state
    assert state.download.phase == DONE and got == ["owner/Mixture"] and state.unfinished == (), state

    big = make_checkpoint(tmp_path / "big", hidden=256, neurons=2048, layers=4)
    hub.add("owner/big", big)
    hub.stall_at["model.safetensors"] = PIECE + PIECE // 2
    downloads._change(chosen="owner/big")  # without asking for a verdict
    downloads.download()
    wait(lambda state: state.download.done >= PIECE)
    downloads.pause()
    (partial,) = (tmp_path / "home").rglob("*.incomplete")
    downloads.discard()
    wait(lambda state: state.download.phase == IDLE)
    assert not partial.exists()
    downloads.close()


def test_what_the_window_says_when_the_hub_refuses_or_is_away(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.repositories["owner/gated"] = {"main": {"config.json": b"{}", "model.safetensors": b"x"}}
    hub.gated.add("owner/gated")
    downloads = Downloads()
    downloads.look_at("owner/gated")
    until(lambda: not downloads.state.looking)
    assert "is gated" in downloads.state.reason and "HF_TOKEN" in downloads.state.reason
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    downloads.search("x")
    until(lambda: not downloads.state.searching)
    assert "HF_HUB_OFFLINE is set" in downloads.state.search_trouble
    downloads.close()
