"""Several chats on the server's page: kept, searched, exported, branched, continued; settings, files, models."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from page_browser import (  # type: ignore[import-not-found]  # found beside this file
    CHROMIUM,
    WAIT_MS,
    PageWaits,
    chromium,
    expect,
    forget_all,
    keep_moments,
)
from scripted import Scripted, scripted, server  # type: ignore[import-not-found]  # noqa: F401
from serving import Server  # type: ignore[import-not-found]
from switching import Switching, library  # type: ignore[import-not-found]

from mlx_flash.cli.saved_chat import read_chat, write_chat
from mlx_flash.text.conversation import Turn

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page, Request, Route

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="no playwright: pip install playwright"),
]

READY = '#state[data-state="ready"]'
LAST = "#log article:last-child"
# Hands files to the page as a drop does. argument: [[name, text], ...].
DROP = """(files) => {
  const data = new DataTransfer();
  for (const [name, text] of files) data.items.add(new File([text], name));
  document.getElementById("prompt").dispatchEvent(new DragEvent("drop", {dataTransfer: data, bubbles: true,
    cancelable: true}));
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


def body_of(request: Request) -> Any:
    return request.post_data_json


class Chat(PageWaits):
    """The page, for tests that read like what a user does."""

    def __init__(self, page: Page, server: Server) -> None:  # noqa: F811
        self.page, self.server = page, server
        self.complaints: list[str] = []
        page.set_default_timeout(WAIT_MS)
        page.on("console", lambda said: self.complaints.append(said.text) if said.type != "log" else None)
        page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def open(self) -> Page:
        self.page.goto(self.server.url)
        self.page.wait_for_selector(READY)
        self.shows("() => document.getElementById('model').textContent !== '–'")
        return self.page

    def reload(self) -> None:
        self.page.reload()
        self.page.wait_for_selector(READY)
        self.shows("() => document.getElementById('model').textContent !== '–'")

    def say(self, text: str, state: str = "done") -> Any:
        """Asks, waits for the answer, and returns the body of the request."""
        self.page.fill("#prompt", text)
        return self.asked(lambda: self.page.press("#prompt", "Enter"), state)

    def asked(self, act: Callable[[], Any], state: str = "done") -> Any:
        with self.page.expect_request("**/v1/chat/completions") as sent:
            act()
        self.page.wait_for_selector(f'{LAST}.assistant[data-state="{state}"]')
        return body_of(sent.value)

    def lists(self, *titles: str) -> None:
        """Waits until the list has these chats."""
        self.reads_all(".chat-title", *titles)

    def tells(self, *texts: str) -> None:
        """Waits until the shown branch says this, question and answer in turn."""
        self.reads_all("#log article > .text", *texts)

    def set(self, **values: str) -> None:
        self.page.evaluate("document.getElementById('settings').open = true")
        for name, value in values.items():
            field = self.page.locator(f"#settings [name={name}]")
            if name in ("thinking", "form"):
                field.select_option(value)
            else:
                field.fill(value)

    def row(self, title: str, button: str) -> None:
        """Clicks a button of a chat in the list."""
        self.page.locator("#chats-list [data-chat]", has_text=title).hover()
        self.page.get_by_role("button", name=f"{button} {title}").click()

    def delete(self, title: str, decision: str = "delete") -> None:
        """Deletes a chat, or with the decision "" cancels that. Waits until the page has been told."""
        self.row(title, "Delete")
        self.page.evaluate(
            """() => { window.decided = new Promise(done =>
                document.getElementById('delete-dialog').addEventListener('close', () => done(), {once: true})); }"""
        )
        self.page.click(f"#delete-dialog button[value='{decision}']")
        self.page.evaluate("() => window.decided")


@pytest.fixture(scope="module")
def common(browser: Browser, server: Server) -> Chat:  # noqa: F811
    """A window costs Chromium half a second of processor time, so most tests share this one in turn."""
    return Chat(browser.new_context().new_page(), server)


@pytest.fixture
def chat(common: Chat, scripted: Scripted) -> Iterator[Chat]:  # noqa: F811
    scripted.script = lambda prompt: "Good day."
    common.open()
    yield common
    common.page.unroute_all()
    forget_all(common.page)
    common.page.goto("about:blank")
    common.page.set_viewport_size({"width": 1280, "height": 720})
    complaints, common.complaints = common.complaints, []
    assert complaints == []


def expect_refusals(chat: Chat) -> None:
    """Checks that requests failed, which Chromium reports, and that there was no other error."""
    chat.hears(lambda: chat.complaints)
    assert all(text.startswith("Failed to load resource") for text in chat.complaints), chat.complaints
    chat.complaints.clear()


def test_chats_are_kept_found_renamed_and_deleted(chat: Chat) -> None:
    page = chat.page
    chat.say("Bread with rye")
    page.click("#new-chat")
    chat.say("Soup of beans")
    chat.lists("Soup of beans", "Bread with rye")
    chat.reload()
    chat.lists("Soup of beans", "Bread with rye")
    chat.tells("Soup of beans", "Good day.")
    page.get_by_role("button", name="Bread with rye").first.click()
    chat.tells("Bread with rye", "Good day.")

    for words, found in (("BEANS", ["Soup of beans"]), ("good day", ["Soup of beans", "Bread with rye"]), ("ice", [])):
        page.fill("#chats-search", words)
        chat.lists(*found)
    assert page.inner_text("#chats-none") == "No chat has these words."
    page.fill("#chats-search", "")
    chat.lists("Soup of beans", "Bread with rye")

    chat.row("Bread with rye", "Rename")
    page.keyboard.type("Baking")
    page.keyboard.press("Enter")
    chat.lists("Soup of beans", "Baking")
    chat.delete("Baking", decision="")
    chat.lists("Soup of beans", "Baking")
    keep_moments(page)
    chat.delete("Baking")
    chat.lists("Soup of beans")
    chat.tells()
    page.click("#chats-undo")
    chat.tells("Bread with rye", "Good day.")
    chat.reload()
    chat.lists("Soup of beans", "Baking")
    chat.tells("Bread with rye", "Good day.")


def test_a_file_of_chats_comes_back_as_it_was(chat: Chat, tmp_path: Path) -> None:
    page = chat.page
    page.evaluate(DROP, [["notes.md", "# A\n"]])
    page.wait_for_selector("#files li")
    chat.set(system="Be kind.")
    chat.say("Read this")
    chat.asked(lambda: page.click(f"{LAST} .retry"))
    page.click("#new-chat")
    chat.say("Another")

    def export(name: str) -> Path:
        page.evaluate("document.getElementById('chat-menu').open = true")
        with page.expect_download() as got:
            page.click("#chats-export")
        got.value.save_as(tmp_path / name)
        return tmp_path / name

    first = export("first.json")
    chat.delete("Another")
    chat.lists("Read this")
    chat.delete("Read this")
    chat.lists()
    page.set_input_files("#chats-file", first)
    chat.reads("#chats-note", r"^2 chats are imported\.$")
    assert json.loads(export("second.json").read_text()) == json.loads(first.read_text())
    page.set_input_files("#chats-file", first)
    chat.reads("#chats-note", r"^0 chats are imported; 2 of the file were here already\.$")
    page.get_by_role("button", name="Read this").first.click()
    chat.reads(f"{LAST} .versions", "2/2")
    assert page.input_value("#system") == "Be kind."

    data = json.loads(first.read_text())
    data["chats"][0]["messages"][1]["images"] = ["/stats"]
    for name, text, why in (
        ("a.json", "{", "a.json: it is not JSON"),
        ("b.json", '{"chats": []}', "b.json: it holds no chats that this page has exported."),
        ("c.json", json.dumps(data), "c.json: chat 1 message 2 has an image that is none."),
    ):
        (tmp_path / name).write_text(text)
        page.set_input_files("#chats-file", tmp_path / name)
        chat.reads("#chats-note", f"^{re.escape(why)}")
    with page.expect_download() as got:
        page.evaluate("document.getElementById('chat-menu').open = true")
        page.click("#export-markdown")
    assert got.value.suggested_filename == "Read this.md"
    told = got.value.path().read_text()
    assert told.startswith(
        "# Read this\n\n## System\n\nBe kind.\n\n## You\n\nnotes.md:\n```md\n# A\n```\n\nRead this\n"
    )


def test_a_chat_of_the_terminal_can_be_imported(chat: Chat, tmp_path: Path) -> None:
    turns = [Turn(f"Question {i}", f"Answer {i}", [], (), "Hm." if i else "") for i in range(9)]
    write_chat(tmp_path / "saved.json", "Be kind.", turns, "a-model")
    chat.page.set_input_files("#chats-file", tmp_path / "saved.json")
    chat.reads("#chats-note", r"^1 chat is imported\.$")
    chat.page.get_by_role("button", name="Question 0").first.click()
    chat.tells(*(text for i in range(9) for text in (f"Question {i}", f"Answer {i}")))
    with chat.page.expect_download() as got:
        chat.page.evaluate("document.getElementById('chat-menu').open = true")
        chat.page.click("#export-json")
    saved = read_chat(got.value.path())
    assert (saved.system, saved.turns) == ("Be kind.", turns)


def test_a_changed_question_and_a_second_answer_are_branches(chat: Chat, scripted: Scripted) -> None:  # noqa: F811
    page = chat.page
    chat.say("One")
    chat.say("Two")
    scripted.script = lambda prompt: "Other."
    page.click("#log article:first-child .edit")
    page.keyboard.press("Control+A")
    page.keyboard.type("Three")
    body = chat.asked(lambda: page.keyboard.press("Enter"))
    assert body["messages"] == [{"role": "user", "content": "Three"}]
    chat.tells("Three", "Other.")
    chat.reads("#log article:first-child .versions", "2/2")
    page.click("#log article:first-child .step[aria-label='Earlier version']")
    chat.tells("One", "Good day.", "Two", "Good day.")
    chat.asked(lambda: page.click(f"{LAST} .retry"))
    chat.tells("One", "Good day.", "Two", "Other.")
    chat.reload()
    chat.tells("One", "Good day.", "Two", "Other.")
    page.click(f"{LAST} .step[aria-label='Earlier version']")
    chat.tells("One", "Good day.", "Two", "Good day.")
    page.click("#log article:first-child .edit")
    page.keyboard.press("Escape")
    expect(page.locator(".editor")).to_have_count(0)
    chat.tells("One", "Good day.", "Two", "Good day.")
    chat.lists("One")


def test_an_answer_that_was_cut_goes_on(chat: Chat, scripted: Scripted) -> None:  # noqa: F811
    page = chat.page
    scripted.script = lambda prompt: "llo there." if prompt.endswith("He") else "Hello there."
    chat.set(max_tokens="2", system="Be brief.")
    chat.say("Hi")
    chat.tells("Hi", "He")
    assert (page.text_content(f"{LAST} .note") or "").endswith("cut there")
    chat.set(max_tokens="100")
    body = chat.asked(lambda: page.click(f"{LAST} .continue"))
    system = {"role": "system", "content": "Be brief."}
    assert body["messages"] == [
        system,
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "He"},
    ]
    assert body["continue_final_message"] is True
    chat.tells("Hi", "Hello there.")
    assert page.locator(f"{LAST} .continue").count() == 0
    assert re.match(r"^\d+ more tokens\b", page.text_content(f"{LAST} .note") or "")
    chat.reload()
    chat.tells("Hi", "Hello there.")


