"""python -m mlx_flash.generate. Most tests call its `main` in this process."""

from __future__ import annotations

import argparse
import io
import itertools
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]
from tiny import make_checkpoint  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.cli.run import run_command
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.errors import FlashError
from mlx_flash.loading.load import load
from mlx_flash.text import generation

pytestmark = pytest.mark.usefixtures("one_processor")

PYTHON_M = [sys.executable, "-m", "mlx_flash.generate"]
KEYS = {
    *("text", "tokens", "prompt_tokens", "generation_tokens", "prompt_tps", "generation_tps", "first_token_s"),
    *("peak_memory_bytes", "hit_rate", "bytes_per_token", "reads_per_token", "read_s", "wait_s", "manage_s"),
    *("compute_s", "ranks", "predictor", "predictor_measured", "drafts", "swap", "choices", "plan"),
}
PLAN_KINDS = {
    *("process", "resident_weights", "adapter", "predictors", "slots", "table_rows", "kv_cache", "prompt_caches"),
    *("drafts", "workspace"),
}
PLAN_KEYS = {"budget", "total", *PLAN_KINDS}
HEAVY = ("mlx", "mlx_lm", "numpy", "transformers", "huggingface_hub", "tokenizers", "psutil", "torch")


@pytest.fixture
def run(run_generate: Callable[..., tuple[int, str, str]], store: Path) -> Callable[..., tuple[int, str, str]]:
    """`run_generate` with the tiny store, unless --model is given."""

    def run(*arguments: str) -> tuple[int, str, str]:
        return run_generate(*(arguments if "--model" in arguments else ("--model", str(store), *arguments)))

    return run


# -- in processes of their own -------------------------------------------------------------------------------


def imported(*arguments: str) -> set[str]:
    """The heavy packages that a Python process imports."""
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    modules = re.findall(r"^import time:.*\| +(\S+)$", done.stderr, re.MULTILINE)
    assert any(name.startswith("mlx_flash") for name in modules)
    return {name.split(".")[0] for name in modules} & set(HEAVY)


def test_help_and_the_package_import_nothing_heavy() -> None:
    assert imported("-m", "mlx_flash.generate", "--help") == set()
    assert imported("-c", "import mlx_flash; dir(mlx_flash)") == set()
    assert imported("-c", "from mlx_flash.flash import pool") >= {"mlx", "numpy"}  # so the regular expression works


