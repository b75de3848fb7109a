"""python -m mlx_flash.chat in a pseudo-terminal and through pipes, with the packaged demo model and faster ones."""

from __future__ import annotations

import io
import json
import re
import readline
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import change_manifest, write_tokenizer  # type: ignore[import-not-found]
from pseudo_terminal import CTRL_C, CTRL_D, UP, PseudoTerminal  # type: ignore[import-not-found]
from tiny import make_checkpoint  # type: ignore[import-not-found]

from mlx_flash import chat
from mlx_flash.cli.answer_view import AnswerView
from mlx_flash.cli.run import run_command
from mlx_flash.cli.terminal import Interrupts
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.errors import ChatTemplateError, FlashError, UsageError
from mlx_flash.loading.load import load
from mlx_flash.source.resolve import find_store
from mlx_flash.text.conversation import Conversation
from mlx_flash.text.generation import encode_prompt, stream_generate
from mlx_flash.text.prompt_cache import ReusedPromptCache
from mlx_flash.text.tokenizer import load_tokenizer

PYTHON_M = ("-m", "mlx_flash.chat")
READY = ">>> "
QUESTIONS = ("It was a dark night, and", "The captain", "Then they")


@pytest.fixture(scope="module")
def demo() -> Path:
    return find_store(None)


@pytest.fixture
def start(speaker: Path, tmp_path: Path) -> Iterator[Callable[..., PseudoTerminal]]:
    terminals: list[PseudoTerminal] = []

    def start(*arguments: str, model: Path = speaker) -> PseudoTerminal:
        terminal = PseudoTerminal(*PYTHON_M, "--model", str(model), *arguments, cache=tmp_path / "cache")
        terminals.append(terminal)
        terminal.until(READY)
        return terminal

    yield start
    for terminal in terminals:
        terminal.close()


def ask(terminal: PseudoTerminal, line: str) -> str:
    """Types the line and returns the output up to the next prompt."""
    terminal.type(f"{line}\n")
    terminal.until(f"{line}\n")
    return str(terminal.until(READY)).removesuffix(READY)


@pytest.fixture(scope="module")
def answers(speaker: Path) -> list[str]:
    """The answers to QUESTIONS in one conversation, of 24 tokens each."""
    model, tokenizer = load(speaker)
    turns, ids, texts = ReusedPromptCache(model), list[int](), []
    for question in QUESTIONS:
        ids += tokenizer.encode(f" {question}", add_special_tokens=False) if ids else encode_prompt(tokenizer, question)
        made = list(turns.stream_generate(tokenizer, ids, 24))
        ids += [response.token for response in made]
        texts.append("".join(response.text for response in made))
    first = list(stream_generate(model, tokenizer, QUESTIONS[0], 24))  # as `generate` answers it
    model.flash.close()
    assert texts[0] == "".join(response.text for response in first)
    assert len(set(texts)) == 3 and all(len(text) > 20 for text in texts)
    return texts


# -- in a terminal -------------------------------------------------------------------------------------------


# A command takes two seconds of processor time to start, so one terminal serves a whole conversation.


def test_answers_go_on_from_each_other_until_they_are_forgotten(
    start: Callable[..., PseudoTerminal], answers: list[str]
) -> None:
    terminal = start("--max-tokens", "24", "--memory", "1GB")
    for number, (question, answer) in enumerate(zip(QUESTIONS, answers, strict=True)):
        note = "note: answers end after 24 tokens (/set max-tokens N); /continue continues this one\n"  # printed once
        assert ask(terminal, question) == f"{answer}\n" + (note if number == 0 else "")
    statistics = ask(terminal, "/stats")
    assert "last answer: 24 tokens" in statistics and "total of 3 answers: 72 tokens" in statistics
    assert "3 turns" in statistics
    assert "forgotten" in ask(terminal, "/reset")
    assert "0 turns, 0 of 512 tokens" in ask(terminal, "/memory")
    assert ask(terminal, QUESTIONS[0]).startswith(answers[0])

    # Another budget keeps the conversation.
    assert re.search(r"total .* of 2\.000 GB", ask(terminal, "/memory 2GB"))
    now = ask(terminal, "/memory")
    assert "of 2.000 GB" in now and "1 turn, 0 of 512 tokens" in now
    refused = ask(terminal, "/memory 1MB")
    assert "this model needs at least" in refused and "of 2.000 GB" in refused
    assert re.search(r"Give more \(/memory \d+MB\)", refused)
    assert "Traceback" not in refused
    assert len(ask(terminal, QUESTIONS[1])) > 20
    held = re.search(r"2 turns, (\d+) of 512 tokens", ask(terminal, "/memory"))
    assert held is not None and int(held[1]) > 48  # the first turn was read again
    terminal.type("/quit\n")
    assert terminal.ended()[0] == 0


