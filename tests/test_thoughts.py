"""The thoughts of a model in the terminal and on the page."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_browser import CHROMIUM, WAIT_MS, chromium  # type: ignore[import-not-found]  # found beside this file
from scripted import Scripted, make_scripted  # type: ignore[import-not-found]
from serving import serving  # type: ignore[import-not-found]

from mlx_flash import chat
from mlx_flash.cli.terminal import Interrupts
from mlx_flash.errors import ReadError

SAID = "<think>\nThey greet.\n</think>\n\nGood day."


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scripted(tmp_path_factory.mktemp("scripted"))  # type: ignore[no-any-return]


@pytest.fixture
def scripted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Scripted]:
    scripted = Scripted(folder, monkeypatch)
    scripted.script = lambda prompt: SAID
    yield scripted


def test_the_terminal_separates_thoughts(scripted: Scripted, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = chat.make_parser().parse_args(["--model", str(scripted.folder), "--context", "2048"])
    talk = chat.Chat(arguments)
    try:
        capsys.readouterr()
        assert chat.converse(talk, iter(["hi", "again"]), Interrupts(), False) == 0
        said = capsys.readouterr()
        assert said.out == "Good day.\nGood day.\n"
        assert said.err == "They greet.\n\nThey greet.\n\n"
        assert "<|im_start|>assistant\nGood day.<|im_end|>" in scripted.prompts[1]  # thoughts are not sent back
        talk.settings.set("max-tokens", "5")
        scripted.script = lambda prompt: "<think>\nThey greet and greet"
        chat.converse(talk, iter(["hi"]), Interrupts(), False)
        said = capsys.readouterr()
        assert said.out == "\n" and said.err.startswith("The\n\n")  # cut within the thoughts
    finally:
        talk.close()


def test_an_error_within_the_thoughts_ends_them(
    scripted: Scripted, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted.script = lambda prompt: "<think>\nThey greet and greet"
    talk = chat.Chat(chat.make_parser().parse_args(["--model", str(scripted.folder), "--context", "2048"]))
    real = talk.turns.stream_generate

    def failing(*arguments: Any, **options: Any) -> Iterator[Any]:
        for response in real(*arguments, **options):
            yield response
            if response.generation_tokens == 9:
                raise ReadError("the disk is gone.")

    monkeypatch.setattr(talk.turns, "stream_generate", failing)
    try:
        capsys.readouterr()
        with pytest.raises(ReadError):
            chat.converse(talk, iter(["hi"]), Interrupts(), False)
        assert capsys.readouterr().err == "They gr\n\n"
    finally:
        talk.close()


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="no playwright: pip install playwright")
def test_the_page_folds_thoughts(scripted: Scripted) -> None:
    with serving(scripted.load) as server, chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(server.url)
        page.wait_for_selector('#state[data-state="ready"]')
        for number in (1, 2):
            page.fill("#prompt", "hi")
            page.keyboard.press("Enter")
            article = page.locator("#log article.assistant").nth(number - 1)
            article.locator(".retry").wait_for()
            assert article.locator("> .text").inner_text() == "Good day."
            fold = article.locator("details.thoughts")
            assert fold.locator("summary").inner_text().startswith("Thought for ")
            assert not fold.locator(".thought-text").is_visible()
            fold.locator("summary").click()
            fold.locator(".thought-text").get_by_text("They greet.", exact=True).wait_for()
        assert "They greet" not in scripted.prompts[-1]
        page.reload()
        page.wait_for_selector('#state[data-state="ready"]')
        assert page.locator(".assistant details.thoughts").count() == 2
        scripted.script = lambda prompt: "Plain."
        page.fill("#prompt", "hi")
        page.keyboard.press("Enter")
        page.locator("#log article.assistant").nth(2).locator(".retry").wait_for()
        assert not page.locator(".assistant details.thoughts").nth(2).is_visible()
