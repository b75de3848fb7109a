"""Calls of toga's two backends for what toga lacks: clipboard, widths of columns, texts of lines of an open menu.

This is the only file that depends on the backend. The Cocoa parts were written from the documentation and not run.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def copy_text(text: str) -> None:
    """Puts a text on the clipboard. Raises OSError."""
    if sys.platform == "darwin":
        subprocess.run(["/usr/bin/pbcopy"], input=text.encode(), check=False)
    else:
        from PySide6.QtGui import QGuiApplication

        QGuiApplication.clipboard().setText(text)


def set_text(command: Any, text: str) -> None:
    """Changes the text of a toga.Command's menu lines. toga itself reads the text only when it builds a menu."""
    command.text = text
    for line in command._impl.native:
        if sys.platform == "darwin":
            line.title = text
        else:
            line.setText(text)


def widen_first_column(table: Any) -> None:
    """Gives the first column of a toga.Table the width that the others do not need. On macOS users drag columns."""
    if sys.platform != "darwin":
        from PySide6.QtWidgets import QHeaderView

        header = table._impl.native.horizontalHeader()
        for column in range(header.count()):
            mode = QHeaderView.ResizeMode.ResizeToContents if column else QHeaderView.ResizeMode.Stretch
            header.setSectionResizeMode(column, mode)


def menu_is_open(status_icon: Any) -> bool:
    """Whether the menu is open, so that rebuilding it would change it while it is used."""
    if sys.platform == "darwin":
        from ctypes import c_bool

        from rubicon.objc.runtime import send_message

        # The button in the menu bar is highlighted while its menu is open.
        return bool(send_message(status_icon._impl.native.button, "isHighlighted", restype=c_bool, argtypes=[]))
    menu = status_icon._impl.native.contextMenu()
    return menu is not None and menu.isVisible()