def test_thoughts_that_were_cut_go_on(chat: Chat, scripted: Scripted) -> None:  # noqa: F811
    page = chat.page
    rest = " greet.\n</think>\n\nHello."
    scripted.script = lambda prompt: rest if prompt.endswith("They") else "<think>\nThey greet.\n</think>\n\nHello."
    chat.set(max_tokens="7")
    chat.say("Hi")
    chat.tells("Hi", "")
    chat.set(max_tokens="100")
    body = chat.asked(lambda: page.click(f"{LAST} .continue"))
    assert body["messages"][1] == {"role": "assistant", "content": "", "reasoning_content": "They"}
    assert scripted.prompts[-1].endswith("<|im_start|>assistant\n<think>\nThey")
    chat.tells("Hi", "Hello.")
    page.click(f"{LAST} .thoughts summary")
    chat.reads(f"{LAST} .thoughts", "They greet\\.")


def test_every_setting_reaches_the_request(chat: Chat) -> None:
    page = chat.page
    given = {
        **{"temperature": "0.5", "top_p": "0.9", "top_k": "40", "min_p": "0.05", "repetition_penalty": "1.1"},
        **{"presence_penalty": "0.2", "frequency_penalty": "-0.2", "max_tokens": "50", "seed": "7"},
    }
    chat.set(**given, thinking_budget="9", thinking="off", stop_words="one\ntwo")
    body = chat.say("Hi")
    assert {name: body[name] for name in given} == {name: float(value) for name, value in given.items()}
    assert body["stop"] == ["one", "two"] and body["thinking_budget"] == 9
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    chat.reload()
    page.evaluate("document.getElementById('settings').open = true")
    assert page.input_value("[name=min_p]") == "0.05" and page.input_value("[name=stop_words]") == "one\ntwo"
    page.click("#settings-reset")
    body = chat.say("Again")
    assert set(body) == {
        *("model", "messages", "stream", "stream_options", "temperature", "top_p", "max_tokens"),
    }  # what the page sends for a model without recommended settings
    assert page.get_attribute("[name=top_k]", "placeholder") == "auto: off"

    chat.set(form="json")
    assert chat.say("As JSON")["response_format"] == {"type": "json_object"}
    chat.set(form="schema")
    expect(page.locator("[name=schema]")).to_be_in_viewport()
    chat.set(schema='{"type": "object", ')
    page.fill("#prompt", "As a schema")
    page.press("#prompt", "Enter")
    assert (page.text_content("#schema-wrong") or "").startswith("This is not JSON: ")
    expect(page.locator("[name=schema]")).to_be_focused()
    assert page.input_value("#prompt") == "As a schema"  # not sent
    schema = {"type": "object", "not": {}}
    chat.set(schema=json.dumps(schema))
    body = chat.asked(lambda: page.press("#prompt", "Enter"), "error")
    assert body["response_format"]["json_schema"]["schema"] == schema
    assert "not" in (page.text_content(f"{LAST} .note") or "")
    expect_refusals(chat)


