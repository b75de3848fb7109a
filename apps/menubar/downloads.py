"""State and logic of the window that searches the Hub and downloads, without a GUI toolkit.

As in the controller, methods return at once, and `on_change` is called after every change, from any thread. Every slow
step is a process of its own (`json_process`); a new step of the same kind ends the one before it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from .json_process import JsonProcess, ProcessFailed
from .observed import Observed

SEARCH = "mlx_flash.apps.menubar.hub_search"
VERDICT = "mlx_flash.apps.menubar.hub_verdict"
DOWNLOAD = "mlx_flash.download"

IDLE, LOADING, PAUSED, BROKEN, DONE, DISCARDING = "idle", "loading", "paused", "broken", "done", "discarding"


@dataclass(frozen=True)
class Found:
    """A model on the Hub. downloads: how often it was downloaded; None where the Hub was not asked."""

    name: str
    size_bytes: int | None = None
    downloads: int | None = None


@dataclass(frozen=True)
class Verdict:
    """What is known of a model before it is downloaded, in bytes.

    nbytes: of all its files. missing: of those that are not here. free: on the disk. converts: whether it runs only
    after a conversion. smallest, everything: two budgets; None before they are known.
    """

    nbytes: int
    missing: int
    free: int
    converts: bool = False
    smallest: int | None = None
    everything: int | None = None

    @property
    def complete(self) -> bool:
        """Whether all that can be said is said."""
        return self.converts or self.smallest is not None


@dataclass(frozen=True)
class Download:
    """A download, running or not. Bytes; the rate is in bytes per second."""

    name: str = ""
    phase: str = IDLE
    done: int = 0
    total: int = 0
    rate: float | None = None
    seconds_left: float | None = None
    trouble: str = ""


@dataclass(frozen=True)
class HubState:
    """The state to show. Every change makes a new one."""

    text: str = ""  # that was searched for
    searching: bool = False
    found: tuple[Found, ...] = ()
    search_trouble: str = ""
    chosen: str = ""  # a model's name
    looking: bool = False  # whether the verdict on it is being made
    verdict: Verdict | None = None
    reason: str = ""  # why it does not run, or why nothing is known of it
    download: Download = Download()
    unfinished: tuple[str, ...] = ()  # models whose downloads were begun and not finished


class Downloads(Observed[HubState]):
    def __init__(
        self,
        on_change: Callable[[], None] = lambda: None,
        on_unfinished: Callable[[tuple[str, ...]], None] = lambda _: None,
        on_downloaded: Callable[[str], None] = lambda _: None,
        unfinished: tuple[str, ...] = (),
        start: Callable[..., JsonProcess] = JsonProcess,
    ) -> None:
        """
        Args:
            on_change: called after every change of `state`, from any thread.
            on_unfinished: called with `state.unfinished` when it has changed.
            on_downloaded: called with the name of a model once it is downloaded.
            unfinished: downloads that earlier runs of the app began.
            start: starts a process, from a module and arguments.
        """
        super().__init__(HubState(unfinished=unfinished, found=tuple(Found(name) for name in unfinished)), on_change)
        self._on_unfinished, self._on_downloaded = on_unfinished, on_downloaded
        self._start = start
        self._running: dict[str, JsonProcess] = {}  # module -> its process
        self._turns = dict.fromkeys((SEARCH, VERDICT, DOWNLOAD), 0)  # module -> number of the last process
        self._closed = False

    # -- actions of the user ---------------------------------------------------------------------------------

    def search(self, text: str) -> None:
        """Searches for models whose names contain a text. A whole id (owner/name) is always among the results."""
        if not (text := text.strip()):
            return
        self._change(text=text, searching=True, found=(Found(text),) if is_id(text) else (), search_trouble="")
        self._run(SEARCH, [text], self._searched, self._search_ended)

    def look_at(self, name: str) -> None:
        """Chooses a model, and asks how large it is, whether it runs, and in how much memory."""
        state = self._state
        if name == state.chosen and (state.looking or (state.verdict is not None and state.verdict.complete)):
            return
        self._change(chosen=name, looking=True, verdict=None, reason="")
        self._run(VERDICT, [name], self._told, self._look_ended)

    def download(self) -> None:
        """Downloads the chosen model, or continues its download. Another one that is running is paused."""
        with self._lock:
            now, name = self._state.download, self._state.chosen
            if not name or now.phase == DISCARDING or (now.phase == LOADING and now.name == name):
                return
            kept = now if now.name == name else Download(name)
            self._change(download=replace(kept, phase=LOADING, rate=None, seconds_left=None, trouble=""))
            self._note_unfinished(name, True)
        self._run(DOWNLOAD, [name, "--json", "--exit-with-stdin"], self._arrived, self._download_ended)

    def pause(self) -> None:
        """Stops the download; what has arrived is kept."""
        with self._lock:
            if self._state.download.phase != LOADING:
                return
            process = self._taken(DOWNLOAD)
            self._change_download(phase=PAUSED, rate=None, seconds_left=None)
        if process is not None:
            threading.Thread(target=process.stop, daemon=True).start()

    def discard(self) -> None:
        """Stops the download, or gives up one that was not finished, and removes what has arrived of it."""
        with self._lock:
            now = self._state.download
            name = now.name if now.phase in (LOADING, PAUSED, BROKEN) else self._state.chosen
            if name not in self._state.unfinished:
                return
            self._change(download=Download(name, DISCARDING))
        self._run(DOWNLOAD, [name, "--discard", "--json", "--exit-with-stdin"], lambda _: None, self._discarded)

    def close(self) -> None:
        """Ends every process, and waits for that. A download can be continued later."""
        self._closed = True
        for module in (SEARCH, VERDICT, DOWNLOAD):
            if (process := self._taken(module)) is not None:
                process.stop()

    # -- answers, in the order of the methods above --------------------------------------------------------------

    def _searched(self, answer: dict[str, Any]) -> None:
        found = Found(str(answer["name"]), answer["size_bytes"], answer["downloads"])
        others = tuple(each for each in self._state.found if each.name.lower() != found.name.lower())
        self._change(found=(*others, found))

    def _search_ended(self, trouble: str = "") -> None:
        self._change(searching=False, search_trouble=trouble)

    def _told(self, answer: dict[str, Any]) -> None:
        """The first answer is about the files, the second about the plan."""
        if (verdict := self._state.verdict) is None:
            verdict = Verdict(answer["bytes"], answer["missing_bytes"], answer["free_bytes"])
        else:
            verdict = replace(verdict, **answer)
        self._change(verdict=verdict)

    def _look_ended(self, trouble: str = "") -> None:
        self._change(looking=False, reason=trouble)

    def _arrived(self, answer: dict[str, Any]) -> None:
        if "folder" not in answer:
            return self._change_download(**answer)
        name = self._state.download.name
        self._change_download(phase=DONE, done=self._state.download.total, rate=None, seconds_left=None)
        if self._state.chosen == name and (verdict := self._state.verdict) is not None:
            self._change(verdict=replace(verdict, missing=0))
        self._note_unfinished(name, False)
        self._on_downloaded(name)

    def _download_ended(self, trouble: str = "") -> None:
        if trouble or self._state.download.phase != DONE:
            trouble = trouble or "The download ended without a message."
            self._change_download(phase=BROKEN, rate=None, seconds_left=None, trouble=trouble)

    def _discarded(self, trouble: str = "") -> None:
        if trouble:
            return self._change_download(phase=BROKEN, trouble=trouble)
        self._note_unfinished(self._state.download.name, False)
        self._change(download=Download())

    # -- processes -------------------------------------------------------------------------------------------

    def _run(
        self,
        module: str,
        arguments: list[str],
        on_answer: Callable[[dict[str, Any]], None],
        on_end: Callable[[str], None],
    ) -> None:
        """Runs a module in a process, after one that still runs of it has been ended.

        on_answer: called with each answer. on_end: called at the end, with the reason if it failed. Neither is called
        any more once another process replaces this one.
        """
        before = self._taken(module)
        turn = self._turns[module]

        def if_current(call: Callable[[], None]) -> None:
            with self._lock:
                if self._turns[module] == turn and not self._closed:
                    call()

        def work() -> None:
            if before is not None:
                before.stop()
            with self._lock:
                if self._turns[module] != turn or self._closed:
                    return
                try:
                    process = self._running[module] = self._start(module, *arguments)
                except OSError as error:
                    return on_end(str(error))
            trouble = ""
            try:
                for answer in process:
                    if_current(partial(on_answer, answer))
            except ProcessFailed as error:
                trouble = str(error)
            if_current(partial(on_end, trouble))

        threading.Thread(target=work, daemon=True).start()

    def _taken(self, module: str) -> JsonProcess | None:
        """The process that runs a module, if there is one. Its answers do not count from now on."""
        with self._lock:
            self._turns[module] += 1
            return self._running.pop(module, None)

    # -- state -----------------------------------------------------------------------------------------------

    def _note_unfinished(self, name: str, unfinished: bool) -> None:
        others = tuple(each for each in self._state.unfinished if each != name)
        self._change(unfinished=(name, *others) if unfinished else others)
        self._on_unfinished(self._state.unfinished)

    def _change_download(self, **changes: Any) -> None:
        self._change(download=replace(self._state.download, **changes))


def is_id(text: str) -> bool:
    """Whether a text has the form of a repository's id, owner/name."""
    owner, slash, name = text.partition("/")
    return bool(owner and slash and name) and "/" not in name and not text.startswith((".", "/", "~"))
