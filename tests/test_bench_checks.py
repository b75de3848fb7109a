"""`bench checks`, which measures the cost of block checksums."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from mlx_flash.bench import checks


def test_what_it_reports(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    checks.add_arguments(parser)
    given = ["--store", str(store), "--seconds", "1", "--blocks", "8", "--tokens", "6", "--memory", "2GB"]
    checks.main(parser.parse_args(given))
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert figures["reads"]["pairs"] > 0 and figures["tokens"]["pairs"] == 3
    assert "6 tokens decoded" in lines
    for part in ("reads", "tokens"):
        compared, without, ratio, least, least_without = figures[part]["wall_s"]
        assert 0 < least <= compared and 0 < least_without <= without and ratio > 0
