"""The commands of a chat, typed into a pseudo-terminal, with a model that says what a test has written."""

from __future__ import annotations

import io
import json
import os
import pty
import readline
import stat
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyte
import pytest
from pseudo_terminal import PseudoTerminal  # type: ignore[import-not-found]  # found beside this file
from scripted import Scripted, make_scripted  # type: ignore[import-not-found]

from mlx_flash import chat
from mlx_flash.cli import completion, text_file
from mlx_flash.cli.answer_view import DIM, UNDIM
from mlx_flash.cli.chat_settings import ABOUT, ChatSettings
from mlx_flash.cli.command_list import COMMANDS, HELP, nearest
from mlx_flash.cli.run import run_command
from mlx_flash.cli.saved_chat import SavedChat, read_chat, write_chat
from mlx_flash.cli.terminal import keys_unseen
from mlx_flash.errors import UsageError
from mlx_flash.text.conversation import Turn
from mlx_flash.text.generation_config import GenerationConfig

READY = ">>> "
WIDTH = 1000  # of the screen that tests look at; longer than every line
GNU = "libedit" not in (readline.__doc__ or "")
ANSWERS = [
    ["list", "Two **things**:\n\n- [red]one[/red]\n- two"],
    ["think", "<think>\nIt is *so*.\n</think>\n\nYes."],
    ["attack", "a\x1b[2Jb\x1b]0;title\x07c <think>"],
    ["prompt", "```\nPROMPT\n```"],
    ["count", "1 2 3"],
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scripted(tmp_path_factory.mktemp("scripted"))  # type: ignore[no-any-return]


@pytest.fixture
def start(folder: Path, tmp_path: Path) -> Iterator[Callable[..., PseudoTerminal]]:
    terminals: list[PseudoTerminal] = []

    def start(*flags: str, **variables: str) -> PseudoTerminal:
        answers = tmp_path / "answers.json"
        answers.write_text(json.dumps(ANSWERS))
        program = [str(Path(__file__).with_name("scripted_chat.py")), str(answers)]
        usual = ("--model", str(folder), "--context", "4096", "--max-tokens", "1000")
        settings = {"VISUAL": "", "EDITOR": "", "NO_COLOR": "", **variables}
        terminal = PseudoTerminal(*program, *usual, *flags, cache=tmp_path / "cache", **settings)
        terminals.append(terminal)
        terminal.until(READY)
        return terminal

    yield start
    for terminal in terminals:
        terminal.close()


def ask(terminal: PseudoTerminal, line: str, until: str = READY) -> str:
    """Types the line and returns what the screen shows between it and the next prompt."""
    before = len(terminal.raw)
    terminal.type(f"{line}\n")
    terminal.until(f"{line}\n")
    return after(terminal, before, 1, until)


def after(terminal: PseudoTerminal, before: int, rows: int, until: str = READY) -> str:
    """What the screen shows below what was typed. before: the length of `raw` then. rows: those of what was typed."""
    terminal.until(until)
    screen = pyte.Screen(WIDTH, 50)
    pyte.Stream(screen).feed(terminal.raw[before:])
    return "".join(f"{row.rstrip()}\n" for row in screen.display[rows:]).rstrip("\n").removesuffix(until.rstrip())


def prompt_of(shown: str) -> str:
    """The beginning and the end of the prompt, in an answer to a question about it."""
    return str(json.loads(shown.strip().removeprefix("```\n").partition("\n")[0]))


def last_of(path: Path) -> dict[str, str]:
    return json.loads(path.read_text())["chats"][0]["messages"][-1]  # type: ignore[no-any-return]


# -- in a terminal -----------------------------------------------------------------------------------------------


def test_a_conversation_with_commands(start: Callable[..., PseudoTerminal], tmp_path: Path) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\nsed "s/list/count/" "$1" > "$1.new"; mv "$1.new" "$1"\n')
    editor.chmod(0o700)
    terminal = start(EDITOR=str(editor))

    # Nothing was said yet.
    assert "there is no question to answer again" in ask(terminal, "/retry")
    assert "there is no answer yet" in ask(terminal, "/continue")
    assert "there is nothing to save" in ask(terminal, f"/save {tmp_path}/a.json")
    assert "did you mean /quit?" in ask(terminal, "/exit")

    # Markdown, whose last state is what stays.
    shown = ask(terminal, "a list")
    assert shown.endswith("Two things:\n\n • [red]one[/red]\n • two\n")
    assert "\x1b[1mthings\x1b[0m" in terminal.raw
    assert "the temperature is 0, so the answer will be the same" in (again := ask(terminal, "/retry"))
    assert again.endswith(" • two\n")
    assert ask(terminal, "/edit").endswith("1 2 3\n")  # "a list" became "a count" in the editor, and "a list" is gone
    assert "1 turn," in ask(terminal, "/memory")

    # Thoughts are dimmed.
    shown = ask(terminal, "think")
    assert "It is *so*.\n\n" in shown and shown.endswith("Yes.\n")
    assert terminal.raw.index(DIM) < terminal.raw.index(UNDIM)
    ask(terminal, "/set thoughts off")
    shown = ask(terminal, "think")
    assert "It is" not in shown and shown.endswith("Yes.\n")

    # The model's escape sequences are characters.
    before = len(terminal.raw)
    assert "a␛[2Jb␛]0;title␇c" in ask(terminal, "attack")
    assert "\x1b[2J" not in terminal.raw[before:] and "\x07" not in terminal.raw[before:]

    # A system message, several lines, and a file.
    assert "the conversation continues, and is read again" in ask(terminal, "/system Be brief.")
    assert ask(terminal, "/system") == "Be brief.\n"
    notes = tmp_path / "my notes.txt"
    notes.write_text("alpha\n```\nbeta")
    assert "my notes.txt (14 tokens) goes before your next message" in ask(terminal, f"/file {tmp_path}/my notes.txt")
    terminal.type('"""\n')
    for line in ("the", "  prompt"):
        terminal.until("... ")
        terminal.type(f"{line}\n")
    terminal.until("... ")
    prompt = prompt_of(ask(terminal, '"""'))
    assert prompt.startswith("<|im_start|>system\nBe brief.")
    assert "user\nmy notes.txt:\n````\nalpha\n```\nbeta\n````\n\nthe\n  prompt<|im_end|>" in prompt
    terminal.type("the \\\n")
    terminal.until("... ")
    assert "user\nthe \nprompt<|im_end|>" in prompt_of(ask(terminal, "prompt"))
    if GNU:
        before = len(terminal.raw)
        terminal.press_at_prompt("the\x1b\rpro\tmpt\n")  # Tab completes nothing in a question.
        assert "user\nthe\nprompt<|im_end|>" in prompt_of(after(terminal, before, 2))
    ask(terminal, "/system off")
    assert prompt_of(ask(terminal, "prompt")).startswith("<|im_start|>user\na count")

    # An answer that is cut continues where it was.
    assert "max-tokens         2 " in ask(terminal, "/set max-tokens 2")
    assert "/continue continues this one" in (shown := ask(terminal, "the list"))
    ask(terminal, "/set max-tokens default")
    saved = tmp_path / "saved chat.json"
    ask(terminal, "/continue")
    assert " turns saved in" in ask(terminal, f"/save {saved}")
    assert last_of(saved)["content"] == "Tw" + ANSWERS[0][1]  # the scripted model begins again
    assert "the last answer is complete" in ask(terminal, "/continue")

    # Files are not replaced without a question, and a conversation is continued from its file.
    assert stat.S_IMODE(saved.stat().st_mode) == 0o600
    content = saved.read_bytes()
    ask(terminal, "count")
    terminal.type(f"/save {saved}\n")
    terminal.until("Replace it? [y/N] ")
    terminal.type("n\n")
    assert "nothing was saved" in terminal.until(READY) and saved.read_bytes() == content
    terminal.type(f"/load {saved}\n")
    terminal.until("is not saved. Replace it? [y/N] ")
    terminal.type("y\n")
    assert "turns loaded" in terminal.until(READY)
    if GNU:
        terminal.press_at_prompt(f"/loa\t{tmp_path}/saved\t\n")  # commands and paths are completed
        terminal.until(f"/load {saved}\n")
        assert "turns loaded" in terminal.until(READY)
    assert "a list" not in (prompt := prompt_of(ask(terminal, "prompt"))) and "<|im_start|>user\na count" in prompt
    terminal.type("/quit\n")
    assert terminal.ended()[0] == 0


def test_without_colour_it_is_plain_text(start: Callable[..., PseudoTerminal]) -> None:
    terminal = start("--temp", "0.5", NO_COLOR="1")
    assert ask(terminal, "a list") == f"{ANSWERS[0][1]}\n"
    assert ask(terminal, "think") == "It is *so*.\n\nYes.\n" and DIM not in terminal.raw
    assert "a␛[2Jb␛]0;title␇c" in ask(terminal, "attack")  # without Markdown too
    table = ask(terminal, "/set")
    assert "temperature        0.5     --temp " in table and "markdown           off     NO_COLOR is set" in table
    assert "Markdown cannot be shown: NO_COLOR is set." in ask(terminal, "/set markdown on")
    assert "seed               7       /set " in ask(terminal, "/set se 7")
    assert "seed               7       /set " in ask(terminal, "/set seed")
    assert "a seed is set, so the answer may be the same" in ask(terminal, "/retry")
    if GNU:
        terminal.type("/edit\n")  # on the line, since no editor is named
        terminal.until(f"{READY}attack")
        assert ask(terminal, " list") == f"{ANSWERS[0][1]}\n"
    terminal.type("/quit\n")
    assert terminal.ended()[0] == 0


def test_keys_are_not_shown_while_an_answer_is(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = pty.openpty()
    with os.fdopen(own, "wb"), os.fdopen(other, "r") as terminal:
        monkeypatch.setattr(sys, "stdin", terminal)
        for _ in range(2):
            assert termios.tcgetattr(terminal)[3] & termios.ECHO
            with keys_unseen():
                assert not termios.tcgetattr(terminal)[3] & termios.ECHO
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    with keys_unseen():
        pass


# -- through a pipe ----------------------------------------------------------------------------------------------


def _said_through_a_pipe(asked: str) -> str:
    return "<think>\nIt is *so*.\n</think>\n\nYes." if "think" in asked else "**Yes**\x1b[2J"


@pytest.fixture
def run(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process, with lines as its input: (exit code, standard output, standard error)."""

    def run(*lines: str, template: bool = True) -> tuple[int, str, str]:
        scripted = Scripted(folder, monkeypatch)
        scripted.script = lambda prompt: _said_through_a_pipe(prompt.rpartition("user")[2])
        text = "".join(f"{line}\n" for line in lines).encode()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        flags = [] if template else ["--ignore-chat-template"]
        monkeypatch.setattr(sys, "argv", ["chat", "--model", str(folder), "--context", "2048", *flags])
        with pytest.raises(SystemExit) as caught:
            run_command(chat.make_parser(), chat.main)
        assert isinstance(caught.value.code, int)
        return caught.value.code, *capsys.readouterr()

    return run


def test_a_pipe_gets_the_text_as_it_is_and_is_never_asked(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    code, out, err = run(
        "think", "/edit", f"/save {path}", "hi", f"/save {path}", f"/load {path}", "/retry", "hi", "/set"
    )
    assert out == "Yes.\n**Yes**\x1b[2J\nYes.\n**Yes**\x1b[2J\n"
    assert "/edit needs a terminal" in err and f"{path} exists and is not replaced" in err and code == 2
    assert "markdown           off     the output is not a terminal" in err
    assert read_chat(path) == SavedChat(None, [Turn("think", "Yes.", [], (), "It is *so*.")])


def test_without_a_template(run: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_chat(path, "Be brief.", [Turn("One", "two", [])], "model")
    code, out, err = run("/system Be", f"/load {path}", "hi", "/retry", template=False)
    assert out == "**Yes**\x1b[2J\n" * 2 and code == 2
    assert "has no place for a system message" in err and "its system message is not used" in err


def test_a_question_that_is_refused_is_kept(run: Callable[..., Any], tmp_path: Path) -> None:
    file = tmp_path / "file.txt"
    file.write_text("x" * 1500)
    code, out, err = run("hi", f"/file {file}", "y" * 1500, "/retry", "/file off", "hi")
    assert out == "**Yes**\x1b[2J\n" * 2 and code == 2
    assert err.count("the question makes a prompt of") == 2


# -- parts -------------------------------------------------------------------------------------------------------


def test_a_saved_conversation_is_read_again(tmp_path: Path) -> None:
    path, turns = tmp_path / "a.json", [Turn("Hi\n" + "x" * 99, "Yo 😀", [], (), "hm"), Turn("So?", "", [])]
    write_chat(path, None, turns, "model")
    assert read_chat(path) == SavedChat(None, turns) and [*tmp_path.iterdir()] == [path]
    form = json.loads(path.read_text())
    chat_ = form["chats"][0]
    assert (form["format"], form["version"], chat_["title"], chat_["system"]) == ("mlx_flash chats", 1, "Hi", "")
    # As the page writes it: with a system message, files, an image, and a question that was asked again.
    question = {**chat_["messages"][2], "files": [{"name": "a.py", "text": "x = 1"}], "images": ["data:"]}
    other = {**question, "id": "other", "content": "Or?"}
    chat_.update(system="Be", leaf=question["id"], named=True, messages=[*chat_["messages"][:2], question, other])
    path.write_text(json.dumps(form))
    assert read_chat(path) == SavedChat("Be", turns[:1], "a.py:\n```py\nx = 1\n```\n\nSo?", 1)
    with pytest.raises(OSError):
        write_chat(tmp_path / "none" / "a.json", None, turns, "model")


HI = {"id": "1", "parent": None, "role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "it is not JSON"),
        ("[" * 100_000, "it is not JSON"),
        (b"\xff\xfe", "it is not JSON"),
        ("[]", 'expected "format": "mlx_flash chats"'),
        ({"format": "other"}, 'expected "format": "mlx_flash chats"'),
        ({"version": 2}, "has version 2 of the form, expected 1"),
        ({"chats": None}, "has no list of chats, expected one"),
        ({"chats": [{}, {}]}, "has 2 chats, expected one"),
        ({"chats": [{"system": ["x"]}]}, "its system message is not a text"),
        ({"chats": [{}]}, "expected a list of messages"),
        ({"chats": [{"messages": ["x"]}]}, "expected a list of messages"),
        ({"chats": [{"messages": [{**HI, "parent": "1"}]}]}, "expected a list of messages"),
        ({"chats": [{"messages": [HI, HI]}]}, "expected a list of messages"),
        ({"chats": [{"messages": [HI], "leaf": "2"}]}, "which message is the last"),
        ({"chats": [{"messages": [{**HI, "content": 1}], "leaf": "1"}]}, "message 1 is not a text"),
        ({"chats": [{"messages": [{**HI, "content": "\ud800"}], "leaf": "1"}]}, "message 1 is not a text"),
        ({"chats": [{"messages": [{**HI, "files": [1]}], "leaf": "1"}]}, "message 1 is not a text"),
        ({"chats": [{"messages": [{**HI, "files": [{"name": "x"}]}], "leaf": "1"}]}, "message 1 is not a text"),
        ({"chats": [{"messages": [{**HI, "role": "assistant"}], "leaf": "1"}]}, "message 1: the role is 'assistant'"),
        (
            {"chats": [{"messages": [HI, {**HI, "id": "2", "parent": "1"}], "leaf": "2"}]},
            "message 2: the role is 'user'",
        ),
    ],
)
def test_a_file_that_is_not_a_conversation(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "a.json"
    if isinstance(content, dict):
        content = json.dumps({"format": "mlx_flash chats", "version": 1, "chats": [], **content})
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=r"a\.json") as refused:
        read_chat(path)
    assert message in str(refused.value)


def test_files_that_cannot_go_with_a_question(tmp_path: Path, tokenizer: Any) -> None:
    for name, content in {
        "zero.txt": b"a\0b",
        "bin.txt": b"\xff\xfea",
        "big.txt": b"x " * 400,
        "huge.txt": b"x" * 9999,
        "empty.txt": b"\n",
    }.items():
        (tmp_path / name).write_bytes(content)
    for name, message in {
        "zero.txt": "it has zero bytes",
        "bin.txt": "byte 0 is not UTF-8",
        "big.txt": "more tokens than the context's 64",
        "huge.txt": "more tokens than the context's 64",
        "empty.txt": "is empty",
        "none.txt": "No such file",
        ".": "is not a file",
    }.items():
        with pytest.raises(UsageError, match=message):
            text_file.fenced(tmp_path / name, tokenizer, 64)
    (tmp_path / "bom.py").write_bytes("\ufeffx = 1".encode())
    assert text_file.fenced(tmp_path / "bom.py", tokenizer, 64)[0] == "bom.py:\n```py\nx = 1\n```"


def test_paths_as_they_are_typed_and_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a b").mkdir()
    for typed in ("~/a b", f"{tmp_path}/a b", f"'{tmp_path}/a b'", f"{tmp_path}/a\\ b"):
        assert text_file.path_of(typed) == tmp_path / "a b"
    assert text_file.path_of("it's") == Path("it's")


def test_completions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my docs").mkdir()
    (tmp_path / "my file").touch()
    (tmp_path / ".hidden").touch()
    assert completion.completions("/s") == ["/system ", "/set ", "/save ", "/stats"]
    assert completion.completions("/file ~/my") == ["/file ~/my docs/", "/file ~/my file"]
    assert completion.completions(f"/load {tmp_path}/.h") == [f"/load {tmp_path}/.hidden"]
    assert completion.completions("/set m") == ["/set min-p ", "/set max-tokens ", "/set markdown "]
    assert completion.completions("/set markdown o") == ["/set markdown on", "/set markdown off"]
    for line in ("", "a question", "/file ~/none/", "/retry ", "/set seed 4", "/nothing"):
        assert completion.completions(line) == []


def test_settings_and_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = chat.make_parser().parse_args(["--top-p", "0.9"])
    settings = ChatSettings(arguments, GenerationConfig(sampling={"temperature": 0.6, "top_p": 0.5}), template=False)
    rows = dict(line.split(maxsplit=1) for line in settings.table().splitlines())
    assert rows["temperature"].startswith("0.6     the model ") and rows["top-p"].startswith("0.9     --top-p ")
    assert rows["repetition-penalty"].startswith("1 ")
    assert rows["markdown"].startswith("off     the model has no chat template")
    assert {*rows} == {*ABOUT, "setting"}
    values = {"temperature": "0", "top-p": "1", "top-k": "5", "min-p": "0.1", "repetition-penalty": "1.1"}
    values |= {"presence-penalty": "-1", "frequency-penalty": "1", "seed": "3", "max-tokens": "9"}
    for name, value in values.items():
        assert "/set" in settings.set(name, value)
        for wrong in ("nan", "-9", "x", ""):
            with pytest.raises(UsageError, match=f"{name} is .*, expected "):
                settings.set(name, wrong)
    found = {name: getattr(settings.sampling, name.replace("-", "_")) for name in values if name != "max-tokens"}
    assert found == {name: float(value) for name, value in values.items() if name != "max-tokens"}
    assert settings.max_tokens == 9
    settings.set("seed", "random")
    settings.set("temperature", "default")
    assert settings.sampling.seed is None and settings.sampling.temperature == 0.6
    for name, hint in {
        "temprature": "did you mean temperature?",
        "m": "min-p or max-tokens or markdown",
        "x": "/set lists",
    }.items():
        with pytest.raises(UsageError, match="there is no setting") as refused:
            settings.set(name, "1")
        assert hint in str(refused.value)
    with pytest.raises(UsageError, match="expected on or off"):
        settings.set("thoughts", "yes")


def test_the_nearest_command() -> None:
    assert nearest("/rety") == "/retry" and nearest("/bye") == "/quit" and nearest("/xyz") is None
    assert {found for name in ("/clear", "/temp", "/?") if (found := nearest(name))} <= {*COMMANDS}


def test_the_help_keeps_commands_apart_from_what_they_do() -> None:
    for name, command in COMMANDS.items():
        assert f"{name} {command.argument}".rstrip() + " " in HELP
