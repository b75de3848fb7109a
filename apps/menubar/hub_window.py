"""The window to find a model on the Hugging Face Hub and to download it."""

from __future__ import annotations

from collections.abc import Callable

import toga
from toga.style.pack import COLUMN, ROW

from . import hub_wording
from .downloads import LOADING, Downloads, HubState
from .native import widen_first_column


class HubWindow:
    """A field to search with, the models that were found, the verdict on one of them, and its download."""

    def __init__(self, downloads: Downloads, on_start: Callable[[str], None]) -> None:
        """on_start: called with the name of a downloaded model that the user wants to run."""
        self._downloads, self._on_start = downloads, on_start
        self._rows: list[tuple[str, str, str]] = []
        self._text = toga.TextInput(placeholder="A part of a name, or owner/name", on_confirm=self._search, flex=1)
        search = toga.Button("Search", on_press=self._search, width=90, margin_left=8)
        self._note = toga.Label("", margin_top=6)
        self._table = toga.Table(
            columns=["Model", "Size", "Downloads"], on_select=self._select, flex=1, margin_top=6, multiple_select=False
        )
        widen_first_column(self._table)
        self._size, self._verdict = toga.Label("", margin_top=8), toga.Label("", margin_top=4)
        self._bar = toga.ProgressBar(max=1.0, value=0, margin_top=8)
        self._progress = toga.Label("", margin_top=4)
        self._main = toga.Button("Download", on_press=self._press, width=110)
        self._discard = toga.Button("Cancel", on_press=lambda _: downloads.discard(), width=110, margin_left=8)
        self._start = toga.Button("Start it", on_press=self._press_start, width=110, margin_left=8)
        buttons = toga.Box(children=[self._main, self._discard, self._start], direction=ROW, margin_top=8)
        line = toga.Box(children=[self._text, search], direction=ROW)
        parts = [line, self._note, self._table, self._size, self._verdict, self._bar, self._progress, buttons]
        box = toga.Box(children=parts, direction=COLUMN, margin=12)
        self.window = toga.Window(title="Download a model", size=(680, 520), content=box)

    def show(self, state: HubState) -> None:
        rows = [hub_wording.row(found, state) for found in state.found]
        if rows != self._rows:  # A new list takes the selection away.
            self._rows = self._table.data = rows
        size, verdict = hub_wording.verdict_lines(state)
        for label, text in (
            (self._note, hub_wording.search_note(state)),
            (self._size, size),
            (self._verdict, hub_wording.wrapped(verdict)),
            (self._progress, hub_wording.wrapped(hub_wording.download_line(state.download))),
            (self._main, hub_wording.download_button(state)),
        ):
            if label.text != text:
                label.text = text
        self._bar.value = hub_wording.share_done(state.download)
        pausing = hub_wording.download_button(state) == "Pause"
        for button, enabled in (
            (self._main, pausing or hub_wording.can_download(state)),
            (self._discard, hub_wording.can_discard(state)),
            (self._start, hub_wording.is_here(state)),
        ):
            if button.enabled != enabled:
                button.enabled = enabled

    def open(self) -> None:
        self.window.show()
        self._text.focus()

    def _search(self, _widget: object, **_: object) -> None:
        self._downloads.search(self._text.value)

    def _select(self, table: toga.Table, **_: object) -> None:
        if (row := table.selection) is not None:
            self._downloads.look_at(row.model)

    def _press(self, _widget: object, **_: object) -> None:
        state = self._downloads.state
        if state.download.phase == LOADING and state.download.name == state.chosen:
            self._downloads.pause()
        else:
            self._downloads.download()

    def _press_start(self, _widget: object, **_: object) -> None:
        self._on_start(self._downloads.state.chosen)
