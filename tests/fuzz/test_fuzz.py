"""The committed inputs and some hundred fresh ones, the same in every run. run.py searches for more."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from targets import TARGETS  # type: ignore[import-not-found]  # found beside this file

CORPUS = Path(__file__).parent / "corpus"
RUNS = {False: 300, True: 12}  # through MLX? -> runs


@pytest.mark.parametrize("name", TARGETS)
def test_hostile_input_is_answered_with_an_error_of_ours(name: str) -> None:
    target = TARGETS[name]
    for path in sorted((CORPUS / name).glob("*")):
        target.run(path.read_bytes())
    rng = random.Random(name)
    for seed in target.seeds():
        target.run(seed)
        for _ in range(RUNS[target.through_mlx]):
            target.run(target.mutate(rng, seed))
