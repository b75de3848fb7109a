"""Runs the menu bar app and keeps writing everything that can be seen and clicked into a file.

python tests/menubar_with_eyes.py FILE: writes JSON with `menus` (text -> middle of the line on the screen, and whether
it is enabled), `buttons`, `cells` of tables and `inputs` (likewise), `texts` (labels and text boxes), `clipboard` and
`engine` (the process once its model is loaded). The app is unchanged, except that its answers are short.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

import gated_server  # type: ignore[import-not-found]
from PySide6.QtCore import QPoint, QTimer
from PySide6.QtGui import QGuiApplication
from PySide6.QtWidgets import QApplication, QLabel, QLineEdit, QMenu, QPushButton, QTableView, QTextEdit, QWidget

from mlx_flash.apps.menubar import controller, view
from mlx_flash.apps.menubar.controller import RUNNING, Controller
from mlx_flash.apps.menubar.server_process import server_command


def gated_command(model: str | None, memory: int | None) -> list[str]:
    """The command of an engine that the test can hold."""
    return [*gated_server.COMMAND, *server_command(model, memory)[3:]]


def middle_of(widget: QWidget) -> list[int]:
    point = widget.mapToGlobal(widget.rect().center())
    return [point.x(), point.y()]


def engine_of(app: Any) -> int | None:
    if not hasattr(app, "menubar"):  # the app has not started yet
        return None
    shown = app.menubar.controller
    engine = shown._engine  # read this before the phase, because a new engine has a new phase
    return engine.pid if engine is not None and shown.state.phase == RUNNING else None


def cells_of(table: QTableView) -> dict[str, list[int]]:
    """The texts in a table, with the middle of each."""
    model = table.model()
    found = {}
    for row in range(model.rowCount()):
        for column in range(model.columnCount()):
            index = model.index(row, column)
            place = table.viewport().mapToGlobal(table.visualRect(index).center())
            found[str(index.data())] = [place.x(), place.y()]
    return found


def look() -> dict[str, object]:
    menus: dict[str, list[object]] = {}
    buttons: dict[str, list[object]] = {}
    cells: dict[str, list[int]] = {}
    inputs: list[list[int]] = []
    texts: list[str] = []
    for window in QApplication.topLevelWidgets():
        if not window.isVisible():
            continue
        if isinstance(window, QMenu):
            for action in window.actions():
                place = window.mapToGlobal(window.actionGeometry(action).center() - QPoint(1, 0))
                menus[action.text().rstrip()] = [place.x(), place.y(), action.isEnabled()]
        for widget in window.findChildren(QWidget):
            if not widget.isVisible():
                continue
            if isinstance(widget, QPushButton):
                buttons[widget.text().replace("&", "")] = [*middle_of(widget), widget.isEnabled()]
            elif isinstance(widget, QTableView):
                cells |= cells_of(widget)
            elif isinstance(widget, QLineEdit):
                inputs.append(middle_of(widget))
            elif isinstance(widget, QTextEdit):
                texts.append(widget.toPlainText())
            elif isinstance(widget, QLabel) and widget.text():
                texts.append(widget.text())
    clipboard = QGuiApplication.clipboard().text()
    return {
        "menus": menus,
        "buttons": buttons,
        "cells": cells,
        "inputs": inputs,
        "texts": texts,
        "clipboard": clipboard,
    }


def main() -> None:
    file = Path(sys.argv[1])
    partial = file.with_suffix(".new")

    def write() -> None:
        partial.write_text(json.dumps({**look(), "engine": engine_of(app)}))
        partial.replace(file)

    view.Controller = functools.partial(Controller, command=gated_command)  # type: ignore[misc, assignment]
    controller.MAX_TOKENS = 60
    app = view.make_app()
    timer = QTimer()
    timer.timeout.connect(write)
    timer.start(100)
    app.main_loop()


if __name__ == "__main__":
    main()
