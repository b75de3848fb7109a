"""`bench neuron-pieces` and `rank-tokens`: both ways decode the same token, and what ranks say is compared."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Tiny  # type: ignore[import-not-found]

from mlx_flash.bench import neuron_pieces, rank_tokens
from mlx_flash.bench.__main__ import make_parser
from mlx_flash.errors import UsageError
from mlx_flash.layers.neurons import StreamedNeurons


@pytest.mark.parametrize("name", ["float32", "4 bits"])
def test_the_pieces_give_the_same_tokens(tiny_of: Callable[[str], Tiny], open_model: Any, name: str) -> None:
    model = open_model(tiny_of(name).store)
    result = neuron_pieces.measure(model, tokens=6)
    assert result["pairs"] == result["equal"] == 6
    assert result["interval"][0] <= result["ratio"] <= result["interval"][1]
    assert all(type(layer) is StreamedNeurons for layer in model.flash.layers), "the model stays what it was"


def test_the_command_prints_both_ways(tiny_of: Callable[[str], Tiny], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = make_parser().parse_args(["neuron-pieces", "--model", str(tiny_of("float32").store), "--tokens", "4"])
    arguments.run(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == list(neuron_pieces.WAYS)
    assert json.loads(lines[-1])["command"] == "neuron-pieces"
    arguments.tokens = 1000
    with pytest.raises(UsageError, match="positions"):
        arguments.run(arguments)


def test_tokens_of_ranks_are_compared(
    tiny_of: Callable[[str], Tiny], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {1: [[5, 6], [7, 8]], 2: [[5, 6], [7, 8]], 3: [[5, 6], [7, 9]]}
    asked = []

    def ask(_: str, question: list[Any], name: str) -> dict[str, Any]:
        asked.append(name)
        return {"ranks": question[1], "ids": said[question[1]], "ms": 1.0, "held": 2, "blocks": 4}

    monkeypatch.setattr(rank_tokens, "ask", ask)
    store = str(tiny_of("float32").store)
    arguments = make_parser().parse_args(["rank-tokens", "--model", store, "--ranks", "1,2,3"])
    arguments.run(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert [run["equal"] for run in json.loads(lines[-1])["runs"]] == [4, 4, 3]
    assert len(asked) == 3 and any("3 of 4" in line for line in lines)


def test_one_rank_continues_prompts_alone(speaker: Any) -> None:
    found = rank_tokens.continue_prompts(str(speaker), 1, "1GB", 3)
    assert [len(ids) for ids in found["ids"]] == [3] * len(rank_tokens.PROMPTS)
    assert found["held"] == found["blocks"]
