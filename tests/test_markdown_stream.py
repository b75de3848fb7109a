"""Markdown that grows: the same lines however it is cut, nothing lost, and no escape sequence but our own."""

from __future__ import annotations

import io
import os
import pty
import random
import re
import sys
import termios
from collections.abc import Sequence

import pyte
import pytest

from mlx_flash.cli import live_region
from mlx_flash.cli.live_region import LiveRegion, StyledLine
from mlx_flash.cli.markdown_stream import MarkdownStream
from mlx_flash.cli.printable import for_stream, lacks_styles, printable, size_of
from mlx_flash.cli.run import _say_why
from mlx_flash.cli.terminal import say
from mlx_flash.errors import UsageError

WIDTH, HEIGHT = 60, 8
LONG = "a line of code that is wider than the terminal, so that it can be copied as one: " + "x" * 40
TEXT = f"""# Title

Some *text* with `code` and **bold**, [red]brackets[/red], <b>HTML</b>, List<int> and :smile:
in a second line, https://x.y, <https://a.b> and [a link](http://c.d)

- one
- two
  ```python
  def f(x): return x  # a comment that has no room in the width of this narrow terminal
  ```
- three

1. a

2. b
10. c

| a | b |
|---|---|
| 1 | Supercalifragilisticexpialidocious-and-somewhat-longer-than-it-should-be |

```python
def f(x):
    '''doc'''
\treturn "{LONG}"

{"".join(f"x = {number}{chr(10)}" for number in range(2 * HEIGHT))}```

> quoted
> more

<div>
block &#27;[31m &lt;
</div>

![a picture](u.png)

---
The end."""
SGR = re.compile(r"\x1b\[[0-9;]*m")


def pieces(text: str, most: int, seed: int) -> list[str]:
    """The text, cut at random into pieces of 1 to `most` characters."""
    chance, found, place = random.Random(seed), [], 0
    while place < len(text):
        end = place + chance.randint(1, most)
        found.append(text[place:end])
        place = end
    return found


def lines_of(cut: Sequence[str]) -> list[StyledLine]:
    stream, final = MarkdownStream(), []
    for piece in cut:
        stream.add(piece)
        final += stream.lines(WIDTH)[0]
    last, live = stream.lines(WIDTH, ended=True)
    assert live == []
    return final + last


def plain(lines: list[StyledLine]) -> str:
    return "\n".join(SGR.sub("", line.text) for line in lines)


def test_it_is_rendered_and_nothing_is_lost() -> None:
    lines = lines_of([TEXT])
    text = plain(lines)
    assert "\x1b" not in text
    assert text.startswith("Title\n\nSome text with code and bold, [red]brackets[/red],")
    for part in (
        "<b>HTML</b>",
        "List<int>",
        ":smile:",
        "a link (http://c.d)",
        "<div>",
        "�[31m <",
        "![a picture](u.png)",
    ):
        assert part in " ".join(text.split()).replace("( ", "(")
    assert text.count("https://x.y") == text.count("https://a.b") == 1
    assert "return x  # a comment that has no room in the\n   width" in text  # in a list, code is broken into lines
    assert f'    return "{LONG}"\n\nx = 0\n' in text and "\n```python\n" in text
    assert "".join(re.findall(r"[\w-]+", text.partition("Supercali")[2]))[:20] == "fragilisticexpialido"
    assert "longer-than-it-should-be" in "".join(text.split()) and text.endswith("\nThe end.")
    assert "\x1b[1mbold\x1b[0m" in "".join(line.text for line in lines)


@pytest.mark.parametrize("most", [3, 20])
def test_the_lines_do_not_depend_on_how_it_was_cut(most: int) -> None:
    assert lines_of(pieces(TEXT, most, seed=most)) == lines_of([TEXT])


def test_a_number_at_the_end_may_continue_a_list() -> None:
    assert plain(lines_of(["1. a\n\n", "2", ". b\n"])) == plain(lines_of(["1. a\n\n2. b\n"]))


def test_spaces_that_begin_a_line_stay() -> None:
    text = "def f(x):\n    if x:\n\treturn x\n\n    y = 1\n\n- a\n  b\n    c"
    assert plain(lines_of([text])) == "def f(x):\n    if x:\n    return x\n\n    y = 1\n\n • a\n   b\n     c"


def test_the_language_may_come_after_the_fence() -> None:
    assert plain(lines_of(["```", "py", "thon", "\nx", " = 1\n", "``", "`"])) == "```python\nx = 1\n```"


def test_it_continues_in_the_running_block() -> None:
    stream = MarkdownStream()
    stream.resume("One.\n\n```python\nx = 1\ny")
    stream.add(" = 2\n```\nEnd.")
    assert plain(stream.lines(WIDTH, ended=True)[0]) == "```python\nx = 1\ny = 2\n```\n\nEnd."


@pytest.mark.parametrize(
    "text", ["\x1b[2J", "\x1b]0;title\x07", "\x9b31m", "\x1b]8;;http://a\x1b\\b", "a\x08\x7f", "a\rb"]
)
def test_control_characters_become_visible(text: str) -> None:
    assert printable(f"{text}\n\té😀").endswith("\n\té😀")
    shown = "".join(
        line.text for line in lines_of([f"{text}\n\n    {text}\n\n`{text}` **{text}**\n\n```{text}\n{text}\n```"])
    )
    for cleaned in (printable(text), SGR.sub("", shown)):
        assert not [c for c in cleaned if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0]


