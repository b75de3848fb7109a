"""All state and logic of the app, without a GUI toolkit: a view reads `state` and calls the methods.

Methods return at once. Slow work happens in threads, and operations on the engine run one at a time. After every change
`on_change` is called, from any thread.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from .budgets import Budget, fixed_budgets, planned_budgets, served_budgets
from .client import Client, ServerAnswer, ServerError
from .downloads import Downloads
from .model_choices import loaded_name, name_of, with_values
from .observed import Observed
from .server_process import EngineProcess, server_command, why_it_ended
from .settings import AppSettings, read_settings, write_settings

POLL_SECONDS = 0.5
LIBRARY_POLLS = 20  # The server lists its models anew after so many polls, or when another one is loaded.
LOST_POLLS = 20  # After this many polls without an answer, a living engine is ended.
MAX_TOKENS = 200  # in the answer to a quick question

STOPPED, STARTING, RUNNING, STOPPING, FAILED = "stopped", "starting", "running", "stopping", "failed"


@dataclass(frozen=True)
class State:
    """The state to show. Every change makes a new one."""

    settings: AppSettings
    phase: str = STOPPED
    address: str = ""  # address of the page while the engine runs
    progress: str = ""  # the engine's last line while it starts
    trouble: str = ""  # a sentence that says why the engine ended
    last_lines: tuple[str, ...] = ()  # last lines of an engine that ended
    budgets: tuple[Budget, ...] = ()  # the budgets to choose from
    stats: dict[str, Any] | None = None  # the server's /stats
    library: dict[str, Any] | None = None  # from `with_values`; the last one after the server ended
    notice: str = ""  # a sentence to show once
    question: str = ""
    answer: str = ""
    answering: bool = False
    answer_trouble: str = ""

    @property
    def endpoint(self) -> str:
        """The base URL for clients of OpenAI's API."""
        return f"{self.address}/v1" if self.address else ""

    @property
    def served(self) -> str:
        """What the running server does: "ready", "loading", "unloaded" or "failed"; "" if it does not run."""
        return str((self.stats or {}).get("state", "ready")) if self.phase == RUNNING else ""

    @property
    def tokens_per_second(self) -> float | None:
        """The speed of the running request; None before its first tokens."""
        now = (self.stats or {}).get("now")
        rate = now.get("tokens_per_second") if isinstance(now, dict) else None
        return float(rate) if rate else None


