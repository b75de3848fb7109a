"""`bench head-pieces`, which compares the bits of an output head with those of its pieces."""

from __future__ import annotations

import argparse
import json

import mlx.core as mx
import pytest

from mlx_flash.bench import head_pieces
from mlx_flash.errors import UsageError


def arguments(*given: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    head_pieces.add_arguments(parser)
    return parser.parse_args(["--vocabulary", "1024", "--width", "64", *given])


def test_what_it_reports(capsys: pytest.CaptureFixture[str]) -> None:
    head_pieces.main(arguments("--tokens", "1", "--pieces", "512,300", "--kinds", "4 bits,bfloat16"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["4", "bits", "1", "same", "same"]
    figures = json.loads(lines[-1])
    assert [row["head"] for row in figures["rows"]] == ["4 bits", "bfloat16"]
    assert all(row["different"] == [0.0, 0.0] for row in figures["rows"])


def test_it_sees_a_difference() -> None:
    def head(first: int, last: int) -> mx.array:
        return mx.arange(first, last) + mx.array(1 if first == 3 else 0, mx.int32)

    assert head_pieces.differences(head, 6, [6, 3]) == [0.0, 0.5]


@pytest.mark.parametrize(
    "given", [("--width", "65"), ("--tokens", "one"), ("--pieces", "0"), ("--pieces", ""), ("--kinds", "3 bits")]
)
def test_what_it_refuses(given: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match="expected"):
        head_pieces.main(arguments(*given))