def test_a_file_gets_the_text_as_it_is_and_a_terminal_what_is_printable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream = io.StringIO()
    assert for_stream("a\x1b[2J", stream) == "a\x1b[2J" and lacks_styles(stream) == "the output is not a terminal"
    monkeypatch.setattr(stream, "isatty", lambda: True)
    assert for_stream("a\x1b[2J", stream) == "a␛[2J"
    for name, value, reason in (("TERM", "dumb", "TERM"), ("TERM", "xterm", None), ("NO_COLOR", "1", "NO_COLOR")):
        monkeypatch.setenv(name, value)
        assert (lacks_styles(stream) or "").partition(" ")[0] == (reason or "")


def test_notes_and_errors_with_names_from_files_are_not_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    say("saved in a\x1b]52;c;eA==\x07.json")
    assert _say_why("mlxflash", UsageError("tensor \x1b]0;x\x07 is not in it")) == UsageError.exit_code
    assert terminal.getvalue() == "saved in a␛]52;c;eA==␇.json\nmlxflash: tensor ␛]0;x␇ is not in it\n"


def test_a_terminal_without_a_size_has_a_usual_one() -> None:
    own, other = pty.openpty()  # of 0 columns and 0 rows
    with os.fdopen(own, "wb"), os.fdopen(other, "r") as terminal:
        assert size_of(terminal) == (80, 24)
        termios.tcsetwinsize(terminal, (50, 100))
        assert size_of(terminal) == (100, 50)


# -- on a screen -------------------------------------------------------------------------------------------------


class _Screen:
    """A terminal with a history, as standard output."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.screen = pyte.HistoryScreen(WIDTH, HEIGHT, history=10_000, ratio=0.5)
        self._stream = pyte.Stream(self.screen)
        self.writes = 0
        monkeypatch.setattr(live_region.sys, "stdout", self)
        monkeypatch.setattr(live_region, "size_of", lambda _: (WIDTH, HEIGHT))

    def write(self, text: str) -> None:
        self.writes += 1
        self._stream.feed(text)

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        return 1

    def lines(self) -> list[str]:
        above = ["".join(row[x].data for x in range(WIDTH)).rstrip() for row in self.screen.history.top]
        return above + [line.rstrip() for line in self.screen.display]


def broken(lines: list[StyledLine]) -> list[str]:
    """The lines as a terminal breaks those that are too long."""
    found: list[str] = []
    for text in plain(lines).split("\n"):
        found += [text[place : place + WIDTH].rstrip() for place in range(0, max(1, len(text)), WIDTH)]
    return found


@pytest.mark.parametrize("most", [3, 11])
def test_every_line_is_on_the_screen_and_in_its_history_once(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _Screen(monkeypatch)
    shown.write(">>> question\r\n")
    region, stream = LiveRegion(), MarkdownStream()
    for piece in pieces(TEXT, most, seed=most):
        stream.add(piece)
        region.draw(*stream.lines(WIDTH))
    region.draw(*stream.lines(WIDTH, ended=True))
    shown.write(">>> ")
    expected = [">>> question", *broken(lines_of([TEXT])), ">>>"]
    assert [line for line in shown.lines() if line] == [line for line in expected if line]


def test_what_is_above_a_tall_block_that_changes_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list is rendered anew with its tenth item, and is taller than the screen."""
    shown = _Screen(monkeypatch)
    region, stream = LiveRegion(), MarkdownStream()
    text = "Before.\n\n" + "".join(f"{number}. item\n" for number in range(1, 3 * HEIGHT))
    for piece in pieces(text, 9, seed=1):
        stream.add(piece)
        region.draw(*stream.lines(WIDTH))
        assert shown.lines().count("Before.") <= 1
    region.draw(*stream.lines(WIDTH, ended=True))
    numbers = [int(line.split()[0]) for line in shown.lines() if line.endswith("item")]
    assert numbers == list(range(1, 3 * HEIGHT)) and shown.lines()[0] == "Before."


def test_only_what_changes_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _Screen(monkeypatch)
    region = LiveRegion()
    one, two, more = (StyledLine(text, len(text)) for text in ("one", "two", "more"))
    region.draw([], [one, two])
    written: list[str] = []
    monkeypatch.setattr(shown, "write", written.append)
    region.draw([], [one, two])
    region.draw([one], [two])
    assert written == []
    region.draw([], [two, more])
    assert "two" not in written[0] and "more" in written[0]


def test_something_else_may_have_moved_the_cursor_down(monkeypatch: pytest.MonkeyPatch) -> None:
    shown = _Screen(monkeypatch)
    below = 0
    region = LiveRegion(lambda: below)
    region.draw([], [StyledLine("half a li", 9)])
    shown.write("\r\nA warning\r\n")
    below = 2
    region.draw([StyledLine("half a line", 11)], [])
    assert [line for line in shown.lines() if line] == ["half a line"]