class Controller(Observed[State]):
    def __init__(
        self,
        settings_file: Path,
        on_change: Callable[[], None] = lambda: None,
        command: Callable[[str | None, int | None], list[str]] = server_command,
    ) -> None:
        """
        Args:
            settings_file: the file for the user's choices.
            on_change: called after every change of `state`, from any thread.
            command: makes the command that runs the engine, from a model and a budget in bytes.
        """
        super().__init__(State(read_settings(settings_file), budgets=fixed_budgets()), on_change)
        self._file = settings_file
        self._command = command
        self._engine: EngineProcess | None = None
        self._answer: ServerAnswer | None = None
        self._turn = 0  # number of the current question
        self._operations = ThreadPoolExecutor(1, "engine")
        self._closed = False
        self._started: str | None = None  # the model and the budget that the engine was started with
        self._own_name = ""  # the engine's name for that model
        self._has_budget = False  # whether it was given one, then or later
        self.downloads = Downloads(
            on_change, self._note_unfinished, self._note_downloaded, self._state.settings.unfinished
        )
        self._ask_for_budgets()

    # -- actions of the user ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the engine if it is not running."""
        with self._lock:
            if not self._closed and self._state.phase in (STOPPED, FAILED):
                self._change(phase=STARTING, progress="", trouble="", last_lines=())
        self._later(self._start)

    def stop(self) -> None:
        self._later(self._stop)

    def choose_model(self, model: str | None) -> None:
        """Chooses a folder or a Hugging Face id; None for the demo model.

        A running engine loads it, or is restarted with it if it does not list it.
        """
        settings = self._state.settings.with_model(model.strip() or None if model else None)
        if self._load_instead(settings):
            return
        self._settle(settings)
        self._change(budgets=fixed_budgets())
        self._ask_for_budgets()

    def choose_budget(self, size: int | None) -> None:
        """Chooses a budget in bytes; None for a share of free memory. A running engine loads its model again with it,
        or is restarted."""
        settings = self._state.settings.with_budget(size)
        if not self._load_instead(settings):
            self._settle(settings)

    def unload(self) -> None:
        """Frees the model's memory. The next question loads the model again."""
        if self._state.phase == RUNNING:
            self._later(partial(self._ask_server, lambda client: client.unload()))

    def notice_was_shown(self) -> None:
        self._change(notice="")

    def ask(self, question: str) -> None:
        """Asks the engine; the answer arrives in `state`. An answer that is still running is cancelled."""
        question = question.strip()
        if not question:
            return
        self.cancel()
        if self._state.phase != RUNNING:
            self._change(question=question, answer="", answer_trouble="The engine is not running. Start it first.")
            return
        client = Client(self._state.address)
        self._change(question=question, answer="", answering=True, answer_trouble="")
        threading.Thread(target=self._collect, args=(client, question, self._turn), daemon=True).start()

    def cancel(self) -> None:
        """Stops the answer; the text that has arrived stays."""
        with self._lock:
            self._turn += 1
            answer, self._answer = self._answer, None
            self._change(answering=False)
        if answer is not None:
            answer.cancel()

    def close(self) -> None:
        """Ends every process and thread of this app, and waits for that."""
        self._closed = True
        self.downloads.close()
        self.cancel()
        with contextlib.suppress(RuntimeError):  # It is closed already.
            self._operations.submit(self._stop)
        self._operations.shutdown(wait=True)

    # -- the engine ------------------------------------------------------------------------------------------

    def _later(self, operation: Callable[[], None]) -> None:
        if not self._closed:
            self._operations.submit(operation).add_done_callback(self._finished)

    def _finished(self, future: Future[None]) -> None:
        if (error := future.exception()) is not None:
            self._change(phase=FAILED, trouble=f"The app itself failed: {type(error).__name__}: {error}")

    def _start(self) -> None:
        if self._engine is not None:
            return
        settings = self._state.settings
        self._change(phase=STARTING, progress="", trouble="", last_lines=())
        listening = threading.Event()
        addresses: list[str] = []

        def on_listening(address: str) -> None:
            addresses.append(address)
            listening.set()

        def on_line(line: str) -> None:
            if self._state.phase == STARTING:
                self._change(progress=line)

        try:
            engine = EngineProcess(self._command(settings.model, settings.budget))
        except OSError as error:
            self._change(phase=FAILED, trouble=f"The engine cannot be started: {error}")
            return

        def on_end(code: int) -> None:
            listening.set()
            self._ended(engine, code)

        self._engine = engine
        self._started, self._own_name, self._has_budget = settings.model, "", settings.budget is not None
        engine.watch(on_listening, on_line, on_end)
        threading.Thread(target=self._follow, args=(engine, listening, addresses), daemon=True).start()

    def _stop(self) -> None:
        with self._lock:
            engine, self._engine = self._engine, None  # so that its end is expected
        if engine is None:
            self._change(phase=STOPPED, trouble="", last_lines=())
            return
        self._change(phase=STOPPING, address="")
        self.cancel()
        engine.stop()
        self._change(phase=STOPPED, stats=None, trouble="", last_lines=(), progress="")

    def _ended(self, engine: EngineProcess, code: int) -> None:
        with self._lock:
            if self._engine is not engine:
                return  # It was stopped on purpose.
            self._engine = None
            lines = tuple(engine.lines)
            self._change(
                phase=FAILED, trouble=why_it_ended(code, lines), last_lines=lines, address="", stats=None, progress=""
            )

    def _give_up(self, engine: EngineProcess, trouble: str) -> None:
        """Ends an engine whose process runs but is of no use."""
        with self._lock:
            if self._engine is not engine:
                return
            self._engine = None
        engine.stop()
        lines = tuple(engine.lines)
        self._change(phase=FAILED, trouble=trouble, last_lines=lines, address="", stats=None, progress="")

    def _follow(self, engine: EngineProcess, listening: threading.Event, addresses: list[str]) -> None:
        """Waits until the model is loaded, then updates `state.stats` while this engine is the current one."""
        listening.wait()
        if not addresses:
            return  # The engine ended before.
        client = Client(addresses[0])
        pause = threading.Event()
        silent, polls, listed = 0, 0, None
        while self._engine is engine:
            try:
                if self._state.phase == STARTING:
                    self._look_whether_ready(engine, client, addresses[0])
                if self._state.phase == RUNNING:
                    stats = client.stats()
                    self._change_if(engine, stats=stats)
                    now = stats.get("state"), (stats.get("library") or {}).get("loads")
                    if now != listed or polls % LIBRARY_POLLS == 0:
                        self._change_if(engine, **self._listed(client, stats))
                    polls, listed = polls + 1, now
                silent = 0
            except ServerError as error:
                silent += 1
                if silent > LOST_POLLS:
                    return self._later(partial(self._give_up, engine, f"The engine was ended because {error}"))
            pause.wait(POLL_SECONDS)

    def _listed(self, client: Client, stats: dict[str, Any]) -> dict[str, Any]:
        """The changes that the server's list of models brings; none if it has no such list."""
        try:
            library = with_values(client.library())
        except ServerError:
            return {}
        if not self._own_name and library.get("state") == "ready":
            self._own_name = loaded_name(library)
        budgets = served_budgets(library, (stats.get("model") or {}).get("kind", "units"))
        return {"library": library, **({"budgets": budgets} if budgets else {})}

    def _look_whether_ready(self, engine: EngineProcess, client: Client, address: str) -> None:
        health = client.health()
        if health.get("status") == "ok":
            engine.lines.clear()  # Lines about loading do not explain a later end.
            self._change_if(engine, phase=RUNNING, address=address, progress="")
            if self._state.budgets == fixed_budgets():
                self._ask_for_budgets()  # By now the model is downloaded and converted.
        elif health.get("status") == "failed":
            trouble = str(health.get("error") or "The engine could not load the model.")
            self._later(partial(self._give_up, engine, trouble))

    # -- choices ---------------------------------------------------------------------------------------------

    def _load_instead(self, settings: AppSettings) -> bool:
        """Lets the running engine load the model of `settings`; False if it cannot, so that it must be restarted."""
        before, state = self._state.settings, self._state
        if state.phase != RUNNING or (settings.model, settings.budget) == (before.model, before.budget):
            return False
        name = name_of(settings.model, state.library, self._started, self._own_name)
        if name is None or (settings.budget is None and self._has_budget):
            return False  # The server has no way back to a share of the free memory.
        self._later(partial(self._ask_server, lambda client: client.load(name, settings.budget), settings))
        return True

    def _ask_server(self, ask: Callable[[Client], dict[str, Any]], settings: AppSettings | None = None) -> None:
        """Asks the running engine for something. settings: what becomes the user's choice if it agrees."""
        state = self._state
        if state.phase != RUNNING:
            return
        try:
            library = with_values(ask(Client(state.address)))
        except ServerError as error:
            self._change(notice=str(error))
            return
        self._change(library=library)
        if settings is not None:
            self._has_budget = self._has_budget or settings.budget is not None
            self._keep(settings)

    def _keep(self, settings: AppSettings) -> None:
        with self._lock:
            self._change(settings=settings)
            with contextlib.suppress(OSError):  # On a full disk the choice lasts until the app ends.
                write_settings(self._file, settings)

    def _settle(self, settings: AppSettings) -> None:
        changed = settings != self._state.settings
        self._keep(settings)
        if changed and self._engine is not None:
            self._later(self._stop)
            self._later(self._start)

    def _note_unfinished(self, names: tuple[str, ...]) -> None:
        with self._lock:
            self._keep(replace(self._state.settings, unfinished=names))

    def _note_downloaded(self, name: str) -> None:
        with self._lock:
            self._keep(self._state.settings.with_recent(name))

    def _ask_for_budgets(self) -> None:
        model = self._state.settings.model

        def ask() -> None:
            budgets = planned_budgets(model)
            with self._lock:
                if budgets is not None and self._state.settings.model == model:
                    self._change(budgets=budgets)

        threading.Thread(target=ask, daemon=True).start()

    # -- a question ------------------------------------------------------------------------------------------

    def _collect(self, client: Client, question: str, turn: int) -> None:
        trouble = ""
        try:
            answer = client.ask(question, MAX_TOKENS)
            with self._lock:
                if self._turn == turn:
                    self._answer = answer
                else:
                    answer.cancel()
            for piece in answer:
                with self._lock:
                    if self._turn == turn:
                        self._change(answer=self._state.answer + piece)
        except ServerError as error:
            trouble = str(error)
        with self._lock:
            if self._turn == turn:
                self._answer = None
                self._change(answering=False, answer_trouble=trouble)

    # -- state -----------------------------------------------------------------------------------------------

    def _change_if(self, engine: EngineProcess, **changes: Any) -> None:
        """Changes the state if `engine` is still the current one."""
        with self._lock:
            if self._engine is engine:
                self._change(**changes)
