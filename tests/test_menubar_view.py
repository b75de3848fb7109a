"""The menu bar app on a screen with toga's Qt backend: a virtual X server, a tray, a mouse and a keyboard.

The app reports the positions of its items (menubar_with_eyes.py); the clicks come from outside, through X.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import gated_server  # type: ignore[import-not-found]
import psutil
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from hub_server import Hub, serve  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]
from processes import runs  # type: ignore[import-not-found]  # beside this file

from mlx_flash.apps.menubar.settings import settings_file

SETTLED_S = 0.5  # for which a line of a menu must stay where it is
SECONDS = 300.0  # limit of waits of a few seconds on an idle machine, which include the conversion of the demo model
PROGRAMS = ("Xvfb", "trayer", "xdotool", "scrot")
MODULES = ("toga", "toga_qt", "PySide6", "PIL")
LACKING = [name for name in PROGRAMS if shutil.which(name) is None] + [name for name in MODULES if not find_spec(name)]

pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"not here: {', '.join(LACKING)}")

GREEN, RED = (0x1A, 0x7F, 0x37), (0xCF, 0x22, 0x2E)  # colours of the tile while the engine runs, and after it died


class Screen:
    """A screen with a tray and the app on it."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder = folder
        self.seen = folder / "seen.json"
        self.processes: list[subprocess.Popen[Any]] = []
        read, write = os.pipe()
        self._run(
            ["Xvfb", "-displayfd", str(write), "-screen", "0", "1000x640x24", "-nolisten", "tcp"], pass_fds=[write]
        )
        os.close(write)
        with os.fdopen(read) as display:
            self.environment = {
                **hub.environment(folder / "hub"),
                **{name: os.environ[name] for name in ("MLX_FLASH_CACHE",) if name in os.environ},
                "DISPLAY": f":{display.readline().strip()}",
                "QT_QPA_PLATFORM": "xcb",
                "XDG_CONFIG_HOME": str(folder / "config"),
                gated_server.VARIABLE: str(folder / "held"),
            }
        for name in ("WAYLAND_DISPLAY", "QT_SCALE_FACTOR"):
            self.environment.pop(name, None)
        options = (
            "--edge top --align right --widthtype request --height 28 --tint 0xd8d8d8 --alpha 0 --transparent true"
        )
        self._run(["trayer", *options.split()])
        until(lambda: self._panel() is not None)
        eyes = [sys.executable, str(Path(__file__).with_name("menubar_with_eyes.py")), str(self.seen)]
        self.log = (folder / "app.log").open("w")
        self.app = self._run(eyes, stdout=self.log, stderr=self.log)

    def _run(self, command: list[str], **options: Any) -> subprocess.Popen[Any]:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = getattr(self, "environment", None)
        self.processes.append(subprocess.Popen(command, **{**quiet, "env": environment, **options}))
        return self.processes[-1]

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            process.wait(SECONDS)
        self.log.close()

    def do(self, *arguments: object) -> str:
        command = ["xdotool", *map(str, arguments)]
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=False).stdout

    def look(self) -> dict[str, Any]:
        assert self.app.poll() is None, (self.folder / "app.log").read_text()
        try:
            seen: dict[str, Any] = json.loads(self.seen.read_text())
            return seen
        except FileNotFoundError:
            return {"menus": {}, "buttons": {}, "cells": {}, "inputs": [], "texts": [], "clipboard": "", "engine": None}

    def wait(self, condition: Callable[[dict[str, Any]], Any]) -> Any:
        return until(lambda: condition(self.look()), self.look)

    def _panel(self) -> tuple[int, int, int, int] | None:
        """x, y, width and height of the tray."""
        for window in self.do("search", "--onlyvisible", "--class", "trayer").split():
            lines = self.do("getwindowgeometry", "--shell", window).splitlines()
            found = dict(line.split("=") for line in lines if "=" in line)
            if int(found.get("HEIGHT", 0)) >= 20:
                return int(found["X"]), int(found["Y"]), int(found["WIDTH"]), int(found["HEIGHT"])
        return None

    def screenshot(self, name: str, *area: int) -> Any:
        """A picture of the whole screen, or of x, y, width, height. Also saves it as a file for people."""
        from PIL import Image

        file = self.folder / f"{name}.png"
        options = ["--autoselect", ",".join(map(str, area))] if area else []
        subprocess.run(["scrot", "--overwrite", *options, str(file)], env=self.environment, check=True)
        with Image.open(file) as image:
            return image.convert("RGB")

    def icon(self) -> Any:
        """The picture in the tray without its lowest rows, because Qt opens the menu there, at the mouse."""
        x, y, width, height = self._panel() or (0, 0, 1, 7)
        return self.screenshot("icon", x, y, width, height - 6)

    def shows(self, colour: tuple[int, int, int]) -> bool:
        return sum(pixel == colour for pixel in self.icon().getdata()) > 50

    def hold(self, tokens: int | None) -> None:
        gated_server.hold(self.folder / "held", tokens)

    def open_menu(self) -> dict[str, Any]:
        x, y, width, height = self._panel() or (0, 0, 0, 0)
        self.do("mousemove", x + width // 2, y + height - 2, "click", 1)  # Qt's menu opens at the mouse
        menus: dict[str, Any] = self.wait(lambda seen: seen["menus"])
        return menus

    def close_menu(self) -> None:
        for _ in range(3):
            self.do("key", "Escape")
        self.wait(lambda seen: not seen["menus"])

    def _line(self, text: str) -> tuple[int, int, bool]:
        """Where a line of the open menu is, and whether it can be clicked, once that stays the same: a menu whose lines
        have just changed is laid out anew, and a click would miss it."""

        def settled() -> tuple[int, int, bool] | None:
            before = self.look()["menus"].get(text)
            time.sleep(SETTLED_S)
            return before if before == self.look()["menus"].get(text) else None

        found: tuple[int, int, bool] = until(settled, self.look)
        return found

    def click(self, text: str) -> None:
        """Clicks a line of the open menu."""
        x, y, enabled = self._line(text)
        assert enabled, f"{text} cannot be clicked"
        self.do("mousemove", x, y)
        self.do("click", 1)

    def point_at(self, text: str) -> None:
        """Points at a line of the open menu that opens another menu."""
        x, y, _ = self._line(text)
        self.do("mousemove", x - 3, y)
        self.do("mousemove", x, y)

    def open_budgets(self) -> str:
        """Opens the menu of budgets once the plan is known. Returns the line of the smallest budget."""

        def look() -> str | None:
            self.open_menu()
            self.point_at("Memory")
            seen = self.wait(lambda seen: seen if any("Automatic" in text for text in seen["menus"]) else None)
            planned = [text for text in seen["menus"] if "the smallest" in text or "in memory" in text]
            if not planned:
                self.close_menu()
            return min(planned, default=None)

        found: str = until(look, self.look)
        return found

    def press(self, text: str) -> None:
        """Presses a button once it is enabled."""
        x, y, _ = self.wait(lambda seen: (found := seen["buttons"].get(text)) and found[2] and found)
        self.do("mousemove", x, y, "click", 1)

    def running(self, before: psutil.Process | None = None) -> psutil.Process:
        """The engine, once it differs from `before`, its model is loaded and the item shows it."""
        old = before and before.pid
        pid = self.wait(lambda seen: seen["engine"] if seen["engine"] != old else None)
        until(lambda: self.shows(GREEN))
        (engine,) = self.engines()
        assert engine.pid == pid
        return engine

    def engines(self) -> list[psutil.Process]:
        return [child for child in psutil.Process(self.app.pid).children() if runs(child, gated_server.__file__)]


def until(value: Callable[[], Any], otherwise: Callable[[], object] = lambda: "") -> Any:
    deadline = time.monotonic() + SECONDS
    while not (found := value()):
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.3)
    return found


