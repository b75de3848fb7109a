"""What only a Mac can show: streaming into memory that the GPU reads. Skipped elsewhere, by a marker."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.flash.system import current_memory_bytes, peak_memory_bytes
from mlx_flash.layers.predictors import ShadowPredictor

pytestmark = [pytest.mark.metal, pytest.mark.skipif(not mx.metal.is_available(), reason="needs Metal")]


@pytest.mark.parametrize("predictor", ["none", "exact", "lowrank", "shadow"])
def test_same_logits_with_few_slots_and_with_all(tiny_of, open_model, predictor):
    store = tiny_of("float16").store
    tokens = mx.array(np.random.default_rng(0).integers(4, 96, (1, 40)))
    seen = []
    for slots in (None, 16):
        model = open_model(store, slots, predictor)
        cache = make_prompt_cache(model)
        logits = [model(tokens[:, :20], cache=cache)]
        logits += [model(tokens[:, i : i + 1], cache=cache) for i in range(20, 40)]
        seen.append(np.array(mx.concatenate(logits, axis=1).astype(mx.float32)))
    assert np.array_equal(seen[0], seen[1])


def test_decode_agrees_with_the_dense_model(tiny_of, open_model):
    tiny = tiny_of("float16")
    tokens = mx.array(np.random.default_rng(0).integers(4, 96, (1, 40)))
    streamed = np.array(open_model(tiny.store, 16, "exact")(tokens).astype(mx.float32))
    assert np.abs(streamed - np.array(tiny.dense(tokens))).max() < 0.05 * np.abs(streamed).max()


def test_memory_figures_count_the_gpu_s_memory():
    before = current_memory_bytes()
    held = mx.ones((50_000_000,), mx.float32)
    mx.eval(held)
    assert current_memory_bytes() - before > 150_000_000
    assert peak_memory_bytes() >= current_memory_bytes() - 50_000_000
    del held


@pytest.mark.parametrize("bits", [2, 3])
def test_products_of_packed_bits(bits):
    up = mx.random.normal((1024, 4096)).astype(mx.float16)
    packed = mx.quantize(up, group_size=64, bits=bits)
    ShadowPredictor(*packed, mx.zeros((4096,)), bits, 64).self_test()
