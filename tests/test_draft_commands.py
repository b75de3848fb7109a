"""Drafts in the server and the commands: the same answers, and what they report."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from drafting import Remembering  # type: ignore[import-not-found]  # found beside this file
from scripted import Scripted, scripted  # type: ignore[import-not-found]  # noqa: F401
from serving import Server, serving  # type: ignore[import-not-found]
from test_api_structure import FORMAT, THOUGHT, USER, WANTED  # type: ignore[import-not-found]

from mlx_flash.text.drafts import NGRAM

# ruff: noqa: F811

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def drafting(load_speaker: Callable[[], tuple[Any, Any]]) -> Iterator[Server]:
    with serving(load_speaker) as server:
        yield server


def three(server: Server, path: str, body: dict[str, Any]) -> list[Any]:
    """The same request without drafts, with drafts of n-grams, and with drafts that know the earlier answers."""
    flash = server.engine.model.flash
    remembering = Remembering(NGRAM, flash.most_positions)
    answers = []
    for drafting in (None, remembering, remembering):
        flash.drafting = drafting
        before = dict(server.totals)
        answer = server.post(path, body)
        assert answer.status_code == 200, answer.text
        server.idle()
        answers.append(answer.json())
        accepted = server.totals["accepted_tokens"] - before["accepted_tokens"]
        assert drafting is not None or accepted == 0
    assert accepted > 0
    last = server.get("/stats").json()["last"]
    assert last["accepted_tokens"] == accepted <= last["drafted_tokens"]
    assert f"mlx_flash_accepted_tokens_total {server.totals['accepted_tokens']}" in server.get("/metrics").text
    return answers


@pytest.mark.parametrize("temperature", [0, 0.9])
def test_the_probabilities_are_those_without_drafts(drafting: Server, temperature: float) -> None:
    body = {"prompt": [7] * 20, "max_tokens": 24, "temperature": temperature, "logprobs": 3, "seed": 4}
    plain, *drafted = (answer["choices"][0] for answer in three(drafting, COMPLETIONS, body))
    for choice in drafted:
        assert choice["text"] == plain["text"] and choice["finish_reason"] == plain["finish_reason"]
        for name in ("tokens", "text_offset"):
            assert choice["logprobs"][name] == plain["logprobs"][name]
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(plain["logprobs"]["token_logprobs"], abs=1e-3)
        for found, expected in zip(choice["logprobs"]["top_logprobs"], plain["logprobs"]["top_logprobs"], strict=True):
            assert found == pytest.approx(expected, abs=1e-3)


def test_a_stop_word_inside_a_run(drafting: Server) -> None:
    body = {"prompt": [9] * 20, "max_tokens": 24, "temperature": 0}
    text = three(drafting, COMPLETIONS, body)[0]["choices"][0]["text"]
    stop = text[len(text) // 2 :][:4]
    answers = three(drafting, COMPLETIONS, {**body, "stop": stop})
    assert {answer["choices"][0]["text"] for answer in answers} == {text[: text.index(stop)]}
    assert len({answer["usage"]["completion_tokens"] for answer in answers}) == 1
    # The context that such an answer leaves serves the next turn.
    body = {"messages": [{"role": "user", "content": text[:30]}], "temperature": 0, "max_tokens": 12}
    answers = three(drafting, CHAT, body)
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1


@pytest.fixture(scope="module")
def scripted_server(scripted: Scripted) -> Iterator[Server]:
    with serving(scripted.load) as server:
        yield server


@pytest.mark.parametrize(
    ("said", "extra"),
    [
        (f"{THOUGHT}{WANTED}", {"response_format": FORMAT}),
        ("Well, it is warm in Rome.", {"response_format": FORMAT}),
        ("<think>" + "so it goes " * 20 + f"</think>{WANTED}", {"response_format": FORMAT, "thinking_budget": 20}),
        (f"{THOUGHT}2026-11-29 and 30", {"grammar": {"syntax": "regex", "definition": r"\d{4}-\d{2}-\d{2}"}}),
        (
            '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>',
            {"tools": [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]},
        ),
    ],
)
def test_grammars_hold_at_every_place(
    scripted: Scripted, scripted_server: Server, said: str, extra: dict[str, Any]
) -> None:
    scripted.script = lambda prompt: said
    body = {"messages": USER, "temperature": 0, "max_tokens": 300, **extra}
    plain, *drafted = (answer["choices"][0] for answer in three(scripted_server, CHAT, body))
    for choice in [plain, *drafted]:
        for call in choice["message"].get("tool_calls") or []:
            call.pop("id")
    assert drafted == [plain, plain]


# -- commands ------------------------------------------------------------------------------------------------


def test_generate_reports_drafts(run_generate: Callable[..., tuple[int, str, str]], store: Path) -> None:
    flags = ("--model", str(store), "--memory", "1GB", "--prompt", "abc abc abc abc abc abc", "--max-tokens", "20")
    plain = json.loads(run_generate(*flags, "--json")[1].splitlines()[-1])
    code, out, err = run_generate(*flags, "--json", "--draft", "ngram")
    result = json.loads(out.splitlines()[-1])
    assert code == 0 and result["tokens"] == plain["tokens"] and plain["drafts"] is None
    assert result["drafts"].keys() == {"kind", "depth", "drafted", "accepted", "passes"}
    assert result["drafts"]["passes"] + result["drafts"]["accepted"] == 20
    assert "Drafts (ngram, up to 3): " in err and result["plan"]["drafts"] > 0 == plain["plan"]["drafts"]


def test_generate_refuses_both(run_generate: Callable[..., tuple[int, str, str]], store: Path) -> None:
    code, _, err = run_generate("--model", str(store), "--draft", "ngram", "--draft-model", "x")
    assert code == 2 and "a draft model is given as well. Leave one of them out." in err
