"""Models that mlx-lm builds, in transformers' layout, against the numbers of transformers 5.24."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from zoo_golden import one_by_one, prompt_and_greedy  # type: ignore[import-not-found]  # found beside this file

pytestmark = pytest.mark.usefixtures("one_processor")


NAMES = (
    "deepseek_v32",
    "gemma3n",
    "gemma4_26b",
    "gemma4_e4b",
    "glm_moe_dsa",
    "minimax_m2",
    "qwen3_5_moe",
    "qwen3_next",
)
TOLERANCE = 5e-4  # of logits whose deviation is above 1


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_and_greedy_tokens(name: str, tmp_path: Path) -> None:
    logits, made, golden = prompt_and_greedy(name, tmp_path / name)
    assert golden["logits"].std() > 1
    assert np.abs(logits - golden["logits"]).max() < TOLERANCE
    assert made == golden["greedy"].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_token_by_token(name: str, tmp_path: Path) -> None:
    logits, golden = one_by_one(name, tmp_path / name)
    assert np.abs(logits - golden["logits"]).max() < TOLERANCE
