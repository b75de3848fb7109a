"""Loading draws random weights, but leaves MLX's random state unchanged."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from mixtures import VOCABULARY, config_of, make_mixture  # type: ignore[import-not-found]

from mlx_flash.errors import UsageError
from mlx_flash.flash.random_state import kept_random_state
from mlx_flash.loading.load import load
from mlx_flash.source.model_kind import is_mixture


def state_graph() -> str:
    state: Any = mx.random.state
    graph = io.StringIO()
    mx.export_to_dot(graph, state[0])
    return graph.getvalue()


def numbers() -> Any:
    return mx.random.uniform(shape=(4,)).tolist()


def unchanged_by(call: Callable[[], object]) -> bool:
    """Whether the same numbers are drawn after `call` as without it, from an evaluated state."""
    mx.random.seed(7)
    numbers()
    without = numbers()
    mx.random.seed(7)
    numbers()
    call()
    return "label" not in state_graph() and numbers() == without


def test_a_draw_that_is_not_evaluated_is_kept() -> None:
    """The reason for the other tests: MLX keeps the unevaluated graph of the next key."""
    mx.random.seed(7)
    assert "label" not in state_graph()
    mx.random.uniform()
    assert "label" in state_graph()


@pytest.mark.parametrize("seed", [0, 7, 2**32 - 1, 2**32, 2**63 + 5, 2**64 - 1])
def test_every_state_comes_back(seed: int) -> None:
    mx.random.seed(seed)
    without = numbers()
    mx.random.seed(seed)
    with kept_random_state():
        numbers()
    assert numbers() == without


@pytest.mark.parametrize("kind", ["store", "mixture"])
def test_a_load_leaves_it(store: Path, tmp_path: Path, kind: str) -> None:
    if kind == "mixture":
        store = make_mixture(tmp_path / "mixture", "mixtral")
        write_tokenizer(store, VOCABULARY)
    assert unchanged_by(lambda: load(store, memory="2GB")[0].flash.close())


def test_a_load_that_fails_leaves_it(tmp_path: Path) -> None:
    folder = make_mixture(tmp_path / "mixture", "mixtral")

    def fail() -> None:
        with pytest.raises(UsageError, match="mixture of experts"):
            load(folder, predictor="exact")

    assert unchanged_by(fail)


def test_the_look_for_experts_leaves_it() -> None:
    assert unchanged_by(lambda: is_mixture(config_of("mixtral"), "here"))
