"""The app's two small windows. Each shows the data it is given and reports the user's actions."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import toga
from toga.style.pack import COLUMN, ROW

from .controller import State


class AskWindow:
    """A field for a question, and the answer as it arrives."""

    def __init__(self, on_ask: Callable[[str], None], on_cancel: Callable[[], None]) -> None:
        self._on_ask, self._on_cancel = on_ask, on_cancel
        self._shown = ""
        self._answering = False
        self._question = toga.TextInput(placeholder="Ask the model", on_confirm=self._pressed, flex=1)
        self._button = toga.Button("Ask", on_press=self._pressed, width=90, margin_left=8)
        self._answer = toga.MultilineTextInput(readonly=True, flex=1, margin_top=8)
        self._note = toga.Label("", margin_top=8)
        line = toga.Box(children=[self._question, self._button], direction=ROW)
        box = toga.Box(children=[line, self._answer, self._note], direction=COLUMN, margin=12)
        self.window = toga.Window(title="Ask", size=(520, 320), content=box, on_close=self._closed)

    def show(self, state: State, headline: str) -> None:
        self._answering = state.answering
        button = "Stop" if state.answering else "Ask"
        if self._button.text != button:
            self._button.text = button
        if self._shown != state.answer:
            self._shown = self._answer.value = state.answer
            self._answer.scroll_to_bottom()
        note = state.answer_trouble or headline
        if self._note.text != note:
            self._note.text = note

    def open(self) -> None:
        self.window.show()
        self._question.focus()

    def _pressed(self, _widget: object, **_: object) -> None:
        if self._answering:
            self._on_cancel()
        else:
            self._on_ask(self._question.value)

    def _closed(self, _window: object, **_: object) -> bool:
        self._on_cancel()
        return True


class StatisticsWindow:
    """Shows names and values, and refreshes them while it is open."""

    ROWS = 20

    def __init__(self) -> None:
        self._labels = [(toga.Label("", width=310), toga.Label("", flex=1)) for _ in range(self.ROWS)]
        rows = [toga.Box(children=[*pair], direction=ROW, margin_bottom=4) for pair in self._labels]
        box = toga.Box(children=rows, direction=COLUMN, margin=12)
        self.window = toga.Window(title="Statistics", size=(680, 480), content=box)

    def show(self, rows: Sequence[tuple[str, str]]) -> None:
        empty = [("", "")] * (self.ROWS - len(rows))
        for labels, texts in zip(self._labels, [*rows, *empty], strict=True):
            for label, text in zip(labels, texts, strict=True):
                if label.text != text:
                    label.text = text

    def open(self) -> None:
        self.window.show()
