"""`bench neuron-pieces`: both ways decode the same token, and the pieces add up."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from conftest import Tiny  # type: ignore[import-not-found]

from mlx_flash.bench import neuron_pieces
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