def test_a_system_prompt_belongs_to_its_chat(chat: Chat) -> None:
    page = chat.page
    chat.set(system="Be brief.")
    assert chat.say("Hi")["messages"][0] == {"role": "system", "content": "Be brief."}
    page.click("#new-chat")
    assert page.input_value("#system") == ""
    chat.set(system="Be kind.")
    page.click("#system-default")
    page.click("#new-chat")
    assert page.input_value("#system") == "Be kind."
    chat.reload()
    assert page.input_value("#system") == "Be kind."
    page.get_by_role("button", name="Hi").first.click()
    chat.shows("() => document.getElementById('system').value === 'Be brief.'")


def test_text_files_go_into_the_question(chat: Chat, tmp_path: Path) -> None:
    page = chat.page
    (tmp_path / "a.py").write_text("print('```')\n")
    page.set_input_files("#attach-file", tmp_path / "a.py")
    page.wait_for_selector("#files li")  # The page reads files of two actions at the same time.
    page.evaluate(DROP, [["b.txt", "Two"], ["c.txt", "Three"]])
    chat.shows("() => document.querySelectorAll('#files li').length === 3")
    page.get_by_role("button", name="Remove c.txt").click()
    for name, text, why in (
        ("d.bin", "a\0b", "d.bin is neither UTF-8 text nor an image."),
        ("e.txt", "word " * 8000, "e.txt has about 10000 tokens; the context holds 8192. Attach a part of it."),
    ):
        page.evaluate(DROP, [[name, text]])
        chat.reads("#attach-note", re.escape(why))
    body = chat.say("What is this?")
    wanted = "a.py:\n```py\nprint('```')\n```\n\nb.txt:\n```\nTwo\n```\n\nWhat is this?"
    assert body["messages"] == [{"role": "user", "content": wanted}]
    assert page.locator("#files li").count() == 0
    chat.reload()
    page.click(".file summary")
    assert page.inner_text(".file pre").strip() == "print('```')"
    page.click("#new-chat")
    page.evaluate(DROP, [["f.md", "````\n````"]])
    page.wait_for_selector("#files li")
    with page.expect_request("**/v1/chat/completions") as sent:
        page.click("#send")  # a file without a question
    assert body_of(sent.value)["messages"][0]["content"] == "f.md:\n`````md\n````\n````\n`````"
    page.wait_for_selector(f'{LAST}.assistant[data-state="done"]')
    chat.lists("f.md", "What is this?")


