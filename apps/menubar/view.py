"""The toga app: shows the controller's state as a menu bar item, and passes clicks on to the controller."""

from __future__ import annotations

import asyncio
import tempfile
import webbrowser
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import toga

import mlx_flash

from . import wording
from .controller import FAILED, STOPPING, Controller, State
from .hub_window import HubWindow
from .icon import Icons
from .model_choices import choices
from .native import copy_text, menu_is_open, set_text
from .settings import settings_file
from .windows import AskWindow, StatisticsWindow

TICK_SECONDS = 0.5  # time until the next attempt to rebuild a menu that was open


class Menubar:
    """The item in the menu bar and its menu."""

    def __init__(self, app: toga.App, folder: Path) -> None:
        """folder: for the drawn icons."""
        self._app = app
        self._icons = Icons(folder)
        self._toga_icons: dict[Path, toga.Icon] = {}
        self._shown_structure: object = None
        self._shown_phase = ""
        self._refreshing = False
        self.closing = False
        self._ask: AskWindow | None = None
        self._statistics: StatisticsWindow | None = None
        self._hub: HubWindow | None = None
        self.controller = Controller(settings_file(), on_change=self._changed)
        self._item = toga.MenuStatusIcon(text=app.formal_name, icon=self._icon(self.controller.state))
        app.status_icons.add(self._item)
        self._make_lines()
        self._refresh()

    async def run(self) -> None:
        self.controller.start()
        while not self.closing:  # While the app exits, Qt may call back once more, without a running event loop.
            self._refresh()
            await asyncio.sleep(TICK_SECONDS)

    # -- display ---------------------------------------------------------------------------------------------

    def _changed(self) -> None:
        """Schedules a refresh in the main thread, which owns the widgets. Changes in quick succession share one."""
        if not self._refreshing:
            self._refreshing = True
            self._app.loop.call_soon_threadsafe(self._refresh)

    def _refresh(self) -> None:
        self._refreshing = False
        state = self.controller.state
        models = choices(state.settings, state.library)
        structure = (state.settings, models, state.budgets, state.phase)
        if structure != self._shown_structure and not menu_is_open(self._item):
            self._shown_structure = structure
            self._build_menu(state, models)
        self._show(self._headline, wording.padded(wording.headline(state)))
        self._show(self._start_or_stop, wording.start_or_stop(state))
        self._enable(self._start_or_stop, state.phase != STOPPING)
        self._enable(self._unload, state.served == "ready" and state.library is not None)
        for line in (self._open_page, self._copy):
            self._enable(line, bool(state.address))
        icon = self._icon(state)
        if self._item.icon != icon:
            self._item.icon = icon
        if self._ask is not None:
            self._ask.show(state, wording.headline(state))
        if self._statistics is not None:
            self._statistics.show(wording.statistics(state))
        if self._hub is not None:
            self._hub.show(self.controller.downloads.state)
        if state.notice:
            self.controller.notice_was_shown()
            self._app.loop.create_task(self._app.dialog(toga.InfoDialog("The model was not changed", state.notice)))
        if state.phase != self._shown_phase:
            self._shown_phase = state.phase
            if state.phase == FAILED:
                self._app.loop.create_task(self._offer_restart(state))

    def _show(self, line: toga.Command, text: str) -> None:
        if line.text != text:
            set_text(line, text)

    def _enable(self, line: toga.Command, enabled: bool) -> None:
        if line.enabled != enabled:
            line.enabled = enabled

    def _icon(self, state: State) -> toga.Icon:
        file = self._icons.file(wording.icon_text(state), state.phase)
        if file not in self._toga_icons:
            self._toga_icons[file] = toga.Icon(file)
        return self._toga_icons[file]

    # -- the menu --------------------------------------------------------------------------------------------

    def _make_lines(self) -> None:
        """Makes the lines that are always in the menu."""
        controller = self.controller

        def line(action: Callable[..., object], text: str, section: int, order: int) -> toga.Command:
            return toga.Command(action, text, group=self._item, section=section, order=order)

        self._headline = line(lambda _: self._open_statistics(), "", 0, 0)
        self._start_or_stop = line(lambda _: self._press_start_or_stop(), "Start the engine", 1, 0)
        self._unload = line(lambda _: controller.unload(), "Unload the model", 1, 1)
        self._open_page = line(lambda _: webbrowser.open(controller.state.address), "Open the page", 3, 1)
        self._copy = line(lambda _: copy_text(controller.state.endpoint), "Copy the endpoint", 3, 2)
        self._lines = [
            self._headline,
            self._start_or_stop,
            self._unload,
            line(lambda _: self._open_ask(), "Ask…", 3, 0),
            self._open_page,
            self._copy,
            line(lambda _: self._open_statistics(), "Statistics…", 3, 3),
            line(lambda _: self._app.request_exit(), "Quit", 4, 0),
        ]

    def _build_menu(self, state: State, models: list[str | None]) -> None:
        controller = self.controller
        of_models = toga.Group("Model", parent=self._item, section=2, order=0)
        budgets = toga.Group("Memory", parent=self._item, section=2, order=1)
        lines = list(self._lines)

        def add(group: toga.Group, section: int, action: Callable[..., object], text: str) -> None:
            lines.append(toga.Command(action, text, group=group, section=section, order=len(lines)))

        for model in models:
            choose = partial(_without_command, controller.choose_model, model)
            add(of_models, 0, choose, wording.model_label(model, state))
        add(of_models, 1, self._choose_folder, wording.NO_MARK + "A folder…")
        add(of_models, 1, lambda _: self._open_hub(), wording.NO_MARK + "Download a model…")
        free = wording.free_memory(state)
        for budget in wording.budgets_of(state):
            choose = partial(_without_command, controller.choose_budget, budget and budget.size)
            add(budgets, 0 if budget is None else 1, choose, wording.budget_label(budget, state, free))
        commands = self._app.status_icons.commands
        on_change, commands.on_change = commands.on_change, None  # one call for all commands, not one for each
        commands.clear()
        commands.on_change = on_change
        commands.add(*lines)

    # -- clicks ----------------------------------------------------------------------------------------------

    def _press_start_or_stop(self) -> None:
        state = self.controller.state
        if wording.start_or_stop(state).startswith("Start"):
            self.controller.start()
        else:
            self.controller.stop()

    def _open_ask(self) -> None:
        if self._ask is None or self._ask.window.closed:
            self._ask = AskWindow(self.controller.ask, self.controller.cancel)
        state = self.controller.state
        self._ask.show(state, wording.headline(state))
        self._ask.open()

    def _open_statistics(self) -> None:
        if self._statistics is None or self._statistics.window.closed:
            self._statistics = StatisticsWindow()
        self._statistics.show(wording.statistics(self.controller.state))
        self._statistics.open()

    def _open_hub(self) -> None:
        if self._hub is None or self._hub.window.closed:
            self._hub = HubWindow(self.controller.downloads, self._start_with)
        self._hub.show(self.controller.downloads.state)
        self._hub.open()

    def _start_with(self, model: str) -> None:
        self.controller.choose_model(model)
        self.controller.start()

    async def _choose_folder(self, _command: object, **_: Any) -> None:
        if folder := await self._app.dialog(toga.SelectFolderDialog("The folder of a store or a checkpoint")):
            self.controller.choose_model(str(folder))

    async def _offer_restart(self, state: State) -> None:
        said = "\n".join(line for line in state.last_lines[-6:] if state.trouble not in line)
        text = "\n\n".join(part for part in (state.trouble, said, "Start it again?") if part)
        if await self._app.dialog(toga.QuestionDialog("The engine ended", text)):
            self.controller.start()


def _without_command(action: Callable[[Any], None], value: Any, _command: object, **_: Any) -> None:
    action(value)


class MenubarApp(toga.App):
    def startup(self) -> None:
        self.main_window = toga.App.BACKGROUND
        self.folder = tempfile.TemporaryDirectory(prefix="mlx_flash-")
        self.menubar = Menubar(self, Path(self.folder.name))

    async def on_running(self) -> None:
        await self.menubar.run()

    async def on_exit(self) -> bool:
        self.menubar.closing = True
        # Not run_in_executor: Qt's loop uses Qt threads for it, and the process aborts if they are still there at exit.
        with ThreadPoolExecutor(1) as thread:
            await asyncio.wrap_future(thread.submit(self.menubar.controller.close))
        self.folder.cleanup()
        return True


def make_app() -> toga.App:
    return MenubarApp("mlx_flash", "io.github.mlx-flash.menubar", version=mlx_flash.__version__)
