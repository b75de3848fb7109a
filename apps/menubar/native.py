"""What toga has no call for, by its two backends' own: the clipboard, and another text for a line of an open menu.

The only file that knows which backend runs. The Cocoa halves were written from the documentation and not run.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any


def copy_text(text: str) -> None:
    """Puts text on the clipboard. Raises OSError."""
    if sys.platform == "darwin":
        subprocess.run(["/usr/bin/pbcopy"], input=text.encode(), check=False)
    else:
        from PySide6.QtGui import QGuiApplication

        QGuiApplication.clipboard().setText(text)


def set_text(command: Any, text: str) -> None:
    """Changes what a toga.Command's menu lines say; toga itself reads the text when it builds a menu, only then."""
    command.text = text
    for line in command._impl.native:
        if sys.platform == "darwin":
            line.title = text
        else:
            line.setText(text)


def menu_is_open(status_icon: Any) -> bool:
    """Whether building the menu anew would change it under the user's hand."""
    if sys.platform == "darwin":
        from ctypes import c_bool

        from rubicon.objc.runtime import send_message

        # The button in the menu bar is highlighted for as long as its menu is open.
        return bool(send_message(status_icon._impl.native.button, "isHighlighted", restype=c_bool, argtypes=[]))
    menu = status_icon._impl.native.contextMenu()
    return menu is not None and menu.isVisible()