def test_two_tabs_add_to_the_same_chats(chat: Chat) -> None:
    chat.say("One")
    other = Chat(chat.page.context.new_page(), chat.server)
    other.open()
    other.lists("One")
    other.tells()
    other.say("Two")
    chat.lists("Two", "One")
    other.page.get_by_role("button", name="One").first.click()
    other.tells("One", "Good day.")
    other.say("Three")
    chat.tells("One", "Good day.", "Three", "Good day.")
    chat.say("Four")
    other.tells("One", "Good day.", "Three", "Good day.", "Four", "Good day.")
    other.delete("One")
    chat.tells()
    chat.lists("Two")
    assert other.complaints == []
    other.page.close()


def test_an_answer_goes_on_while_another_chat_is_open(chat: Chat, scripted: Scripted) -> None:  # noqa: F811
    page = chat.page
    held: list[Route] = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))
    page.fill("#prompt", "Slow")
    with page.expect_request("**/v1/chat/completions"):
        page.press("#prompt", "Enter")
    page.click("#new-chat")
    assert page.is_hidden("#stop")
    chat.tells()
    chat.hears(lambda: held)
    held[0].continue_()
    page.unroute("**/v1/chat/completions")
    chat.say("Fast")
    page.get_by_role("button", name="Slow").first.click()
    chat.tells("Slow", "Good day.")
    page.wait_for_selector(f'{LAST}.assistant[data-state="done"]')


