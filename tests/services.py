"""Definitions of services for tests, and a home folder for them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mlx_flash.defaults import KEY_VARIABLE
from mlx_flash.service import definition as definitions
from mlx_flash.service.definition import Definition, ServiceFiles

HOSTILE = [
    "a b", '"', "'", "%h", "%%", "$HOME", "${HOME}", "$$", "\\n", "\\", "two\nlines", "\ttab", ";", "# x", "ü", "",
]  # fmt: skip
PLACES = ServiceFiles(Path("/home/me/state/server.log"), Path("/home/me/config/key"))


def fresh_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Gives this user another home folder, without a key or folders from the outside."""
    for name in (KEY_VARIABLE, "XDG_CONFIG_HOME", "XDG_STATE_HOME", *definitions.PASSED_ON):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def defined(*flags: str, python: str = sys.executable, where: ServiceFiles = PLACES, **changes: Any) -> Definition:
    return Definition(python, flags, {"HF_HOME": '/a %h "b" $c', "PYTHONSAFEPATH": "1"}, where, **changes)
