"""The server's page in a real browser, served by the real server with the demo model."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import urllib.error
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import make_mixture  # type: ignore[import-not-found]
from page_browser import (  # type: ignore[import-not-found]  # found beside this file
    CHROMIUM,
    WAIT_MS,
    PageWaits,
    Server,
    chromium,
    forget_all,
    running,
    smallest_budget,
)

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page, Request, Route, ViewportSize

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="no playwright: pip install playwright"),
]

VIEWPORT: ViewportSize = {"width": 1280, "height": 720}  # Playwright's default
BEGINNING = "It was a dark night, and"
READY = '#state[data-state="ready"]'
ANSWER = "#log article.assistant:last-child"
KEY = "a-key-of-the-test"
HELD = 8  # number of tokens after which an answer waits for the test
# Colours of the light theme.
COMPUTE, GOOD, READING, RESIDENT = "153,153,153", "0,158,115", "0,114,178", "185,192,199"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(tmp_path_factory.mktemp("server") / "log") as server:
        yield server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


class Tab(PageWaits):
    """A page in its own browser profile, and the errors in it."""

    def __init__(self, page: Page, server: Server) -> None:
        self.page, self.server = page, server
        self.complaints: list[str] = []
        self.requests: list[Request] = []
        page.set_default_timeout(WAIT_MS)
        self._listeners: dict[Any, Callable[[Any], None]] = {
            "console": lambda said: self.complaints.append(said.text) if said.type != "log" else None,
            "pageerror": lambda error: self.complaints.append(str(error)),
            "request": lambda request: self.requests.append(request),
        }
        for event, listener in self._listeners.items():
            page.on(event, listener)

    def leave(self) -> None:
        """Leaves the page, which another tab uses from now on."""
        for event, listener in self._listeners.items():
            self.page.remove_listener(event, listener)

    def open(self) -> Page:
        self.page.goto(self.server.url)
        self.page.wait_for_selector(READY)
        self.shows("() => document.getElementById('model').textContent !== '–'")
        return self.page

    def set(self, **fields: str) -> None:
        """Sets sampling fields."""
        self.page.evaluate("document.getElementById('settings').open = true")
        for name, value in fields.items():
            self.page.fill(f"input[name={name}]", value)

    def say(self, text: str) -> None:
        self.page.fill("#prompt", text)
        self.page.press("#prompt", "Enter")

    def answered(self, state: str = "done") -> str:
        """Waits until the last answer has ended, and for its Markdown. Returns its text."""
        text = self.page.locator(f'{ANSWER}[data-state="{state}"] > .text:not(.plain)')
        text.wait_for(state="attached")
        return text.text_content() or ""

    def speak(self) -> None:
        """Asks for a long answer and waits for some text. More comes only when the server is released."""
        self.server.hold(HELD)
        self.set(max_tokens="480", seed="7")
        self.say(BEGINNING)
        self.wait_for_text()

    def wait_for_text(self) -> None:
        text = f'{ANSWER}[data-state="streaming"] > .text:not(.plain)'
        self.shows("text => document.querySelector(text)?.textContent.length > 3", text)

    def asked(self) -> list[Any]:
        """The bodies of the requests for an answer."""
        return [request.post_data_json for request in self.requests if request.method == "POST"]


@pytest.fixture(scope="module")
def common_page(browser: Browser) -> Page:
    """A window costs Chromium half a second of processor time, so most tests share this one in turn."""
    return browser.new_context().new_page()


@pytest.fixture
def open_tab(browser: Browser, server: Server) -> Iterator[Callable[..., Tab]]:
    """Opens tabs, each in its own window and profile unless a page is given.

    At the end, checks that there were no other errors than expected, and no requests to other servers.
    """
    tabs: list[Tab] = []
    contexts: list[BrowserContext] = []

    def open_tab(server: Server = server, page: Page | None = None) -> Tab:
        if page is None:
            contexts.append(browser.new_context())
            page = contexts[-1].new_page()
        tabs.append(Tab(page, server))
        return tabs[-1]

    yield open_tab
    for context in contexts:
        context.close()
    server.hold(None)
    for tab in tabs:
        tab.leave()
        assert tab.complaints == []
        elsewhere = [request.url for request in tab.requests if not request.url.startswith(f"{tab.server.url}/")]
        assert elsewhere == []


@pytest.fixture
def empty_tab(common_page: Page, open_tab: Callable[..., Tab]) -> Iterator[Tab]:
    """The common page without its earlier contents, not yet opened."""
    tab = open_tab(page=common_page)
    yield tab
    common_page.unroute_all()
    forget_all(common_page)
    common_page.mouse.move(0, 0)
    common_page.goto("about:blank")
    common_page.set_viewport_size(VIEWPORT)
    common_page.emulate_media(color_scheme="light", reduced_motion="no-preference")


@pytest.fixture
def tab(empty_tab: Tab) -> Tab:
    empty_tab.open()
    return empty_tab


def expect_failed_loads(tab: Tab, least: int = 1) -> None:
    """Checks that at least so many requests failed, which Chromium reports, and that there was no other error."""
    tab.hears(lambda: len(tab.complaints) >= least)
    assert all(text.startswith("Failed to load resource") for text in tab.complaints), tab.complaints
    tab.complaints.clear()


def show_answer(tab: Tab, text: str) -> None:
    """Makes the model answer `text` from now on."""
    chunk = {"id": "x", "choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]}
    body = f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n"
    tab.page.route(
        "**/v1/chat/completions",
        lambda route: route.fulfill(body=body, content_type="text/event-stream; charset=utf-8"),
    )


def wait_for_colours(page: Page, canvas: str, *colours: str) -> None:
    """Waits until a canvas has opaque pixels of all these colours."""
    page.wait_for_function(
        """([id, wanted]) => {
            const canvas = document.getElementById(id);
            const copy = new OffscreenCanvas(canvas.width, canvas.height).getContext('2d', {willReadFrequently: true});
            copy.drawImage(canvas, 0, 0);
            const {data} = copy.getImageData(0, 0, canvas.width, canvas.height);
            const found = new Set();
            for (let i = 0; i < data.length; i += 4)
                if (data[i + 3] === 255) found.add([data[i], data[i + 1], data[i + 2]].join());
            return wanted.every(colour => found.has(colour)); }""",
        arg=[canvas, colours],
    )


# A chat.


def test_an_answer_streams_and_the_inside_is_alive(tab: Tab) -> None:
    page = tab.page
    assert page.text_content("#model") == "demo"
    assert page.text_content("#budget") == "400 MB"
    # The text at each of its changes, as the page's user sees it.
    page.evaluate(
        """() => { window.seen = []; new MutationObserver(() => {
            const text = document.querySelector('#log .assistant .text')?.textContent;
            if (text && text !== window.seen.at(-1)) window.seen.push(text);
        }).observe(document.getElementById('log'), {subtree: true, childList: true, characterData: true}); }"""
    )
    tab.set(max_tokens="40", seed="7")
    tab.server.hold(3)
    tab.say(BEGINNING)
    lengths = [0]
    for token in (10, 20, 30, None):
        tab.shows("length => window.seen.at(-1)?.length > length", lengths[-1])
        lengths.append(page.evaluate("window.seen.at(-1).length"))
        tab.server.hold(token)
    text = tab.answered()
    seen = page.evaluate("window.seen")
    assert len(seen) >= 5 and seen[-1] == text
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(seen))
    assert re.search(r"^40 tokens · [\d.]+ per second · cut there$", page.text_content(f"{ANSWER} .note") or "")
    assert tab.asked() == [
        {
            **{"model": "default", "messages": [{"role": "user", "content": BEGINNING}], "stream": True},
            **{
                "stream_options": {"include_usage": True},
                "temperature": 0.7,
                "top_p": 0.95,
                "max_tokens": 40,
                "seed": 7,
            },
        }
    ]
    tab.reads("#doing", r"^Idle$")
    tab.reads("#context", r"^Context \d+ of 512$")
    for figure in ("tile-speed", "tile-hit", "tile-bytes", "mean-wait", "mean-manage", "mean-compute", "mean-hits"):
        tab.reads(f"#{figure}", r"^[\d.]+")
    tab.reads("#layers-note", r"^5 × \d+ .* resident$")
    assert page.locator("#plan tr").count() == 8
    wait_for_colours(page, "layers", RESIDENT)
    wait_for_colours(page, "time", COMPUTE)
    wait_for_colours(page, "reads", READING, GOOD)


def test_a_key_is_asked_for_where_the_server_wants_one_and_experts_have_cells_of_their_own(
    open_tab: Callable[..., Tab], tmp_path: Path
) -> None:
    """Uses one server: a mixture of experts with a key, whose authors recommend sampling settings."""
    size = {"num_hidden_layers": 8, "num_experts": 64, "moe_intermediate_size": 128}  # 50 MB of experts
    checkpoint = make_mixture(tmp_path / "a-mixture", "qwen3_moe", **size)
    write_tokenizer(checkpoint)
    (checkpoint / "generation_config.json").write_text('{"temperature": 2, "top_k": 50}')
    options = ("--model", str(checkpoint))
    memory = f"{smallest_budget(*options) + 20}MB"
    with running(tmp_path / "log", *options, "--api-key", KEY, memory=memory) as locked:
        with pytest.raises(urllib.error.HTTPError, match="401"):
            locked.get("/stats")
        tab = open_tab(locked)
        page = tab.page
        page.goto(locked.url)
        for key, said in (("wrong", "^$"), (KEY, ".")):
            page.wait_for_selector("#key-dialog[open]")
            tab.reads("#key-wrong", said)
            page.fill("#key", key)
            page.press("#key", "Enter")
        page.wait_for_selector(READY)
        tab.open()  # the key is kept for the tab
        assert page.text_content("#model") == "a-mixture"
        assert page.is_hidden("#demo-note")
        assert page.text_content("#layers-note") == "8 × 64 experts, 0 % resident"
        tab.set(max_tokens="100")
        tab.reads("#settings-summary", r"^temperature 2 · top-p 1 · 100 tokens$")
        tab.say("hello")
        tab.answered()
        (asked,) = tab.asked()
        assert asked["max_tokens"] == 100 and not {"temperature", "top_p", "top_k", "seed"} & set(asked)
        tab.reads("#layers-note", r"^8 × 64 experts, [1-9][\d.]* % resident")
        wait_for_colours(page, "layers", GOOD, RESIDENT)  # cells of one expert each: a hit, resident, or empty
        assert page.evaluate("Object.values(localStorage).join().includes('a-key')") is False
        expect_failed_loads(tab, 2)
        page.close()


def test_the_strips_tell_what_is_pointed_at(tab: Tab) -> None:
    tab.page.hover("#layers", position={"x": 200, "y": 30})
    tab.reads("#layers-note", r"^1, \w+ \d+–\d+: \d+ % resident")
    tab.page.hover("#prompt")
    tab.reads("#layers-note", r"^5 ×")


def test_stop_ends_the_generation(tab: Tab) -> None:
    tab.speak()
    tab.page.click("#stop")
    text = tab.answered("stopped")
    assert text and tab.page.text_content(f"{ANSWER} .note") == "Stopped."
    tab.shows("() => fetch('/stats').then(r => r.json()).then(stats => stats.now === null)")
    last = tab.server.get("/stats")["last"]
    assert last["generated_tokens"] < 480
    assert tab.page.text_content(f"{ANSWER} .text") == text  # nothing came after it
    tab.set(max_tokens="5")
    tab.say("and then")
    tab.answered()
    assert [message["role"] for message in tab.asked()[1]["messages"]] == ["user", "assistant", "user"]


@pytest.mark.parametrize("width", [1280, 400])
def test_the_end_stays_in_sight_unless_one_reads_above(empty_tab: Tab, width: int) -> None:
    tab, page = empty_tab, empty_tab.page
    page.set_viewport_size({"width": width, "height": 500})
    tab.open()
    # Pixels between the end of the last answer and the composer, above which it must be visible.
    room = """() => document.getElementById('composer').getBoundingClientRect().top
        - document.querySelector('#log article:last-child .foot').getBoundingClientRect().bottom"""
    show_answer(tab, "line\n" * 60)
    tab.say(BEGINNING)
    tab.answered()
    tab.shows(f"() => ({room})() >= 0")
    page.click("#settings summary")
    tab.shows(f"() => ({room})() >= 0")
    page.evaluate(
        """() => new Promise(done => {
            addEventListener('scroll', () => done(), {capture: true, once: true});
            document.querySelector('#log article').scrollIntoView(); })"""
    )
    page.click("#settings summary")
    tab.redraws()
    assert page.evaluate(room) < -500


def test_retry_asks_the_same_again_and_replaces_the_answer(tab: Tab) -> None:
    tab.set(max_tokens="8")
    tab.say(BEGINNING)
    tab.answered()
    with tab.page.expect_request("**/v1/chat/completions"):
        tab.page.click(".retry")
    tab.answered()
    assert tab.page.locator("#log article").count() == 2
    first, second = tab.asked()
    assert first["messages"] == second["messages"] == [{"role": "user", "content": BEGINNING}]
    assert tab.page.locator(".retry").count() == 1


def test_a_reload_keeps_conversation_settings_and_draft(tab: Tab) -> None:
    tab.set(max_tokens="6", temperature="0.25")
    tab.say(BEGINNING)
    text = tab.answered()
    tab.page.fill("#prompt", "half a thou")
    tab.page.reload()
    assert tab.answered() == text
    assert tab.page.text_content("#log .user .text") == BEGINNING
    assert tab.page.input_value("#prompt") == "half a thou"
    assert tab.page.input_value("input[name=temperature]") == "0.25"
    tab.page.click("#new-chat")
    assert tab.page.locator("#log article").count() == 0
    tab.page.reload()
    tab.page.wait_for_selector(READY)
    assert tab.page.locator("#log article").count() == 0


def test_a_reload_while_it_speaks_keeps_what_there_was(tab: Tab) -> None:
    tab.speak()
    before = tab.page.text_content(f"{ANSWER} .text") or ""
    tab.page.reload()
    assert tab.answered("partial").startswith(before)
    assert tab.page.text_content(f"{ANSWER} .note") == "Interrupted: the page was reloaded."


def test_two_pages_take_turns(tab: Tab, open_tab: Callable[..., Tab]) -> None:
    first, second = tab, open_tab()
    second.open()
    first.speak()
    first.reads("#doing", "^Speaking$")
    second.reads("#doing", "^Speaking, for another client$")
    second.set(max_tokens="4")
    second.say(BEGINNING)
    second.page.wait_for_selector(f"{ANSWER}.waiting")
    first.page.click("#stop")
    first.answered("stopped")
    second.answered()


# Failures.


def test_the_server_goes_away_and_comes_back(tab: Tab, server: Server) -> None:
    page = tab.page
    tab.speak()
    server.kill()
    try:
        text = tab.answered("partial")
        assert text and page.text_content(f"{ANSWER} .note") == "Interrupted: the server went away."
        page.wait_for_selector('#banner[data-state="gone"]')
        page.fill("#prompt", "What came")
        page.press("#prompt", "Enter")  # not sent, and not lost
        assert page.input_value("#prompt") == "What came"
        assert page.is_disabled("#send")
    finally:
        server.start()
    server.wait()
    page.wait_for_selector(READY)
    assert page.is_hidden("#banner")
    assert page.input_value("#prompt") == "What came"
    tab.set(max_tokens="6")
    page.press("#prompt", "Enter")
    tab.answered()
    messages = tab.asked()[1]["messages"]
    assert messages[1:] == [{"role": "assistant", "content": text}, {"role": "user", "content": "What came"}]
    expect_failed_loads(tab)


def test_a_model_that_loads_is_waited_for(empty_tab: Tab, server: Server) -> None:
    tab = empty_tab
    tab.page.route("**/health", lambda route: route.fulfill(status=503, json={"status": "loading"}))
    tab.page.goto(server.url)
    tab.page.wait_for_selector('#banner[data-state="loading"]')
    assert "The model is loading." in (tab.page.text_content("#banner") or "")
    tab.page.fill("#prompt", BEGINNING)
    assert tab.page.is_disabled("#send")
    tab.page.unroute("**/health")
    tab.page.wait_for_selector(READY)
    assert tab.page.is_enabled("#send") and tab.page.is_hidden("#banner")
    expect_failed_loads(tab)


def test_a_model_that_could_not_be_loaded_says_why(empty_tab: Tab, server: Server) -> None:
    tab = empty_tab
    why = "this model needs at least 267MB; the memory budget is 0.100 GB."
    tab.page.route("**/health", lambda route: route.fulfill(status=500, json={"status": "failed", "error": why}))
    tab.page.goto(server.url)
    tab.page.wait_for_selector('#banner[data-state="failed"]')
    assert why in (tab.page.text_content("#banner") or "")
    tab.page.unroute("**/health")
    tab.page.wait_for_selector(READY)  # No further request fails.
    expect_failed_loads(tab)


def test_too_long_a_text_is_refused_with_the_numbers(tab: Tab) -> None:
    tab.set(max_tokens="100")
    tab.say("word " * 600)
    tab.answered("error")
    note = tab.page.text_content(f"{ANSWER} .note") or ""
    assert re.search(r"The prompt has \d+ tokens\b.* 512[.;] .* Start a new chat", note), note
    tab.page.click("#new-chat")
    tab.set(max_tokens="4")
    tab.say(BEGINNING)
    tab.answered()
    assert tab.asked()[1]["messages"] == [{"role": "user", "content": BEGINNING}]
    expect_failed_loads(tab)


def test_a_refused_request_can_be_tried_again(tab: Tab) -> None:
    message = "64 requests are waiting already; try again soon."
    body = {"error": {"message": message, "type": "rate_limit_error", "param": None, "code": "queue_full"}}
    tab.page.route("**/v1/chat/completions", lambda route: route.fulfill(status=429, json=body))
    tab.set(max_tokens="4")
    tab.say(BEGINNING)
    tab.answered("error")
    assert tab.page.text_content(f"{ANSWER} .note") == message
    tab.page.unroute("**/v1/chat/completions")
    tab.page.click(".retry")
    tab.answered()
    expect_failed_loads(tab)


def test_a_setting_out_of_its_range_is_not_sent(tab: Tab) -> None:
    tab.set(temperature="3")
    tab.say(BEGINNING)
    assert tab.page.evaluate("document.activeElement.name") == "temperature"
    assert tab.asked() == [] and tab.page.input_value("#prompt") == BEGINNING
    tab.page.click("#settings-reset")
    assert tab.page.input_value("input[name=temperature]") == ""
    assert tab.page.get_attribute("input[name=temperature]", "placeholder") == "auto: 0.7"


# Accessibility.


def test_what_a_model_writes_is_text(tab: Tab) -> None:
    html = '<img src=x onerror="window.pwned = 1"><script>window.pwned = 2</script> <b>bold</b>\nand a line'
    question = f"{html}\n  kept  white space &amp;"
    show_answer(tab, html)
    tab.say(question)
    assert tab.answered() == html
    assert tab.page.text_content("#log .user .text") == question
    assert tab.page.evaluate("document.querySelectorAll('#log img, #log script, #log b').length") == 0
    assert tab.page.evaluate("window.pwned") is None
    tab.page.reload()
    assert tab.answered() == html
    assert tab.page.evaluate("window.pwned") is None


def test_the_policy_forbids_everything_from_elsewhere(tab: Tab) -> None:
    for path in ("/", "/page/app.js", "/page/style.css"):
        answer = tab.page.request.get(tab.server.url + path)
        assert answer.ok and "default-src 'self'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]


def test_the_keyboard_is_enough(tab: Tab) -> None:
    page = tab.page
    focus = "(({id, className, name, localName}) => id || className || name || localName)(document.activeElement)"
    assert page.evaluate(focus) == "prompt"
    tab.server.hold(HELD)
    tab.set(max_tokens="480", seed="7")
    page.focus("#prompt")
    page.keyboard.type(BEGINNING)
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("cold")
    assert page.input_value("#prompt") == f"{BEGINNING}\ncold"
    page.keyboard.press("Enter")
    tab.wait_for_text()
    page.keyboard.press("Escape")
    tab.answered("stopped")
    assert page.evaluate(focus) == "prompt"
    tab.set(max_tokens="4")
    page.focus("#prompt")
    page.keyboard.press("Shift+Tab")
    assert page.evaluate(focus) == "retry"
    outline = page.evaluate("getComputedStyle(document.activeElement).outline")
    assert "solid" in outline and "2px" in outline
    page.keyboard.press("Enter")
    tab.answered()
    # Everything that can be clicked can be reached by keyboard, and shows its focus.
    page.evaluate("document.activeElement.blur(); document.body.tabIndex = -1; document.body.focus()")
    reached = []
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.append(page.evaluate(focus))
        if reached[-1] == "body":
            break  # past the last one
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") != "none", reached[-1]
    assert {"skip", "new-chat", "theme", "retry", "prompt", "settings-reset", "inside-toggle"} <= set(reached)
    assert reached[0] == "skip"


def test_it_says_itself_to_those_who_listen(tab: Tab) -> None:
    page = tab.page
    assert page.get_attribute("#log", "aria-live") == "polite"
    tab.speak()
    assert page.get_attribute(ANSWER, "aria-busy") == "true"
    page.keyboard.press("Escape")
    tab.answered("stopped")
    assert page.get_attribute(ANSWER, "aria-busy") == "false"
    names = page.evaluate(
        """[...document.querySelectorAll('button, input, textarea, canvas, progress')].filter(e => !(
            e.getAttribute('aria-label') || e.labels?.length || (e.tagName === 'BUTTON' && e.textContent.trim())
        )).map(e => e.outerHTML)"""
    )
    assert names == []


def test_it_fits_400_pixels(empty_tab: Tab) -> None:
    tab = empty_tab
    tab.page.set_viewport_size({"width": 400, "height": 800})
    page = tab.open()
    tab.set(max_tokens="30")
    tab.say(BEGINNING + " " + "x" * 300)
    tab.answered()
    assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [400, 400]
    chat, inside = (page.locator(part).bounding_box() for part in (".chat", "#inside"))
    assert chat is not None and inside is not None
    assert inside["y"] >= chat["y"] + chat["height"]  # below it, not beside it
    page.click("#inside-toggle")
    assert page.is_hidden("#inside-body")
    page.reload()
    page.wait_for_selector(READY)
    assert page.is_hidden("#inside-body")
    page.click("#inside-toggle")
    assert page.is_visible("#layers")


def luminance(colour: str) -> float:
    """The WCAG luminance of "#rrggbb"."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("scheme", "toggled"), [("light", "dark"), ("dark", "light")])