@pytest.mark.parametrize("fault", ["indexedDB.open = () => { throw new Error('off'); }", "put"])
def test_a_browser_that_keeps_nothing_says_so(browser: Browser, server: Server, fault: str) -> None:  # noqa: F811
    page = browser.new_page()
    full = """IDBObjectStore.prototype.put = () => { throw new DOMException('full', 'QuotaExceededError'); }"""
    page.add_init_script(full if fault == "put" else fault)
    chat = Chat(page, server)
    chat.open()
    chat.say("One")
    page.click("#new-chat")
    chat.say("Two")
    page.wait_for_selector("#store-note:not([hidden])")
    assert ("is full" if fault == "put" else "keeps no chats") in page.inner_text("#store-note")
    page.get_by_role("button", name="One").first.click()
    chat.tells("One", "Good day.")
    assert chat.complaints == []
    page.context.close()


def test_the_chat_of_an_earlier_version_becomes_the_first(browser: Browser, server: Server) -> None:  # noqa: F811
    page = browser.new_page()
    old = [{"role": "user", "content": "Old question"}, {"role": "assistant", "content": "Old answer", "state": "done"}]
    store = f"localStorage.setItem('mlx_flash.conversation', {json.dumps(json.dumps(old))})"
    page.add_init_script(f"if (!sessionStorage.seen) {{ {store}; sessionStorage.seen = 1; }}")
    chat = Chat(page, server)
    for _ in range(2):
        chat.open()
        chat.tells("Old question", "Old answer")
        chat.lists("Old question")
    assert page.evaluate("localStorage.getItem('mlx_flash.conversation')") is None
    assert chat.say("More")["messages"][0] == {"role": "user", "content": "Old question"}
    page.context.close()