def test_the_prompt_commands_and_the_history(start: Callable[..., PseudoTerminal], demo: Path, tmp_path: Path) -> None:
    terminal = start("--max-tokens", "5", model=demo)
    # Ctrl-C at the prompt drops the line, and the program continues.
    terminal.press_at_prompt(CTRL_C)
    assert "/quit or Ctrl-D leaves the program" in terminal.until(READY)
    terminal.type("half a line")
    terminal.until("half a line")
    terminal.press_at_prompt(CTRL_C)
    shown = terminal.until(READY)
    assert "Traceback" not in shown
    if "libedit" not in (readline.__doc__ or ""):  # libedit forgets typed lines
        assert "/quit" not in shown
    assert "0 turns" in ask(terminal, "/memory")

    listed = ask(terminal, "/help")
    assert all(name in listed for name in ("/reset", "/stats", "/memory 6GB", "/help", "/quit", "Ctrl-C"))
    assert "no answers yet" in ask(terminal, "/stats")
    assert ask(terminal, "") == "" and ask(terminal, "  ") == ""
    assert "there is no command /rest; did you mean /reset? /help lists them" in ask(terminal, "/rest")
    assert "/reset takes no argument" in ask(terminal, "/reset now")
    assert "/memory takes one size" in ask(terminal, "/memory 6 GB")
    assert "memory is 'lots', expected a number with a unit" in ask(terminal, "/memory lots")
    assert len(ask(terminal, " /usr is a folder")) > 2  # not a command
    statistics = ask(terminal, "/stats")
    for part in (
        r"last answer: 5 tokens in [\d.]+ s, [\d.]+ tokens-per-sec; to the first token: [\d.]+ s",
        r"Streaming \(shadow\): [\d.]+% hits, [\d.]+ MB and [\d.]+ reads per token",
        r"Time per token: [\d.]+ ms waiting for reads, [\d.]+ ms cache management, [\d.]+ ms compute",
        r"total of one answer: 5 tokens",
        r"now: [\d.]+ GB of [\d.]+ GB, peak [\d.]+ GB; 1 turn, \d+ of 512 tokens of context",
        r"plan: [\d.]+ GB, slots for 100% of the blocks of each layer's neurons",
    ):
        assert re.search(part, statistics), part
    memory = ask(terminal, "/memory")
    assert "memory plan\n  process" in memory and "KV cache" in memory and "1 turn, " in memory

    # The history is saved for the next program.
    ask(terminal, "A line to remember")
    ask(terminal, "/help")
    ask(terminal, "/help")  # only once in the history
    terminal.type(CTRL_D)
    assert terminal.ended()[0] == 0
    path = tmp_path / "cache" / "chat-history"
    assert path.read_text().splitlines() == [
        *("/memory", "/help", "/stats", "/rest", "/reset now", "/memory 6 GB", "/memory lots", " /usr is a folder"),
        *("/stats", "/memory", "A line to remember", "/help"),
    ]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    terminal = start("--max-tokens", "2")
    terminal.press_at_prompt(UP)
    terminal.until("/help")
    terminal.press_at_prompt(UP)
    terminal.until("A line to remember")
    terminal.type("\n")
    terminal.until(READY)
    assert "1 turn" in ask(terminal, "/memory")

    # SIGTERM ends it at once and silently.
    terminal.let_wait()
    terminal.process.terminate()
    code, shown = terminal.ended()
    assert code == 143 and "Traceback" not in shown


