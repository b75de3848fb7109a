"""A published model with its real weights, most of which stay on the disk, against mlx-lm, and in every command."""

from __future__ import annotations

import functools
import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from mlx_lm.utils import load as load_resident
from page_browser import CHROMIUM, Server, chromium, running  # type: ignore[import-not-found]
from pseudo_terminal import CTRL_D, PseudoTerminal  # type: ignore[import-not-found]
from smollm2 import smollm2  # type: ignore[import-not-found]  # found beside this file

import mlx_flash

pytestmark = pytest.mark.real

QUESTION, ANSWER = "What is the capital of France?", "Paris"
QUESTIONS = (QUESTION, "Write a short story about a lighthouse keeper.", "Explain why the sky is blue.")
REPEATED = "Repeat this sentence three times: The quick brown fox jumps over the lazy dog."
TOKENS = 48
CONTEXT = 512
LIMITS = ("--context", str(CONTEXT))
WAIT_MS = 600_000  # limit of every wait; no test needs it


@pytest.fixture(scope="module")
def dense() -> Path:
    return Path(smollm2("dense"))


@pytest.fixture(scope="module")
def in_4_bits(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "4-bits"
    run("convert", "--model", str(dense), "--bits", "4", "--output", str(folder))
    return folder


@functools.lru_cache(1)
def resident(folder: Path) -> tuple[Any, Any]:
    """mlx-lm's model and tokenizer."""
    model, tokenizer, *_ = load_resident(str(folder))
    return model, tokenizer


@functools.cache
def text_of_mlx_lm(folder: Path, question: str, tokens: int = TOKENS, chunk: int = 512) -> str:
    from mlx_lm import generate

    model, tokenizer = resident(folder)
    return str(generate(model, tokenizer, prompt_of(tokenizer, question), max_tokens=tokens, prefill_step_size=chunk))


def prompt_of(tokenizer: Any, question: str) -> list[int]:
    messages = [{"role": "user", "content": question}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True))


