"""The activations against their formulas in both libraries, and the checks of their configuration."""

from __future__ import annotations

from collections.abc import Callable

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlx_flash.layers.activations import Activation

NUMBERS = arrays(np.float32, 7, elements=st.floats(-4, 4, width=32).map(lambda v: np.float32(round(v, 3))))
FORMULAS: dict[str, tuple[Activation, Callable[[np.ndarray, np.ndarray | None], np.ndarray]]] = {
    "relu": (Activation(), lambda a, b: (a > 0) * a * (1 if b is None else b)),
    "fatrelu": (Activation("relu", 0.5), lambda a, b: (a > 0.5) * a * (1 if b is None else b)),
    "relu2": (Activation("relu2"), lambda a, b: (a > 0) * a * a * (1 if b is None else b)),
    "drelu": (Activation("drelu"), lambda a, b: (a > 0) * a * (1 if b is None else (b > 0) * b)),
}


@pytest.mark.parametrize("name", FORMULAS)
@settings(deadline=None)  # the first call of an operation takes longer than the others
@given(first=NUMBERS, second=st.none() | NUMBERS)
def test_formulas(name: str, first: np.ndarray, second: np.ndarray | None) -> None:
    activation, formula = FORMULAS[name]
    before = [first] if second is None else [first, second]
    expected = formula(first, second)
    in_numpy = activation(*before, xp=np)
    assert np.allclose(in_numpy, expected, rtol=1e-6) and in_numpy.dtype == np.float32
    assert np.array_equal(np.array(activation(*map(mx.array, before))), in_numpy)
    active = activation.score(*before, xp=np) > 0
    assert not in_numpy[~active].any(), "what is not active is zero"
    may_fire = np.array(activation.may_fire(mx.array(first)))
    assert may_fire[active].all(), "what can be active is a superset"
    if second is None or name != "drelu":
        assert np.array_equal(may_fire, active)


def test_the_type_is_kept() -> None:
    for dtype in (mx.float16, mx.bfloat16):
        x = mx.array([-1.0, 0.25, 2.0], dtype)
        for activation, _ in FORMULAS.values():
            assert activation(x, x).dtype == activation.score(x, x).dtype == dtype


@pytest.mark.parametrize("wrong", [("gelu", 0.0), ("relu", -1.0), ("relu", float("nan")), ("relu", "0.1")])
def test_wrong_ones_are_refused(wrong: tuple[str, float]) -> None:
    with pytest.raises(ValueError, match=r"expected one of relu, relu2, drelu"):
        Activation(*wrong)


def test_a_threshold_may_be_an_integer_of_any_size() -> None:
    """JSON has integers of any size, and MLX cannot compare with one beyond int64."""
    assert Activation("relu", 10**30)(mx.array([1.0, -1.0])).tolist() == [0, 0]