@pytest.fixture(scope="module")
def long_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("long")
    checkpoint = make_checkpoint(folder / "checkpoint", positions=8192, neurons=1024)
    write_tokenizer(checkpoint)
    convert(checkpoint, folder / "store", Settings(calibration_tokens=128))
    return folder / "store"


def test_ctrl_c_stops_a_long_prompt_and_a_long_answer(start: Callable[..., PseudoTerminal], long_store: Path) -> None:
    terminal = start("--context", "8192", "--max-tokens", "8000", model=long_store)
    question = "All work and no play. " * 350
    terminal.type(f"{question}\n")
    terminal.until("\n")
    terminal.press(CTRL_C)
    assert "stopped while reading the prompt; your question was dropped" in terminal.until(READY)
    now = ask(terminal, "/memory")
    assert "0 turns" in now
    read = re.search(r"(\d+) of 8192 tokens", now)
    assert read is not None and int(read[1]) < len(question)

    terminal.type("Once\n")
    terminal.until("Once\n")
    terminal.until_something()  # long before the answer's end, because it streams
    terminal.type(CTRL_C)
    assert terminal.until(READY).endswith(f"\nstopped\n{READY}")
    statistics = ask(terminal, "/stats")
    made = re.search(r"last answer: (\d+) tokens", statistics)
    assert made is not None and int(made[1]) < 8000 and "1 turn" in statistics  # the partial answer is kept
    assert "1 turn," in ask(terminal, "/memory")
    assert "forgotten" in ask(terminal, "/reset")


def test_the_third_ctrl_c_insists(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)
    with Interrupts("once more") as interrupts:
        for _ in range(2):
            for warned in ("", "\nonce more\n"):
                signal.raise_signal(signal.SIGINT)
                assert interrupts.asked and capfd.readouterr().err == warned
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
            interrupts.renew()
            assert not interrupts.asked
        with pytest.raises(KeyboardInterrupt), interrupts.raising():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert interrupts.asked
    assert signal.getsignal(signal.SIGINT) is before


def test_a_full_context_drops_the_oldest_turns(start: Callable[..., PseudoTerminal]) -> None:
    terminal = start("--context", "64", "--max-tokens", "30")
    said = ""
    for question in QUESTIONS:
        said += ask(terminal, question)
    dropped = re.findall(
        r"context of 64 tokens is full: dropped the oldest (\d+) turns? \((\d+) tokens\), kept (\d+) turns?",
        said,
    )
    assert dropped and all(int(count) and int(tokens) for count, tokens, _ in dropped)
    assert "is full, so the answer ends here. The next question drops the oldest turns" in said
    assert "A larger --context makes more room, up to" in said
    assert "the plan has room for 64, answer included" in ask(terminal, "word " * 80)
    assert len(ask(terminal, "And then")) > 5


def test_an_error_in_the_middle_of_an_answer_begins_a_line(capfd: pytest.CaptureFixture[str]) -> None:
    for said in ("", "The captain"):
        view = AnswerView(None)
        with pytest.raises(FlashError), view:
            view.add(said)
            raise FlashError("the disk has gone.")
        assert capfd.readouterr().out == (f"{said}\n" if said else "")


# -- through pipes -------------------------------------------------------------------------------------------


def piped(model: Path, text: bytes, *arguments: str, redirect: str = "") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, *PYTHON_M, "--model", str(model), "--max-tokens", "24", *arguments]
    shell = ["bash", "-c", f'"$@" {redirect}', "bash", *command] if redirect else command
    return subprocess.run(shell, input=text, capture_output=True, timeout=600)


def test_lines_from_a_pipe(speaker: Path, answers: list[str]) -> None:
    done = piped(speaker, "\n\n".join(QUESTIONS).encode())
    assert done.returncode == 0 and done.stdout.decode() == "".join(f"{answer}\n" for answer in answers)
    assert b"memory plan" in done.stderr and b"form one continuous text" in done.stderr