def run(command: str, *arguments: str) -> str:
    """The last line of the command's standard output."""
    done = subprocess.run(
        [sys.executable, "-m", "mlx_flash.cli.main", command, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return (done.stdout.splitlines() or [""])[-1]


def budget_of(folder: Path, share: str, *arguments: str) -> int:
    """A budget of `mlxflash plan`, in bytes: the "smallest", or with that share of the units in memory."""
    told = json.loads(run("plan", "--model", str(folder), *LIMITS, *arguments, "--json"))
    assert told["budgets"]["smallest"] < told["budgets"]["25%"] < told["budgets"]["100%"]
    return int(told["budgets"][share])


def megabytes(size: int) -> str:
    return f"{-(-size // 10**6)}MB"


@pytest.fixture
def load() -> Iterator[Callable[[Path, str], tuple[Any, Any]]]:
    """Loads a model in this process, with one of the budgets that the plan names here."""
    models = []

    def load_one(folder: Path, share: str) -> tuple[Any, Any]:
        budget = mlx_flash.plan(folder, context=CONTEXT).budgets()[share]
        model, tokenizer = mlx_flash.load(folder, memory=budget, context=CONTEXT)
        models.append(model)
        return model, tokenizer

    yield load_one
    for model in models:
        model.flash.close()


def test_a_dense_model_speaks_like_mlx_lm(load: Callable[..., Any], dense: Path) -> None:
    model, tokenizer = load(dense, "25%")
    plan = model.flash.plan
    in_memory = plan.parameters_bytes - plan.layer_bytes_per_token
    assert 0.25 < in_memory / plan.parameters_bytes < 0.5
    for question in QUESTIONS:
        *_, last = responses = list(
            mlx_flash.stream_generate(model, tokenizer, prompt_of(tokenizer, question), max_tokens=TOKENS)
        )
        assert "".join(response.text for response in responses) == text_of_mlx_lm(dense, question)
        read = last.statistics.per_token()["bytes_per_token"]
        assert read >= plan.layer_bytes_per_token
    assert ANSWER in text_of_mlx_lm(dense, QUESTION)


@pytest.mark.parametrize("share", ["25%", "smallest"])
def test_an_equal_mixture_speaks_like_mlx_lm(load: Callable[..., Any], dense: Path, share: str) -> None:
    """Experts are read, and with the smallest budget layers as well."""
    folder = Path(smollm2("mixture"))
    model, tokenizer = load(folder, share)
    assert (model.flash.plan.layer_bytes_per_token > 0) == (share == "smallest")
    tokens = TOKENS // 2 if share == "25%" else TOKENS // 4
    for question in QUESTIONS:
        text = mlx_flash.generate(model, tokenizer, prompt_of(tokenizer, question), max_tokens=tokens)
        assert text == text_of_mlx_lm(folder, question, tokens)


@pytest.mark.parametrize(
    ("question", "flags", "chunk"),
    [
        (QUESTION, [], 512),
        (REPEATED, ["--draft", "ngram"], 512),
        (QUESTIONS[2], ["--prefill-chunk", "16"], 16),
    ],
    ids=["plain", "drafts", "chunks"],
)
def test_generate(dense: Path, question: str, flags: list[str], chunk: int) -> None:
    memory = megabytes(budget_of(dense, "25%", *flags))
    asked = ["--model", str(dense), "--memory", memory, *LIMITS, "--prompt", question, "--max-tokens", str(TOKENS)]
    result = json.loads(run("generate", *asked, *flags, "--json"))
    assert result["text"] == text_of_mlx_lm(dense, question, chunk=chunk)
    assert result["bytes_per_token"] > 0
    assert not flags or flags[0] != "--draft" or result["drafts"]["accepted"] > 0


def test_generate_in_4_bits(in_4_bits: Path) -> None:
    memory, tokens = megabytes(budget_of(in_4_bits, "25%")), TOKENS // 2
    asked = ["--model", str(in_4_bits), "--memory", memory, *LIMITS, "--prompt", QUESTION, "--max-tokens", str(tokens)]
    result = json.loads(run("generate", *asked, "--json"))
    assert result["text"] == text_of_mlx_lm(in_4_bits, QUESTION, tokens)
    assert result["bytes_per_token"] > 0


def test_chat(dense: Path, tmp_path: Path) -> None:
    memory = megabytes(budget_of(dense, "25%"))
    asked = ("--model", str(dense), "--memory", memory, *LIMITS, "--max-tokens", str(TOKENS))
    terminal = PseudoTerminal("-m", "mlx_flash.chat", *asked, cache=tmp_path)
    try:
        terminal.until(">>> ")
        for question, answer in ((QUESTION, ANSWER), ("And of Italy?", "Rome")):
            terminal.type(f"{question}\n")
            terminal.until(f"{question}\n")
            assert answer in terminal.until(">>> ")
        terminal.press_at_prompt(CTRL_D)
        assert terminal.ended()[0] == 0
    finally:
        terminal.close()


@pytest.fixture(scope="module")
def server(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    memory = megabytes(budget_of(dense, "25%"))
    log = tmp_path_factory.mktemp("server") / "log"
    with running(log, "--model", str(dense), *LIMITS, memory=memory) as server:
        yield server


def test_the_server_streams_to_openai_s_client(server: Server, dense: Path) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        messages: list[Any] = [{"role": "user", "content": QUESTION}]
        stream = client.chat.completions.create(
            model="any", messages=messages, temperature=0, max_tokens=TOKENS, stream=True
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
    assert len(pieces) > 3 and "".join(pieces) == text_of_mlx_lm(dense, QUESTION)
    assert server.get("/stats")["last"]["bytes_per_token"] > 0


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the PATH: apt-get install chromium")
@pytest.mark.skipif(importlib.util.find_spec("playwright") is None, reason="no playwright: pip install playwright")
def test_the_page(server: Server, dense: Path) -> None:
    with chromium() as browser:
        page = browser.new_page()
        page.set_default_timeout(WAIT_MS)
        page.goto(server.url)
        page.wait_for_selector('#state[data-state="ready"]')
        page.evaluate("document.getElementById('settings').open = true")
        page.fill("input[name=temperature]", "0")
        page.fill("#prompt", QUESTION)
        page.press("#prompt", "Enter")
        answer = '#log article.assistant:last-child[data-state="done"]'
        page.wait_for_selector(answer)
        assert page.text_content(f"{answer} .text") == text_of_mlx_lm(dense, QUESTION)
