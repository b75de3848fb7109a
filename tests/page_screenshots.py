"""Takes pictures of the server's page for people to look at: python tests/page_screenshots.py FOLDER

page.png is the README's picture (docs/page.png). The others show the dark theme, a window of 400 pixels, an empty
conversation, the open settings, and the page without a server.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from page_browser import Server, chromium, running, smallest_budget  # type: ignore[import-not-found]  # found beside this file

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SIZE = (1280, 800)
NARROW = (400, 800)
BEGINNING = "It was a dark night, and"
NEXT = "The old man opened the door, and"


def open_page(browser: Browser, server: Server, size: tuple[int, int], scheme: str = "light") -> Page:
    width, height = size
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)  # type: ignore[arg-type]
    page = context.new_page()
    page.goto(server.url)
    page.wait_for_function("() => document.getElementById('model').textContent !== '–'")
    return page


def say(page: Page, text: str, most: int) -> None:
    page.evaluate("document.getElementById('settings').open = true")
    page.fill("input[name=max_tokens]", str(most))
    page.fill("input[name=seed]", "12")
    page.evaluate("document.getElementById('settings').open = false")
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def speak(page: Page) -> None:
    """Asks for one complete answer and starts another."""
    say(page, BEGINNING, 70)
    page.wait_for_selector('article.assistant[data-state="done"]')
    say(page, NEXT, 300)
    page.wait_for_function("() => document.querySelector('#log article:last-child .text').textContent.length > 240")


def shoot(page: Page, path: Path, **options: Any) -> None:
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )  # the page has drawn by then
    page.screenshot(path=path, **options)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "server.log"
    with running(log, memory=f"{smallest_budget() + 3}MB") as server, chromium() as browser:
        for name, size, scheme in (("page", SIZE, "light"), ("dark", SIZE, "dark"), ("narrow", NARROW, "light")):
            page = open_page(browser, server, size, scheme)
            shoot(page, folder / f"{name}-empty.png")
            speak(page)
            shoot(page, folder / f"{name}.png")
            if size == NARROW:
                shoot(page, folder / f"{name}-whole.png", full_page=True)
            page.keyboard.press("Escape")
            page.wait_for_selector('article.assistant[data-state="stopped"]')
            page.evaluate("document.getElementById('settings').open = true")
            shoot(page, folder / f"{name}-settings.png")
            page.context.close()
        page = open_page(browser, server, SIZE)
        say(page, BEGINNING, 300)
        page.wait_for_function("() => document.querySelector('#log article:last-child .text').textContent.length > 99")
        server.kill()
        page.wait_for_selector('#banner[data-state="gone"]')
        shoot(page, folder / "gone.png")
    log.unlink()


if __name__ == "__main__":
    main()