def test_dark_and_light_can_be_read(empty_tab: Tab, scheme: Literal["dark", "light"], toggled: str) -> None:
    empty_tab.page.emulate_media(color_scheme=scheme)
    page = empty_tab.open()

    def colour(name: str) -> str:
        return str(page.evaluate("name => getComputedStyle(document.documentElement).getPropertyValue(name)", name))

    def is_dark() -> bool:
        red, green, blue = map(
            int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.documentElement).backgroundColor"))
        )
        return red + green + blue < 3 * 128

    def check() -> None:
        for ground in ("--ground", "--raised"):
            for text in ("--text", "--quiet", "--accent", "--wrong"):
                assert contrast(colour(text), colour(ground)) >= 4.5, (text, ground)
        assert contrast(colour("--on-accent"), colour("--accent")) >= 4.5
        assert contrast(colour("--warn"), colour("--warn-ground")) >= 4.5
        assert contrast(colour("--edge"), colour("--ground")) >= 3
        assert contrast(colour("--reading"), colour("--raised")) >= 3
        assert contrast(colour("--good"), colour("--raised")) >= 3

    assert is_dark() == (scheme == "dark")
    check()
    while page.text_content("#theme") != f"Theme: {toggled}":
        page.click("#theme")
    assert is_dark() == (toggled == "dark")
    check()
    page.reload()
    page.wait_for_selector(READY)
    assert is_dark() == (toggled == "dark")


@pytest.mark.parametrize(("motion", "animation"), [("no-preference", "waiting"), ("reduce", "none")])
def test_less_motion_is_honoured(empty_tab: Tab, motion: Literal["no-preference", "reduce"], animation: str) -> None:
    empty_tab.page.emulate_media(reduced_motion=motion)
    page = empty_tab.open()
    held: list[Route] = []
    page.route("**/v1/chat/completions", lambda route: held.append(route))  # no reply comes, so the caret waits
    empty_tab.say(BEGINNING)
    page.wait_for_selector(f"{ANSWER}.waiting")
    empty_tab.hears(lambda: held)
    caret = f"getComputedStyle(document.querySelector('{ANSWER} .text'), '::after').animationName"
    assert page.evaluate(caret) == animation
    held[0].abort("aborted")
    empty_tab.answered("error")
