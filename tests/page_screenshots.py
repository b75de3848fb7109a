"""Takes pictures of the server's page for people to look at: python tests/page_screenshots.py FOLDER

page.png is the README's picture (docs/page.png). The others show the dark theme, a window of 400 pixels, an empty
conversation, the open settings, attached files, a question that is edited, the list of chats, the choice of a model
with a refusal and the progress of loading, and the page without a server. Those called answer show a long answer with
code, a table and formulas, thoughts, and tool calls; their texts are written in scripted_page.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from page_browser import Server, chromium, running, smallest_budget  # type: ignore[import-not-found]  # found beside this file
from scripted_page import LONG_ANSWER, call, scripted_page, text, thought  # type: ignore[import-not-found]
from switching import Switching, library  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SIZE = (1280, 800)
NARROW = (400, 800)
BEGINNING = "It was a dark night, and"
NEXT = "The old man opened the door, and"


def open_page(browser: Browser, server: Any, size: tuple[int, int], scheme: str = "light") -> Page:
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


def shoot_chats(page: Page, server: Server, folder: Path, name: str) -> None:
    """Takes pictures of what concerns several chats and models. The page has just answered a question."""
    narrow = page.viewport_size == {"width": NARROW[0], "height": NARROW[1]}
    page.evaluate("document.getElementById('settings').open = false")
    page.click("#log article:last-child .retry")
    page.wait_for_selector("#log article:last-child .versions")
    page.click("#log .edit")
    shoot(page, folder / f"{name}-edit.png")
    page.keyboard.press("Escape")
    page.click("#new-chat")
    notes: Any = {
        "name": "notes.md",
        "mimeType": "text/markdown",
        "buffer": b"# Bread\n\nRye keeps longer than wheat.\n",
    }
    page.set_input_files("#attach-file", files=[notes])
    page.fill("#prompt", "Which bread keeps for a week without going stale?")
    shoot(page, folder / f"{name}-attached.png")
    page.press("#prompt", "Enter")
    page.wait_for_selector('article.assistant[data-state="done"]')
    page.click("#log .file summary")
    if narrow:
        page.click("#chats-toggle")
    page.evaluate("document.getElementById('chat-menu').open = true")
    shoot(page, folder / f"{name}-chats.png")
    page.locator("#chats-list [data-chat] button", has_text="Delete").first.click()
    shoot(page, folder / f"{name}-delete.png")
    page.keyboard.press("Escape")
    if narrow:
        page.click("#chats-close")

    switch = Switching(page, server.get("/stats"))
    page.click("#library-open")
    page.wait_for_selector("#library-list li")
    shoot(page, folder / f"{name}-models.png")
    switch.refusal = "other/large cannot be loaded: it needs at least 3200MB, and the memory budget is 1000 MB."
    page.fill("#library-memory", "1")
    load = page.get_by_role("button", name="Load other/large")
    load.click()
    page.wait_for_function("() => document.getElementById('library-wrong').textContent")
    shoot(page, folder / f"{name}-refused.png")
    switch.refusal = ""
    load.click()
    page.wait_for_selector("#library-progress:not([hidden])")
    shoot(page, folder / f"{name}-loading.png")
    page.click("#library-close")
    switch.library = library("unloaded")
    page.wait_for_function("() => document.getElementById('state').textContent === 'Asleep'")
    shoot(page, folder / f"{name}-asleep.png")
    page.unroute_all()


def shoot(page: Page, path: Path, **options: Any) -> None:
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
    )  # the page has drawn by then
    page.screenshot(path=path, **options)


def shoot_answers(browser: Browser, folder: Path) -> None:
    """Answers with everything that Markdown has, of a model that thinks and calls tools."""
    with scripted_page() as server:
        for name, size, scheme in (
            ("answer", SIZE, "light"),
            ("answer-dark", SIZE, "dark"),
            ("answer-narrow", NARROW, "light"),
            ("answer-narrow-dark", NARROW, "dark"),
        ):
            page = open_page(browser, server, size, scheme)
            thoughts = thought("The question is about **sorting**.\n\n1. Name three ways.\n2. Compare them.")
            server.script = [*thoughts, *text(LONG_ANSWER, 40)]
            server.hold = 1
            say(page, "How do I sort a list?\nAnd how fast is each way?", 4000)
            page.wait_for_selector(".thinking")
            page.click(".thoughts summary")
            shoot(page, folder / f"{name}-thinking.png")
            server.hold = 20
            page.wait_for_selector(".hl-keyword")
            shoot(page, folder / f"{name}-half.png")
            page.click(".thoughts summary")
            server.hold = None
            page.wait_for_selector('article.assistant[data-state="done"]')
            page.wait_for_selector(".formula math")
            page.evaluate("document.querySelector('#log h4').scrollIntoView()")
            shoot(page, folder / f"{name}.png")
            page.evaluate("document.querySelector('#log .table').scrollIntoView()")
            shoot(page, folder / f"{name}-table.png")
            weather = call(0, "weather", '{"city": "Paris", "days": 3, "units": ["C", "mm"]}')
            server.script = [*text("I look that up."), weather, call(1, "time", '{"city": "Paris"}')]
            say(page, "How is the weather in Paris?", 4000)
            page.wait_for_selector('article.assistant:last-child[data-state="done"]')
            page.wait_for_selector(".call .hl-attr")
            shoot(page, folder / f"{name}-tools.png")
            page.context.close()


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
            shoot_chats(page, server, folder, name)
            page.context.close()
        page = open_page(browser, server, SIZE)
        say(page, BEGINNING, 300)
        page.wait_for_function("() => document.querySelector('#log article:last-child .text').textContent.length > 99")
        server.kill()
        page.wait_for_selector('#banner[data-state="gone"]')
        shoot(page, folder / "gone.png")
    with chromium() as browser:
        shoot_answers(browser, folder)
    log.unlink()


if __name__ == "__main__":
    main()
