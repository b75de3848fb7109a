"""Images on the server's page, in a real browser: chosen, dropped, pasted."""

from __future__ import annotations

import base64
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from page_browser import CHROMIUM, WAIT_MS, chromium, expect, running  # type: ignore[import-not-found]
from vlm_mixtures import make_seeing_mixture  # type: ignore[import-not-found]

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = [
    pytest.mark.vlm,
    pytest.mark.filterwarnings("ignore"),  # other people's
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium"),
    pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="no playwright: pip install playwright"),
]
pytest.importorskip("mlx_vlm")
Image = pytest.importorskip("PIL.Image")

READY = '#state[data-state="ready"]'
DONE = '#log article.assistant:last-child[data-state="done"]'
# Hands files to the page as a drop or a paste does. arguments: [kind, name, base64].
HAND_OVER = """([kind, name, text]) => {
  const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, { type: name.endsWith(".png") ? "image/png" : "text/plain" }));
  const event = kind === "paste"
    ? new ClipboardEvent("paste", { clipboardData: data, bubbles: true, cancelable: true })
    : new DragEvent("drop", { dataTransfer: data, bubbles: true, cancelable: true });
  document.getElementById("prompt").dispatchEvent(event);
}"""

# Whether the images of a message are in the browser's database. They are written after its text.
STORED = """() => new Promise(done => {
  const opening = indexedDB.open("mlx_flash");
  opening.onsuccess = () => {
    const counting = opening.result.transaction("images").objectStore("images").count();
    opening.result.close();
    counting.onsuccess = () => done(counting.result > 0);
  };
})"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_seeing_mixture(tmp_path_factory.mktemp("seeing")))


@pytest.fixture
def page(folder: Path, tmp_path: Path) -> Iterator[Page]:
    with running(tmp_path / "log", "--model", str(folder), "--images", "--context", "300", memory="1GB") as server:
        server.wait()
        with chromium() as browser:
            page = browser.new_page()
            page.set_default_timeout(WAIT_MS)
            page.goto(server.url)
            page.wait_for_selector(READY)
            page.wait_for_function("() => document.getElementById('model').textContent !== '–'")
            yield page


def png(folder: Path, size: tuple[int, int], colour: str) -> Path:
    path = folder / f"{colour}.png"
    Image.new("RGB", size, colour).save(path)
    return path


def asked(page: Page) -> Any:
    """Sends the message, waits for its answer, and returns the content that the page sent."""
    with page.expect_request("**/v1/chat/completions") as sent:
        page.click("#send")
    page.wait_for_selector(DONE)
    body = json.loads(sent.value.post_data or "")
    return body["messages"][-1]["content"]


def test_images_are_chosen_dropped_and_pasted(page: Page, tmp_path: Path) -> None:
    page.set_input_files("#attach-file", png(tmp_path, (30, 40), "red"))
    page.wait_for_selector("#pictures li")  # The page reads files of two actions at the same time.
    for kind, colour in (("drop", "green"), ("paste", "blue")):
        text = base64.b64encode(png(tmp_path, (20, 20), colour).read_bytes()).decode()
        page.evaluate(HAND_OVER, [kind, f"{colour}.png", text])
        page.wait_for_selector(f"#pictures li:nth-child({2 if kind == 'drop' else 3})")
    page.get_by_role("button", name="Remove image 2").click()
    page.evaluate("document.getElementById('settings').open = true")
    page.fill("input[name=max_tokens]", "8")  # A random model's answer must leave room for the next question.
    page.fill("#prompt", "what")
    content = asked(page)
    kinds = [part["type"] for part in content]
    assert kinds == ["image_url", "image_url", "text"] and content[2]["text"] == "what"
    red = base64.b64encode((tmp_path / "red.png").read_bytes()).decode()
    assert content[0]["image_url"]["url"] == f"data:image/png;base64,{red}"
    assert page.locator("#log article.user img").count() == 2
    assert page.locator("#pictures li").count() == 0
    page.fill("#prompt", "and")  # the images are sent again with their turn
    assert asked(page) == "and"
    page.wait_for_function(STORED)
    page.reload()
    page.wait_for_selector(READY)
    expect(page.locator("#log article.user img")).to_have_count(2)


def test_a_large_image_is_scaled_down_and_stands_beside_a_text(page: Page, tmp_path: Path) -> None:
    page.set_input_files("#attach-file", png(tmp_path, (3000, 2000), "red"))
    page.wait_for_selector("#pictures li")
    for name, text in (("broken.png", b"no image"), ("note.txt", b"A note.")):
        page.evaluate(HAND_OVER, ["drop", name, base64.b64encode(text).decode()])
        note = "broken.png is not an image that this browser reads." if name == "broken.png" else ""
        page.wait_for_function("note => document.getElementById('attach-note').textContent === note", arg=note)
    page.wait_for_selector("#files li")
    content = asked(page)  # without a question
    assert [part["type"] for part in content] == ["image_url", "text"]
    assert content[1]["text"] == "note.txt:\n```\nA note.\n```"
    head, data = content[0]["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    sent = tmp_path / "sent.jpg"
    sent.write_bytes(base64.b64decode(data))
    width, height = Image.open(sent).size
    assert width * height <= 1 << 20 and abs(width / height - 1.5) < 0.01


def test_a_model_that_reads_no_images(folder: Path, tmp_path: Path) -> None:
    with running(tmp_path / "log", "--model", str(folder), "--context", "300", memory="1GB") as server:
        server.wait()
        with chromium() as browser:
            page = browser.new_page()
            page.set_default_timeout(WAIT_MS)
            page.goto(server.url)
            page.wait_for_selector(READY)
            page.wait_for_function("document.getElementById('model').textContent !== '–'")
            text = base64.b64encode(png(tmp_path, (20, 20), "red").read_bytes()).decode()
            page.evaluate(HAND_OVER, ["paste", "red.png", text])
            page.wait_for_function(
                "() => document.getElementById('attach-note').textContent.includes('reads no images')"
            )
