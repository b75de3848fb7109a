"""The stored predictors alone."""

import mlx.core as mx
import numpy as np
import pytest

from mlx_flash.errors import FlashError
from mlx_flash.layers.predictors import LowRankPredictor, ShadowPredictor


def shadow(bits: int, dtype: mx.Dtype = mx.float32) -> tuple[ShadowPredictor, mx.array]:
    up = mx.random.normal((48, 128), key=mx.random.key(0)).astype(dtype)  # (D, F)
    packed = mx.quantize(up, group_size=64, bits=bits)
    c = mx.full((128,), -0.25)
    return ShadowPredictor(*packed, c, bits, 64), mx.dequantize(*packed, group_size=64, bits=bits)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_shadow_chooses_by_the_dequantised_weights(bits):
    predictor, coarse = shadow(bits)
    x = mx.random.normal((5, 48), key=mx.random.key(1))
    mask, activations = predictor(x)
    scores = np.array(x) @ np.array(coarse) - 0.25
    clear = np.abs(scores) > 1e-4
    assert activations is None and mask.dtype == mx.bool_
    assert np.array_equal(np.array(mask)[clear], (scores > 0)[clear])
    assert 0 < np.array(mask).mean() < 1


def test_low_rank_chooses_by_the_product():
    rng = np.random.default_rng(0)
    a, b, c = (rng.standard_normal(shape).astype(np.float32) for shape in ((16, 4), (4, 64), (64,)))
    x = rng.standard_normal((3, 16)).astype(np.float32)
    mask, _ = LowRankPredictor(mx.array(a), mx.array(b), mx.array(c))(mx.array(x))
    assert np.array_equal(np.array(mask), x @ a @ b + c > 0)


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16])
def test_the_shadow_s_self_test_knows_a_wrong_product(dtype, monkeypatch):
    predictor, _ = shadow(2, dtype)
    predictor.self_test()
    right = predictor._coarse
    last = mx.arange(128) >= 64
    for wrong in (
        lambda x: right(x) if len(x) == 1 else right(x)[::-1],
        lambda x: right(x) * (1 + 0.1 * last),
        lambda x: right(x) * (1.1 - 0.1 * last),
    ):
        monkeypatch.setattr(predictor, "_coarse", wrong)
        with pytest.raises(FlashError, match="self-test failed"):
            predictor.self_test()