def post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=SECONDS) as response:
        return json.load(response)


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with one model that runs and one that does not."""
    folder = make_mixture(tmp_path / "mixture", "qwen3_moe")
    write_tokenizer(folder)
    with serve() as hub:
        hub.add("owner/tiny-mixture", folder)
        hub.add("owner/tiny-vision", folder, **{"config.json": b'{"model_type": "nobody"}'})
        hub.downloads["owner/tiny-mixture"] = 1234
        yield hub


@pytest.fixture
def screen(tmp_path: Path, hub: Hub) -> Iterator[Screen]:
    screen = Screen(tmp_path, hub)
    try:
        yield screen
    finally:
        screen.close()


def test_the_toolkit_does_not_wear_out_none() -> None:
    """PySide6 6.12.0 drops references to None, and Python 3.11 ends when none is left (pyproject.toml)."""
    program = (
        "import sys\n"
        "from PySide6.QtCore import QObject\n"
        "object, before = QObject(), sys.getrefcount(None)\n"
        "for _ in range(1000):\n"
        "    object.setObjectName('x')\n"
        "print(sys.getrefcount(None) - before > -500)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=SECONDS)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_a_session_from_the_first_look_to_the_end(screen: Screen) -> None:
    """The item, its menu, a question, another budget, a crash, a stop, a start and the end.

    One app serves all of them, because each app and each engine takes seconds to start.
    """
    first = screen.running()
    idle = screen.icon()
    menu = screen.open_menu()
    for line in ("Ready", "Stop the engine", "Model", "Memory", "Ask…", "Open the page", "Statistics…", "Quit"):
        assert menu[line][2], f"{line} cannot be clicked"
    screen.screenshot("menu")
    screen.point_at("Model")
    screen.wait(lambda seen: "✓ Demo model" in seen["menus"])
    screen.screenshot("model")
    screen.close_menu()
    assert screen.open_budgets()
    screen.screenshot("memory")
    screen.close_menu()

    screen.open_menu()
    screen.click("Copy the endpoint")
    endpoint = screen.wait(lambda seen: seen["clipboard"])
    with urllib.request.urlopen(f"{endpoint}/models", timeout=SECONDS) as response:
        assert json.load(response)["data"]

    # While the menu is open, another client's request shows in its first line and in the icon.
    screen.open_menu()
    screen.hold(20)
    body = {"model": "default", "messages": [{"role": "user", "content": "It was"}], "max_tokens": 40}
    with ThreadPoolExecutor(1) as client:
        answer = client.submit(post, f"{endpoint}/chat/completions", body)
        screen.wait(lambda seen: [text for text in seen["menus"] if "tokens per second · " in text])
        assert screen.look()["menus"]["Stop the engine"]
        until(lambda: (icon := screen.icon()) != idle and icon)
        screen.screenshot("speaking")
        screen.hold(None)
        assert answer.result()["usage"]["completion_tokens"] > 0
    screen.wait(lambda seen: [text for text in seen["menus"] if text.startswith("Ready · last answer")])
    until(lambda: screen.icon() == idle)
    screen.close_menu()

    screen.open_menu()
    screen.click("Ask…")
    x, y = screen.wait(lambda seen: seen["inputs"])[0]
    screen.do("mousemove", x, y, "click", 1)
    screen.do("type", "It was a dark night, and")
    screen.hold(10)
    screen.do("key", "Return")
    screen.wait(lambda seen: "Stop" in seen["buttons"])
    screen.screenshot("asking")
    screen.hold(None)
    screen.wait(lambda seen: "Ask" in seen["buttons"] and any(len(text) > 100 for text in seen["texts"]))
    screen.screenshot("asked")

    screen.open_menu()
    screen.click("Statistics…")
    screen.wait(lambda seen: "Read from the SSD" in seen["texts"])
    screen.screenshot("statistics")

    # A model is found on the Hub, looked at and downloaded.
    screen.open_menu()
    screen.point_at("Model")
    screen.wait(lambda seen: "Download a model…" in (text.strip() for text in seen["menus"]))
    screen.click("    Download a model…")
    x, y = screen.wait(lambda seen: "Search" in seen["buttons"] and seen["inputs"])[-1]
    screen.do("mousemove", x, y, "click", 1)
    screen.do("type", "tiny")
    screen.do("key", "Return")
    x, y = screen.wait(lambda seen: seen["cells"].get("owner/tiny-mixture"))
    assert screen.look()["cells"].keys() >= {"1.23k"} and "owner/tiny-vision" not in screen.look()["cells"]
    screen.do("mousemove", x, y, "click", 1)
    screen.wait(lambda seen: [text for text in seen["texts"] if "smallest budget" in text])
    screen.screenshot("verdict")
    screen.press("Download")
    screen.wait(lambda seen: "owner/tiny-mixture is downloaded." in seen["texts"])
    screen.screenshot("downloaded")
    screen.open_menu()
    screen.point_at("Model")
    screen.wait(lambda seen: "owner/tiny-mixture" in (text.strip() for text in seen["menus"]))
    screen.close_menu()

    # The engine loads its model again with another budget and unloads it. After a crash it is started with that budget.
    screen.click(screen.open_budgets())
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", screen.environment["XDG_CONFIG_HOME"])
        chosen = settings_file()
    until(lambda: json.loads(chosen.read_text())["memory"].keys() == {""})
    screen.wait(lambda seen: not seen["menus"])
    screen.open_menu()
    screen.wait(lambda seen: seen["menus"]["Unload the model"][2])
    screen.click("Unload the model")
    screen.wait(lambda seen: "Asleep: the next question loads the model" in seen["texts"])
    screen.screenshot("asleep")
    first.kill()
    screen.wait(lambda seen: any("SIGKILL" in text and "Start it again?" in text for text in seen["texts"]))
    assert until(lambda: screen.shows(RED))
    screen.screenshot("crash")
    screen.press("Yes")
    third = screen.running(first)
    assert "--memory" in third.cmdline()

    screen.open_menu()
    screen.click("Stop the engine")
    until(lambda: not third.is_running())
    until(lambda: not screen.shows(GREEN))
    screen.open_menu()
    menu = screen.wait(lambda seen: "Start the engine" in seen["menus"] and seen["menus"])
    assert menu["Start the engine"][2] and not menu["Open the page"][2]
    screen.click("Start the engine")
    fourth = screen.running(third)

    screen.open_menu()
    screen.click("Quit")
    assert screen.app.wait(SECONDS) == 0
    assert not fourth.is_running()
    log = (screen.folder / "app.log").read_text()
    assert "Traceback" not in log, log