# Models.


def test_a_model_is_chosen_and_its_loading_shown(chat: Chat) -> None:
    page = chat.page
    switch = Switching(chat.page, chat.server.get("/stats").json())
    chat.reload()
    page.click("#library-open")
    chat.reads("#library-state", r"^demo is loaded with 400 MB\.$")
    assert page.locator("#library-list li").count() == 4
    assert "rwkv7" in page.inner_text("#library-list li:nth-child(3)")
    assert page.locator("#library-list li:nth-child(3) button").count() == 0
    assert "It needs at least 900MB." in page.inner_text("#library-list li:nth-child(4)")
    assert page.get_by_role("button", name="Load other/huge").is_enabled()  # with the budget of the field

    switch.refusal = "other/large needs at least 3.2 GB; the memory budget is 1 GB."
    page.fill("#library-memory", "1")
    page.get_by_role("button", name="Load other/large").click()
    chat.reads("#library-wrong", re.escape(switch.refusal))
    expect_refusals(chat)

    switch.refusal = ""
    page.fill("#library-memory", "")
    page.get_by_role("button", name="Load other/large").click()
    chat.reads("#library-state", r"^Loading other/large: reading weights, 45 %$")
    assert switch.asked == [{"name": "other/large", "memory": "1GB"}, {"name": "other/large"}]
    assert page.evaluate("document.getElementById('library-progress').value") == 0.45
    assert page.is_disabled("#library-list button") and page.text_content("#library-wrong") == ""
    page.click("#library-close")
    chat.reads("#banner-text", "reading weights, 45 %")
    assert page.is_visible("#banner-progress")

    switch.model["model"]["id"] = "other/large"
    switch.library = library("ready")
    chat.reads("#model", "^other/large$")
    expect(page.locator("#banner")).to_be_hidden()


def test_a_model_that_sleeps_is_woken_by_a_message(chat: Chat) -> None:
    page = chat.page
    switch = Switching(chat.page, chat.server.get("/stats").json())
    switch.library = library("unloaded")
    chat.reload()
    chat.reads("#banner-text", r"^The model is asleep\. Your next message wakes it\.$")
    assert page.text_content("#state") == "Asleep" and page.text_content("#model") == "demo"
    chat.say("Wake up")
    chat.tells("Wake up", "Good day.")


# Narrow screens.


def test_the_list_is_a_drawer_on_a_phone(chat: Chat) -> None:
    page = chat.page
    chat.say("One")
    page.click("#new-chat")
    page.set_viewport_size({"width": 400, "height": 800})
    chat.shows("() => document.getElementById('chats').inert")
    page.click("#chats-toggle")
    assert page.evaluate("document.activeElement.id") == "chats-search"
    page.keyboard.press("Escape")
    assert page.is_hidden("#chats") and page.evaluate("document.activeElement.id") == "chats-toggle"
    page.keyboard.press("Enter")
    page.locator(".chat-title").first.click()
    chat.reads(f"{LAST} .text", "Good day.")
    assert page.is_hidden("#chats")
    page.evaluate("document.getElementById('settings').open = true")
    assert page.evaluate("document.documentElement.scrollWidth") == 400
