"""Answers on the server's page: Markdown, code, tables, formulas, thoughts, tool calls. All of it is hostile."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from page_browser import CHROMIUM, WAIT_MS, chromium, forget_all, keep_moments  # type: ignore[import-not-found]  # found beside this file
from scripted_page import ScriptedPage, call, scripted_page, text, thought  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="no playwright: pip install playwright"),
]

ANSWER = "#log article.assistant:last-child"
BODY = f"{ANSWER} > .text"
POLICY = (
    "default-src 'self'; img-src 'self' data:; object-src 'none'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
MARKDOWN = r"""# A title

Some **bold**, *slanted*, ~~struck~~ and `plain` words
on two lines, a [link](https://example.org/a?b=1 "Its title"), and https://example.org/bare.

1. one
2. two
   - inner

> quoted

| left | right |
|:-----|------:|
| a    | 1 \| 2 |

```python
def f(x):
    return "<b>" + x
```

---

![a picture](https://example.org/picture.png) and ![none](data:image/png;base64,AAAA), from server.py

The area is $\pi r^2$, or \(2 \pi r\); it costs $5 and $10.

$$
\begin{aligned} a &= \frac{1}{2} \\ &= \mathbb{R} \end{aligned}
$$

\[ \notacommand{x} \]

End"""
HOSTILE = [
    "<script>window.pwned = 1</script>",
    '<img src=x onerror="window.pwned = 1">',
    "<svg onload=window.pwned=1><a href=javascript:window.pwned=1>x</a></svg>",
    '<iframe srcdoc="<script>parent.pwned = 1</script>"></iframe>',
    "<details open ontoggle=window.pwned=1>x</details>",
    "<style>body { display: none }</style><base href=https://example.org/><meta http-equiv=refresh content=0>",
    "[x](javascript:window.pwned=1)",
    "[x](JaVaScRiPt:window.pwned=1)",
    "[x](java&#x09;script:window.pwned=1)",
    "[x](&#106;avascript:window.pwned=1)",
    "[x](javascript&colon;window.pwned=1)",
    "[x](\x01javascript:window.pwned=1)",
    "[x](data:text/html,<script>opener.pwned=1</script>)",
    "[x](vbscript:msgbox(1)) [x](file:///etc/passwd) [x](blob:x) [x](/v1/models) [x](//example.org)",
    "<javascript:window.pwned=1> <https://example.org/auto>",
    "[x]: javascript:window.pwned=1\n\n[x] [x][x]",
    '![x](javascript:window.pwned=1) ![x](data:text/html,x) ![x](https://example.org/x.png"onerror=window.pwned=1)',
    '[x](https://example.org/"onmouseover=window.pwned=1) [x](https://example.org "\\" onclick=window.pwned=1")',
    '```"><script>window.pwned=1</script>\n</code></pre><script>window.pwned=1</script>\n```',
    "```html\n<script>window.pwned = 1</script><img src=x onerror=window.pwned=1>\n```",
    "`<img src=x onerror=window.pwned=1>`",
    "| <img src=x onerror=window.pwned=1> |\n|---|\n| <script>window.pwned=1</script> |",
    r"$\href{javascript:window.pwned=1}{x}$ $\url{javascript:window.pwned=1}$ $\includegraphics{https://example.org/x}$",
    r"$\htmlStyle{color:red}{x}$ $\htmlClass{a}{x}$ $\htmlId{log}{x}$ $\htmlData{x=1}{x}$",
    r"$\pmb{x}$ $\fcolorbox{red}{blue}{x}$",
    r"$\text{<img src=x onerror=window.pwned=1>}$ $\def\x{\x\x}\x$ $\rule{1em}{1em}$",
    r"$\color{red;background:url(https://example.org/x)}{x}$",
    "<!--><script>window.pwned=1</script>-->\n\n<![CDATA[<script>window.pwned=1</script>]]>\n\n<?x window.pwned=1 ?>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.pwned=1></style></mglyph></table></mtext></math>",
    "$" * 3000 + "[" * 3000 + "(" * 3000 + "{" * 3000 + "\\(" * 1000 + "> " * 3000 + "*" * 3000,
]
ALLOWED = set(
    [
        "h4",
        "h5",
        "h6",
        "p",
        "br",
        "hr",
        "ul",
        "ol",
        "li",
        "blockquote",
        "strong",
        "em",
        "s",
        "a",
        "code",
        "pre",
        "div",
        "span",
        "button",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
    ]
)
ATTRIBUTES = set(["class", "href", "target", "rel", "title", "start", "tabindex", "role", "aria-label", "type"])


@pytest.fixture(scope="module")
def server() -> Iterator[ScriptedPage]:
    with scripted_page() as server:
        yield server


@pytest.fixture(scope="module")
def window() -> Iterator[Page]:
    with chromium() as browser:
        context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
        yield context.new_page()


@pytest.fixture
def page(window: Page, server: ScriptedPage) -> Iterator[Page]:
    """The page with an empty conversation. At the end: no error in the console, no request to another server."""
    complaints: list[str] = []
    requests: list[str] = []
    server.script, server.hold, server.pause_s = [], None, 0.0
    server.asked.clear()
    listeners: dict[Any, Any] = {
        "console": lambda said: complaints.append(said.text),
        "pageerror": lambda error: complaints.append(str(error)),
        "request": lambda request: requests.append(request.url),
    }
    for event, listener in listeners.items():
        window.on(event, listener)
    window.set_default_timeout(WAIT_MS)
    window.goto(server.url)
    window.wait_for_selector('#state[data-state="ready"]')
    yield window
    server.hold = None
    for event, listener in listeners.items():
        window.remove_listener(event, listener)
    assert window.evaluate("window.pwned") is None
    assert complaints == []
    assert [url for url in requests if not url.startswith(f"{server.url}/")] == []
    forget_all(window)
    window.goto("about:blank")


def ask(page: Page, question: str = "Say it.") -> None:
    page.fill("#prompt", question)
    page.press("#prompt", "Enter")


def answered(page: Page) -> None:
    """Waits until the last answer has ended, and everything in it has its final form."""
    page.wait_for_selector(f'{ANSWER}[data-state="done"]')
    page.wait_for_function(
        f"""() => !document.querySelector('{BODY}.plain') &&
            [...document.querySelectorAll('{BODY} .formula')].every(e => e.title || e.querySelector('math')) &&
            [...document.querySelectorAll('{BODY} pre[aria-label*=python]')].every(e => e.querySelector('span'))"""
    )


def texts(page: Page, selector: str) -> list[str]:
    return page.locator(f"{BODY} {selector}").all_text_contents()


def test_markdown_is_shown(page: Page, server: ScriptedPage) -> None:
    server.script = text(MARKDOWN, 3)
    ask(page, "1 < 2\n**plain** $x$ <b>")
    answered(page)
    assert page.locator("#log .user .text").inner_text() == "1 < 2\n**plain** $x$ <b>"
    assert texts(page, "h4") == ["A title"]
    assert [texts(page, tag) for tag in ("strong", "em", "s")] == [["bold"], ["slanted"], ["struck"]]
    assert texts(page, "ol > li > ul > li") == ["inner"] and texts(page, "blockquote") == ["quoted"]
    assert texts(page, "th") == ["left", "right"] and texts(page, "td") == ["a", "1 | 2"]
    assert page.evaluate(f"getComputedStyle(document.querySelector('{BODY} td:last-child')).textAlign") == "right"
    links = page.locator(f"{BODY} a").evaluate_all("all => all.map(a => [a.textContent, a.href, a.target, a.rel])")
    away = ["_blank", "noopener noreferrer"]
    assert links == [
        ["link", "https://example.org/a?b=1", *away],
        ["https://example.org/bare", "https://example.org/bare", *away],
        ["Image: a picture", "https://example.org/picture.png", *away],
    ]
    assert page.locator(f"{BODY} img").count() == 0 and "![none](data:image" in page.inner_text(BODY)
    assert "it costs $5 and $10." in page.inner_text(BODY)
    assert (
        page.locator(f"{BODY} p:has(br)").inner_text().startswith("Some bold, slanted, struck and plain words\non two")
    )


def test_formulas_become_mathml(page: Page, server: ScriptedPage) -> None:
    server.script = text(MARKDOWN, 3)
    ask(page)
    answered(page)
    assert page.locator(f"{BODY} p math").all_text_contents() == ["πr2", "2πr"]
    assert "ℝ" in (page.text_content(f"{BODY} .display mtable") or "")
    assert page.locator(f"{BODY} .display mfrac").count() == 1
    refused = page.locator(f"{BODY} .formula-source")
    assert refused.all_text_contents() == [r"\[ \notacommand{x} \]"]  # shown as it was written
    assert "notacommand" in (page.locator(f"{BODY} .formula[title]").get_attribute("title") or "")


def test_code_and_answers_are_copied(page: Page, server: ScriptedPage) -> None:
    server.script = text(MARKDOWN)
    ask(page)
    answered(page)
    assert texts(page, ".language") == ["python"]
    assert page.locator(f"{BODY} .hl-keyword").all_text_contents() == ["def", "return"]
    keep_moments(page)
    page.focus(f"{BODY} .copy-code")
    page.keyboard.press("Enter")
    page.wait_for_selector(f"{BODY} .copy-code[data-copied=true]")
    assert page.evaluate("navigator.clipboard.readText()") == 'def f(x):\n    return "<b>" + x'
    page.click(f"{ANSWER} .foot .copy")
    page.wait_for_selector(f"{ANSWER} .foot .copy[data-copied=true]")
    assert page.evaluate("navigator.clipboard.readText()") == MARKDOWN
    page.evaluate(
        "Object.defineProperty(navigator, 'clipboard', {value: undefined})"
    )  # as over http to another machine
    page.evaluate(f"delete document.querySelector('{BODY} .copy-code').dataset.copied")
    page.click(f"{BODY} .copy-code")
    page.wait_for_selector(f"{BODY} .copy-code[data-copied=true]")


def test_nothing_that_a_model_writes_is_carried_out(page: Page, server: ScriptedPage) -> None:
    """Every element and attribute of every answer is one that the page makes itself."""
    server.script = [
        *thought("\n\n".join(HOSTILE)),
        *text("\n\n".join(HOSTILE), 997),
        *(call(i, each, each) for i, each in enumerate(HOSTILE[:3])),
    ]
    ask(page)
    page.wait_for_selector(f'{ANSWER}[data-state="done"]')
    page.click(f"{ANSWER} .thoughts summary")
    page.wait_for_selector(f"{ANSWER} .thought-text math")
    page.wait_for_selector(f"{BODY} math")
    found = page.evaluate(
        f"""() => [...document.querySelectorAll('{BODY} *, {ANSWER} .thought-text *, {ANSWER} .calls *')].map(
            e => [e.namespaceURI.endsWith('MathML') ? 'math' : e.localName, e.getAttributeNames(), e.href ?? ''])"""
    )
    kinds = {(kind, name) for kind, names, _ in found for name in names if kind != "math"}
    assert {kind for kind, _, _ in found} <= ALLOWED | {"math"}
    assert {name for _, name in kinds} <= ATTRIBUTES
    maths = {name for kind, names, _ in found for name in names if kind == "math"}
    assert not {name for name in maths if name in ("href", "src", "id") or name.startswith("on")}
    addresses = {href for _, _, href in found if href}
    assert addresses and all(href.startswith("https://example.org/") for href in addresses)
    for link in page.locator(f"{BODY} a:not([href])").all():  # dead ones
        assert link.get_attribute("target") is None
    assert "<script>window.pwned = 1</script>" in page.inner_text(BODY)
    page.reload()
    page.wait_for_selector(f"{BODY} math")


@pytest.mark.parametrize(
    "marks", ["\\[a\n" * 15_000, "$$a b\n$x\n" * 5_000, "\\(" * 50_000], ids=["lines", "dollars", "inline"]
)
def test_many_formulas_without_an_end_do_not_stop_the_page(page: Page, server: ScriptedPage, marks: str) -> None:
    server.script = text(f"{marks}\n\nAfter **them**.", len(marks) + 100)
    ask(page)
    page.wait_for_selector(f"{BODY} strong")
    assert page.locator(f"{BODY} math").count() == 0


def test_no_file_of_the_page_reads_html() -> None:
    from mlx_flash.server.app import PAGE

    for path in PAGE.glob("*.js"):
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "DOMParser", "setHTML", "document.write", "eval("):
            assert word not in path.read_text(encoding="utf-8"), (path.name, word)


def test_the_policy_is_as_strict_as_before(page: Page, server: ScriptedPage) -> None:
    for path in ("/", "/page/answer.css", "/page/vendor/temml.js"):
        answer = page.request.get(server.url + path)
        assert answer.ok and answer.headers["content-security-policy"] == POLICY


def test_libraries_are_loaded_when_they_are_needed(page: Page, server: ScriptedPage) -> None:
    loaded = """performance.getEntriesByType('resource').map(entry => entry.name.split('/vendor/')[1])
        .filter(name => name?.endsWith('.js')).sort()"""
    assert page.evaluate(loaded) == []
    server.script = text("plain")
    ask(page)
    answered(page)
    assert page.evaluate(loaded) == ["markdown-it.js"]
    server.script = text("```python\ndef f(): pass\n```\n\n$x$")
    ask(page)
    page.wait_for_selector("math")
    page.wait_for_selector(".hl-keyword")
    assert page.evaluate(loaded) == ["highlight.js", "markdown-it.js", "temml.js"]


def test_thoughts_are_folded_and_not_sent_back(page: Page, server: ScriptedPage) -> None:
    server.script = [*thought("They *greet* me.\n\n", 4), *text("Good day.")]
    server.hold = 2
    ask(page)
    fold = page.locator(f"{ANSWER} .thoughts")
    page.wait_for_selector(f"{ANSWER} .thinking")
    assert fold.locator("summary").inner_text() == "Thinking…"
    assert not fold.locator(".thought-text").is_visible()
    fold.locator("summary").click()
    fold.locator(".thought-text").get_by_text("They").wait_for()
    server.hold = None
    answered(page)
    assert fold.locator(".thought-text").is_visible()  # as the reader left it
    assert fold.locator("em").inner_text() == "greet"
    assert fold.locator("summary").inner_text().startswith("Thought for ")
    ask(page, "And?")
    page.wait_for_selector('article:nth-child(4)[data-state="done"]')
    assert server.asked[1]["messages"] == [
        {"role": "user", "content": "Say it."},
        {"role": "assistant", "content": "Good day."},
        {"role": "user", "content": "And?"},
    ]
    assert "greet" not in json.dumps(server.asked)
    page.reload()
    page.wait_for_selector(f"{BODY} p")
    assert page.locator(".thoughts summary").all_inner_texts()[0].startswith("Thought for ")
    assert not page.locator(".thought-text").first.is_visible()


def test_tool_calls_are_shown(page: Page, server: ScriptedPage) -> None:
    rest = {"tool_calls": [{"index": 0, "function": {"arguments": ' "days": 3}'}}]}
    server.script = [*text("I look."), call(0, "weather", '{"city": "<b>",'), rest, call(1, "broken", '{"a": ')]
    ask(page)
    page.wait_for_selector(f'{ANSWER}[data-state="done"]')
    assert page.locator(".call .language").all_inner_texts() == ["Tool call weather", "Tool call broken"]
    assert page.locator(".call code").all_inner_texts() == ['{\n  "city": "<b>",\n  "days": 3\n}', '{"a": ']
    page.wait_for_selector(".call .hl-attr")
    keep_moments(page)
    page.click(".call .copy-code")
    page.wait_for_selector(".call .copy-code[data-copied=true]")
    assert page.evaluate("navigator.clipboard.readText()") == '{\n  "city": "<b>",\n  "days": 3\n}'


def test_a_growing_answer_is_patched(page: Page, server: ScriptedPage) -> None:
    """Finished parts stay the same nodes, no mark stands bare, and the end is as if the answer had come whole."""
    result = page.evaluate(
        """async text => {
            const { Body } = await import('/page/body.js');
            const made = () => {
                const node = document.createElement('div');
                node.className = 'text markdown';
                document.body.append(node);
                return [node, new Body(node)];
            };
            const [whole, at_once] = made();
            const [grown, growing] = made();
            const settled = async body => { while (!body.complete) await new Promise(done => setTimeout(done, 5)); };
            at_once.show(text);
            document.addEventListener('lazy', () => at_once.show(text));
            await settled(at_once);
            const wrong = [];
            let first = null;
            for (let size = 1; size <= text.length; size++) {
                growing.show(text.slice(0, size), true);
                if (size === 60) {
                    first = grown.querySelector('p');
                    getSelection().selectAllChildren(grown.querySelector('h4'));
                }
                // No mark stands bare for a moment: the rows of a table excepted, which begin as a line of text.
                if (/(^|\\n)(#+|```|\\$\\$|---)/.test(grown.textContent)) wrong.push(grown.textContent.slice(-40));
            }
            const selected = String(getSelection());
            const kept = grown.querySelector('p') === first;
            growing.show(text);
            const result = { same: grown.innerHTML === whole.innerHTML, selected, kept, wrong };
            whole.remove();
            grown.remove();
            return result;
        }""",
        MARKDOWN,
    )
    assert result == {"same": True, "selected": "A title", "kept": True, "wrong": []}


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("Text\n-", "Text"),  # not a heading that becomes a list
        ("Text\n```", "Text"),
        ("```python\nx = 1", "python\nCopy\nx = 1"),
        ("See \\(x", "See \\(x"),
        ("$$\nx^2", "$$\nx^2"),
        ("- one\n- ", "one"),
        ("It costs $5", "It costs $5"),
    ],
)
def test_half_an_answer(page: Page, words: str, shown: str) -> None:
    found = page.evaluate(
        """async text => {
            const { Body } = await import('/page/body.js');
            const node = document.createElement('div');
            document.body.append(node);
            const body = new Body(node);
            do {
                body.show('x', true);
                await new Promise(done => setTimeout(done, 5));
            } while (node.classList.contains('plain'));
            body.show(text, true);
            const shown = node.innerText;
            node.remove();
            return shown;
        }""",
        words,
    )
    assert found == shown


def test_colours_can_be_read(page: Page, server: ScriptedPage) -> None:
    """WCAG AA for all words of an answer, in both themes."""
    server.script = [*thought("hm"), *text(MARKDOWN + "\n\n```js\n// c\nconst a = {b: 1, c: `x`}; class D {}\n```")]
    ask(page)
    answered(page)
    page.wait_for_selector(".hl-comment")
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme)  # type: ignore[arg-type]
        low = page.evaluate(
            """() => {
                const luminance = colour => {
                    const [r, g, b] = colour.match(/[\\d.]+/g).slice(0, 3).map(Number).map(v => v / 255)
                        .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
                    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
                };
                const ground = node => {
                    const colour = getComputedStyle(node).backgroundColor;
                    return /, 0\\)/.test(colour) && node.parentElement ? ground(node.parentElement) : colour;
                };
                return [...document.querySelectorAll('#log *')].filter(node => node.textContent).map(node => {
                    const both = [luminance(getComputedStyle(node).color), luminance(ground(node))];
                    return [node.className, (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05)];
                }).filter(([, contrast]) => contrast < 4.5);
            }"""
        )
        assert low == []
    page.emulate_media(color_scheme="light")


def test_wide_answers_scroll_inside_400_pixels(page: Page, server: ScriptedPage) -> None:
    page.set_viewport_size({"width": 400, "height": 800})
    wide = f"| {'w' * 80} | b |\n|---|---|\n| c | d |\n\n```\n{'x ' * 200}\n```\n\n{'y' * 200}\n\n$${'a+' * 90}b$$"
    server.script = [*text(wide), call(0, "n" * 90, json.dumps({"k": "v" * 200}))]
    ask(page)
    answered(page)
    assert page.evaluate("[document.documentElement.scrollWidth, document.body.scrollWidth]") == [400, 400]
    for box in (".table", ".code pre", ".formula.display"):
        assert page.evaluate(f"(e => e.scrollWidth > e.clientWidth)(document.querySelector('{BODY} {box}'))"), box
    page.set_viewport_size({"width": 1280, "height": 720})
