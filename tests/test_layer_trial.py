"""The trial of a model's layers before its weights are loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mixtures import FAMILIES, make_mixture  # type: ignore[import-not-found]
from mlx.utils import tree_flatten

from mlx_flash.loading.in_place_model import InPlaceModel, open_in_place
from mlx_flash.loading.layer_trial import _FewExperts, token_seconds
from mlx_flash.loading.moves import primitives_of

CHOICES = 2


def parameters_of(mixture: InPlaceModel) -> list[tuple[str, mx.array]]:
    found: Any = tree_flatten(mixture.model.parameters())
    return found  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", ["llama", *FAMILIES])
def test_every_layer_has_its_seconds(tmp_path: Path, family: str) -> None:
    mixture = open_in_place(make_mixture(tmp_path / "model", family))
    before, modules = parameters_of(mixture), [type(layer) for layer in mixture.model.layers]
    for layer in mixture.model.layers:
        layer._constant = mx.array([1.0, 2.0])  # like the frequencies of positions: not a weight
    beside = []

    def compute_once(compute: Any) -> None:
        compute()
        beside.append(compute)

    found = token_seconds(mixture, CHOICES, compute_once)
    assert len(beside) == 1
    assert [module for module, _ in found.layers] == list(mixture.model.layers)
    assert all(seconds > 0 for _, seconds in found.layers) and found.outside > 0
    assert found.total == pytest.approx(sum(seconds for _, seconds in found.layers) + found.outside)
    after = parameters_of(mixture)
    assert [name for name, _ in after] == [name for name, _ in before]
    assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True)), "the model has its weights again"
    assert [type(layer) for layer in mixture.model.layers] == modules
    assert all(layer._constant.tolist() == [1.0, 2.0] for layer in mixture.model.layers)
    assert all(primitives_of(array) for _, array in after if array.nbytes > 1024), "and none was read"


def test_one_layer_of_each_kind_is_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_mixture(tmp_path / "model", "deepseek_v3", num_hidden_layers=6, first_k_dense_replace=2)
    mixture = open_in_place(folder)
    called: list[int] = []
    kind = type(mixture.model.layers[0])
    real = kind.__call__

    def noting(self: Any, *arguments: Any, **named: Any) -> Any:
        called.append([layer is self for layer in mixture.model.layers].index(True))
        return real(self, *arguments, **named)

    monkeypatch.setattr(kind, "__call__", noting)
    found = token_seconds(mixture, CHOICES, lambda _: None)
    assert set(called) == {0, 2}, "the first dense layer, and the first mixture"
    seconds = [each for _, each in found.layers]
    assert seconds[0] == seconds[1] and len(set(seconds[2:])) == 1


@pytest.mark.parametrize(("slots", "rounds"), [(1, 4), (3, 2), (4, 1), (12, 1)])
def test_few_slots_compute_in_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slots: int, rounds: int) -> None:
    """A token names 4 experts. The engine evaluates each round before the next one's experts come."""
    mixture = open_in_place(make_mixture(tmp_path / "model", "qwen3_moe", num_hidden_layers=1))
    guarded: list[bool] = []
    real = _FewExperts.guard

    def noting(self: _FewExperts, output: mx.array) -> None:
        real(self, output)
        guarded.append(not primitives_of(output))

    monkeypatch.setattr(_FewExperts, "guard", noting)
    token_seconds(mixture, slots, lambda _: None)
    assert guarded[:rounds] == [rounds > 1] * rounds and len(guarded) % rounds == 0


def test_it_takes_the_memory_of_a_layer(tmp_path: Path) -> None:
    folder = make_mixture(
        tmp_path / "model", "llama", hidden_size=512, intermediate_size=4096, num_hidden_layers=6, vocab_size=4096
    )
    mixture = open_in_place(folder)
    of_layer = max(layer.nbytes for layer in mixture.layers)
    of_all = sum(array.nbytes for _, array in parameters_of(mixture))
    outside = of_all - len(mixture.layers) * of_layer
    mx.clear_cache()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    token_seconds(mixture, CHOICES, lambda _: None)
    mx.clear_cache()
    assert mx.get_peak_memory() - before < outside + 1.5 * of_layer < 0.6 * of_all
    assert mx.get_active_memory() - before < of_layer / 4, "nothing of it is kept"
