"""The real server with the demo model, and Chromium showing its page, for test_page.py and page_screenshots.py."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gated_server  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, LocatorAssertions, Page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PATIENCE_S = 600  # the first start converts the demo model
WAIT_MS = 600_000  # limit of every wait for a page; no test needs it


def expect(found: Locator) -> LocatorAssertions:
    """Playwright's assertions about elements, each of which waits until it holds."""
    from playwright.sync_api import expect as expect_within

    expect_within.set_options(timeout=WAIT_MS)
    return expect_within(found)


class PageWaits:
    """Waits for what the page shows. `page`: the page.

    A test reads the page at once only where the page has done everything before Playwright's action returns: in the
    handler of a click or a key, without a request, its database, or a dialog that closes. Everywhere else it waits, for
    something that was not there before the action.
    """

    page: Page

    def shows(self, condition: str, argument: Any = None) -> None:
        """Waits for a condition that comes true and stays true."""
        self.page.wait_for_function(condition, arg=argument)

    def reads(self, selector: str, pattern: str) -> None:
        """Waits until an element's text matches, which must then keep matching."""
        self.shows(
            "([selector, pattern]) => new RegExp(pattern).test(document.querySelector(selector)?.textContent)",
            [selector, pattern],
        )

    def reads_all(self, selector: str, *texts: str) -> None:
        """Waits until the elements of a selector have exactly these texts, in turn."""
        found = self.page.locator(selector)
        if texts:
            expect(found).to_have_text(texts)
        else:
            expect(found).to_have_count(0)

    def hears(self, condition: Callable[[], object]) -> None:
        """Waits until the page's events, such as requests and messages of the console, make a condition true."""
        while not condition():
            self.page.wait_for_timeout(10)  # Playwright delivers events during this wait.

    def redraws(self) -> None:
        """Waits until a whole frame has passed, in which the page adapts to changed sizes."""
        self.page.evaluate(
            "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => done())))"
        )


class Server:
    """A server that can be started and killed repeatedly on one port. `hold` stops every generation at a token."""

    def __init__(self, log: Path, *options: str, memory: str = "400MB") -> None:
        self.log, self.options, self.memory = log, options, memory
        self.port = 0
        self._held = log.with_name("held")
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [*gated_server.COMMAND, "--port", str(self.port), "--memory", self.memory, *self.options]
        environment = {**os.environ, gated_server.VARIABLE: str(self._held)}
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment
            )  # fmt: skip
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("Serving"), self.log.read_text()
        self.port = int(line.rsplit(":", 1)[1])

    def wait(self) -> None:
        """Waits until the model is loaded."""
        end = time.monotonic() + PATIENCE_S
        while time.monotonic() < end:
            try:
                self.get("/health")
                return
            except urllib.error.HTTPError as error:
                assert error.code == 503, error.read()
            time.sleep(0.1)
        raise AssertionError(f"not loaded after {PATIENCE_S} s: {self.log.read_text()}")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=30) as answer:
            return json.load(answer)

    def hold(self, token: int | None) -> None:
        """Makes generations stop after so many tokens from now on; None: they do not stop."""
        gated_server.hold(self._held, token)

    def kill(self) -> None:
        """Kills the server at once, like a crash."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            assert self.process.stdout is not None
            self.process.stdout.close()
            self.process = None


def smallest_budget(*options: str) -> int:
    """The smallest budget in MB, at which the server reads during generation."""
    command = [sys.executable, "-m", "mlx_flash.server", "--port", "0", "--memory", "1MB", *options]
    said = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S).stderr
    found = re.search(r"needs at least (\d+)MB", said)
    assert found is not None, said
    return int(found[1])


@contextmanager
def running(log: Path, *options: str, memory: str = "400MB") -> Iterator[Server]:
    server = Server(log, *options, memory=memory)
    try:
        server.start()
        server.wait()
        yield server
    finally:
        server.kill()


@contextmanager
def chromium() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    root = hasattr(os, "geteuid") and os.geteuid() == 0  # Chromium's sandbox does not run as root
    with sync_playwright() as playwright:
        environment: dict[str, str | float | bool] = {**os.environ}
        environment.pop("LD_PRELOAD", None)  # a preloaded BLAS
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox"] if root else [], env=environment
        )
        try:
            yield browser
        finally:
            browser.close()


def keep_moments(page: Page) -> None:
    """Makes what the open page shows for a moment stay there: none of its later timers ends."""
    page.evaluate("() => { window.setTimeout = () => 0; }")


def forget_all(page: Page) -> None:
    """Deletes what the open page keeps in the browser, and makes it keep nothing more. It closes its database then."""
    page.evaluate(
        """() => { Storage.prototype.setItem = () => {}; localStorage.clear(); sessionStorage.clear();
            return new Promise((done, fail) => {
                const request = indexedDB.deleteDatabase('mlx_flash');
                [request.onsuccess, request.onerror] = [done, fail]; }); }"""
    )