def test_it_generates_what_the_library_does_within_the_smallest_budget_it_names(store: Path) -> None:
    refused = subprocess.run(
        [*PYTHON_M, "--model", str(store), "--memory", "1MB"], capture_output=True, text=True, timeout=120
    )
    assert refused.returncode == 2 and refused.stdout == "" and refused.stderr.count("\n") == 1
    smallest = re.search(r"this model needs at least ((\d+)MB)", refused.stderr)
    assert smallest is not None
    done = subprocess.run(
        [*PYTHON_M, "--model", str(store), "--prompt", "-", "--max-tokens", "40", "--memory", smallest[1], "--json"],
        input="Once upon a time",
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    *text, line = done.stdout.splitlines()
    result = json.loads(line)
    model, tokenizer = load(store)
    expected = list(mlx_flash.stream_generate(model, tokenizer, "Once upon a time", 40))
    model.flash.close()
    assert result["tokens"] == [r.token for r in expected]
    assert result["text"] == "".join(r.text for r in expected) == "\n".join(text)
    assert result.keys() == KEYS and result["plan"].keys() == PLAN_KEYS
    assert result["prompt_tokens"] == 17 and result["generation_tokens"] == len(expected)
    assert 0 < result["peak_memory_bytes"] <= result["plan"]["budget"] == int(smallest[2]) * 10**6
    assert 0 < result["first_token_s"] < 30 and 0 <= result["hit_rate"] <= 1
    for part in (
        "memory plan",
        "Prompt: 17 tokens",
        "Generation: 40 tokens",
        "Peak memory",
        "First token",
        "Streaming",
    ):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def long_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with positions for thousands of tokens, whose model repeats one token for ever."""
    folder = tmp_path_factory.mktemp("long")
    checkpoint = make_checkpoint(folder / "checkpoint", positions=4096, neurons=128)
    write_tokenizer(checkpoint)
    convert(checkpoint, folder / "store", Settings(calibration_tokens=128))
    return folder / "store"


# The command, which waits for Ctrl-C after its third token.
WAITS = """
import runpy, sys, time
from mlx_flash.cli import terminal
from mlx_flash.text import generation
asked = []
class Interrupts(terminal.Interrupts):
    def __enter__(self):
        asked.append(self)
        return super().__enter__()
def stream_generate(*arguments, **options):
    for response in real(*arguments, **options):
        yield response
        while response.generation_tokens >= 3 and not asked[0].asked:
            time.sleep(0.01)
real, generation.stream_generate = generation.stream_generate, stream_generate
terminal.Interrupts = Interrupts
runpy.run_module("mlx_flash.generate", run_name="__main__", alter_sys=True)
"""


def test_ctrl_c_ends_it_cleanly(long_store: Path) -> None:
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            WAITS,
            "--model",
            str(long_store),
            "--max-tokens",
            "4000",
            "--context",
            "4096",
            "--json",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    first = os.read(process.stdout.fileno(), 1)  # generation has begun
    process.send_signal(signal.SIGINT)
    rest, error = process.communicate(timeout=600)
    assert process.returncode == 130, error
    result = json.loads((first + rest).decode().splitlines()[-1])
    assert 1 <= result["generation_tokens"] <= 4
    for part in (b"interrupted", b"Generation: ", b"Streaming"):
        assert part in error
    assert b"Traceback" not in error


# -- in this one ---------------------------------------------------------------------------------------------


def test_the_text_stands_alone_on_standard_output(run: Callable[..., Any]) -> None:
    code, output, error = run("--max-tokens", "5", "--prompt", "Once")
    assert code == 0 and output.count("\n") == 1 and len(output) > 1
    assert "memory plan" in error and "Time per token" in error


def test_options_change_the_text_or_leave_it(run: Callable[..., Any]) -> None:
    def text(*arguments: str) -> str:
        code, output, _ = run("--max-tokens", "20", *arguments)
        assert code == 0
        return output

    plain = text()
    assert plain == text("--temp", "0", "--threads", "2", "--io", "buffered", "--window", "4", "--seed", "5")
    assert text("--temp", "1", "--seed", "5") == text("--temp", "1", "--seed", "5") != plain
    for greedy in (("--top-k", "1"), ("--top-p", "0"), ("--temp", "1e-8")):
        assert text("--temp", "1", "--seed", "5", *greedy) == plain
    every = text("--temp", "1", "--seed", "5", "--top-k", "96")
    assert every == text("--temp", "1", "--seed", "5")
    assert text("--repetition-penalty", "5") != plain
    assert text("--predictor", "none") == text("--predictor", "exact")


def test_a_chat_template_is_applied(
    generate_command: ModuleType, run: Callable[..., Any], own_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from conftest import change_manifest

    path = own_store / "tokenizer_config.json"
    template = "{% for m in messages %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": template}))
    change_manifest(own_store)
    model, tokenizer = load(own_store)
    model.flash.close()
    arguments = generate_command.make_parser().parse_args(["--system-prompt", "Be"])
    assert tokenizer.decode(generate_command.apply_template(tokenizer, "Hi", arguments, 512)) == "[system:Be][user:Hi]"
    arguments = generate_command.make_parser().parse_args(["--ignore-chat-template"])
    assert generate_command.apply_template(tokenizer, "Hi", arguments, 512) == "Hi"
    code, output, _ = run("--model", str(own_store), "--prompt", "Hi", "--max-tokens", "3", "--json")
    assert code == 0 and json.loads(output.splitlines()[-1])["prompt_tokens"] == len("[user:Hi]")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-tokens", "0"], "--max-tokens is 0, expected at least 1"),
        (["--max-tokens", "x"], "invalid int value"),
        (["--temp", "-1"], "--temp is -1.0"),
        (["--temp", "nan"], "--temp is nan"),
        (["--top-p", "-0.1"], "--top-p is -0.1"),
        (["--repetition-penalty", "0"], "--repetition-penalty is 0.0"),
        (["--top-p", "1.5"], "--top-p is 1.5"),
        (["--min-p", "2"], "--min-p is 2.0"),
        (["--top-k", "-1"], "--top-k is -1"),
        (["--threads", "0"], "threads is 0, expected 1 to 256"),
        (["--window", "0"], "window is 0"),
        (["--context", "0"], "context is 0"),
        (["--memory", "6"], "memory is '6', expected a number with a unit, such as 6GB"),
        (["--memory", "1MB"], "this model needs at least"),
        (["--predictor", "oracle"], "invalid choice: 'oracle'"),
        (["--io", "mmap"], "invalid choice: 'mmap'"),
        (["--prompt", ""], "the prompt is empty"),
        (["--nonsense"], "unrecognized arguments"),
        (["--model", "/no/such/folder"], "/no/such/folder is neither a folder nor"),
        (
            ["--prompt", "x" * 70],
            "the prompt has 71 tokens, and the plan makes room for 64. Shorten it: this model takes no more.",
        ),
    ],
)
def test_what_cannot_be_used_ends_with_2_and_one_sentence(
    run: Callable[..., Any], arguments: list[str], message: str
) -> None:
    code, output, error = run(*arguments)
    assert (code, output) == (2, "")
    assert message in error and "Traceback" not in error


def test_a_broken_store_ends_with_1(run: Callable[..., Any], own_store: Path) -> None:
    (own_store / "neurons.bin").unlink()
    code, output, error = run("--model", str(own_store))
    assert (code, output) == (1, "") and "lacks neurons.bin" in error


def test_an_error_in_the_middle_of_a_text_begins_a_line(
    run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = generation.stream_generate

    def breaks(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield from itertools.islice(real(*arguments, **options), 3)
        raise FlashError("the disk has gone.")

    whole = run("--max-tokens", "3")[1]
    monkeypatch.setattr(generation, "stream_generate", breaks)
    code, output, error = run()
    assert (code, output) == (1, whole) and output.endswith("\n")
    assert error.splitlines()[-1].endswith(": the disk has gone.")


@pytest.fixture
def default_ctrl_c() -> Iterator[None]:
    """Restores Python's own handler. Tests started in the background ignore the signal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_ctrl_c")
@pytest.mark.parametrize(
    ("times", "message"),
    [
        (1, "interrupted while reading the prompt; no token was generated"),
        (2, "python -m mlx_flash.generate: interrupted"),
    ],
)
def test_ctrl_c_while_the_prompt_is_read(
    generate_command: ModuleType, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, times: int, message: str
) -> None:
    """Once: a clean end without a token. Twice: an immediate end."""
    enter = generate_command.Interrupts.__enter__

    def interrupted(self: Any) -> Any:
        enter(self)
        for _ in range(times):
            signal.raise_signal(signal.SIGINT)
        return self

    monkeypatch.setattr(generate_command.Interrupts, "__enter__", interrupted)
    code, output, error = run("--json")
    assert code == 130
    if times == 1:
        result = json.loads(output)
        assert (result["text"], result["tokens"], result["generation_tokens"]) == ("", [], 0)
    else:
        assert output.strip() == ""
    assert error.splitlines()[-1] == message and "Generation" not in error


@pytest.mark.usefixtures("default_ctrl_c")
def test_ctrl_c_while_loading(
    generate_command: ModuleType, run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate_command, "apply_template", lambda *_: signal.raise_signal(signal.SIGINT))
    code, _, error = run()
    assert code == 130 and error.splitlines()[-1] == "python -m mlx_flash.generate: interrupted"


@pytest.mark.usefixtures("default_ctrl_c")
def test_ctrl_c_is_as_before_afterwards(run: Callable[..., Any]) -> None:
    assert run("--max-tokens", "1")[0] == 0
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_terminal_whose_encoding_lacks_a_character(monkeypatch: pytest.MonkeyPatch) -> None:
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="latin-1"))
    monkeypatch.setattr(sys, "argv", ["generate"])
    with pytest.raises(SystemExit) as caught:
        run_command(argparse.ArgumentParser(), lambda _: print("caf\xe9 \U0001f600"))
    assert caught.value.code == 0 and written.getvalue() == b"caf\xe9 ?\n"