@pytest.fixture
def run(
    speaker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Runs the command in this process. Returns (exit code, standard output, standard error)."""

    def run(text: bytes, *arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text), encoding="utf-8"))
        monkeypatch.setattr(sys, "argv", ["chat", "--model", str(speaker), "--max-tokens", "24", *arguments])
        with pytest.raises(SystemExit) as caught:
            run_command(chat.make_parser(), chat.main)
        assert isinstance(caught.value.code, int)
        return caught.value.code, *capsys.readouterr()

    return run


def test_what_cannot_be_used_in_a_pipe_is_told_by_the_exit_code(run: Callable[..., Any], answers: list[str]) -> None:
    code, output, error = run(b"/stats\n/nothing\n\xff\xfe\n" + QUESTIONS[0].encode() + b"\n/quit\nnot read\n")
    assert output == f"{answers[0]}\n"
    assert "there is no command /nothing" in error and "not valid UTF-8" in error
    assert code == 2 and "Traceback" not in error


@pytest.mark.parametrize(("redirect", "code"), [(">&-", 0), ("<&-", 0), ("| head -c 1; exit ${PIPESTATUS[0]}", 1)])
def test_closed_ends(speaker: Path, redirect: str, code: int) -> None:
    done = piped(speaker, QUESTIONS[0].encode(), redirect=redirect)
    assert done.returncode == code, done.stderr
    assert len(done.stdout) <= 1 and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--max-tokens", "0"), "--max-tokens is 0"),
        (("--memory", "1MB"), "this model needs at least"),
        (("--question", "x"), "unrecognized arguments"),
    ],
)
def test_usage(run: Callable[..., Any], arguments: tuple[str, ...], message: str) -> None:
    code, output, error = run(b"", *arguments)
    assert (code, output) == (2, "") and message in error and "Traceback" not in error


# -- conversations -------------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not so') }}{% endif %}"
    "[{{ m.role[0] }}:{{ m.content }}]{% endfor %}{% if add_generation_prompt %}[a:{% endif %}"
)


@pytest.fixture
def templated(own_store: Path) -> Any:
    path = own_store / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    change_manifest(own_store)
    return load_tokenizer(own_store)


def test_a_template_is_given_all_turns(templated: Any) -> None:
    talk = Conversation(templated, 64, "Be")
    talk.answered("Hi", "Yo", templated.encode("Yo", add_special_tokens=False))
    prompt = talk.ask("So?", 10)
    assert templated.decode(prompt.tokens) == "[s:Be][u:Hi][a:Yo][u:So?][a:" and prompt.dropped == 0
    with pytest.raises(ChatTemplateError, match="chat template refuses: not so"):
        talk.ask("no", 10)
    talk.forget()
    assert templated.decode(talk.ask("So?", 10).tokens) == "[s:Be][u:So?][a:"


def test_the_system_message_is_not_dropped(templated: Any) -> None:
    talk = Conversation(templated, 56, "Be")
    for _ in range(2):
        talk.answered("Hi", "Yo", [])
    prompt = talk.ask("So?", 17)
    assert templated.decode(prompt.tokens) == "[s:Be][u:Hi][a:Yo][u:So?][a:" and prompt.dropped == 1
    assert prompt.dropped_tokens == len("[u:Hi][a:Yo]") and len(talk.turns) == 1
    with pytest.raises(UsageError, match="a prompt of 57 tokens, and the plan has room for 56"):
        talk.ask("x" * 44, 8)
    assert len(talk.turns) == 1


@pytest.mark.parametrize("ignored", [False, True])
def test_without_a_template_it_is_one_text(templated: Any, tokenizer: Any, ignored: bool) -> None:
    talk = Conversation(templated if ignored else tokenizer, 44, template=not ignored)
    first = talk.ask("One", 8).tokens
    assert first == encode_prompt(tokenizer, "One")
    end = tokenizer.bos_token_id  # this token also ends a text
    talk.answered("One", "two", [*tokenizer.encode("two", add_special_tokens=False), end])
    second = talk.ask("three", 8).tokens
    assert tokenizer.decode(second) == "</s>Onetwo three" and second[: len(first)] == first
    talk.answered("three", "four", tokenizer.encode("four", add_special_tokens=False))
    prompt = talk.ask("x" * 10, 17)
    assert prompt.dropped == 1 and tokenizer.decode(prompt.tokens) == "</s> threefour " + "x" * 10
