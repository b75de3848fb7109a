"""Tests that need a Mac: streaming into memory that the GPU reads. A marker skips them elsewhere."""

import mlx.core as mx
import numpy as np
import pytest
from mixtures import (  # type: ignore[import-not-found]  # found beside this file
    VOCABULARY,
    make_mixture,
    open_streamed,
    to_bfloat16,
)
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.utils import load_model

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


CALLS = (150, 1, 40, 1, 3, 1)  # tokens of each call: prompts, for which MLX may choose kernels, and decoded tokens


@pytest.fixture(params=["4 bits", "8 bits", "bfloat16"])
def mixture(request, tmp_path):
    folder = make_mixture(tmp_path / "mixture", "qwen3_moe", "plain" if request.param == "bfloat16" else request.param)
    if request.param == "bfloat16":
        to_bfloat16(folder)
    return folder


def logits_of(model, calls):
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, sum(calls)))
    cache, begins = make_prompt_cache(model), np.cumsum([0, *calls])
    logits = [
        model(mx.array(tokens[:, begin : begin + call]), cache=cache)
        for begin, call in zip(begins[:-1], calls, strict=True)
    ]
    return np.array(mx.concatenate(logits, axis=1).astype(mx.float32))


def test_a_mixture_says_the_same_at_every_budget(mixture):
    expected = None
    for slots in (2, 3, 7, 12):
        model, streamer = open_streamed(mixture, slots)
        for _ in range(2):  # cold, then as warm as possible
            found = logits_of(model, CALLS)
            expected = found if expected is None else expected
            assert np.array_equal(found, expected), slots
        streamer.close()


def test_a_mixture_decodes_with_the_bits_of_mlx_lm(mixture):
    """The bits are equal up to 63 pairs of a token and an expert. Each token has four here."""
    calls = (15, 1, 1, 3, 1)
    expected = logits_of(load_model(mixture)[0], calls)
    for slots in (2, 12):
        model, streamer = open_streamed(mixture, slots)
        assert np.array_equal(logits_of(model, calls), expected)
        streamer.close()


def test_a_prompt_of_a_mixture_is_near_mlx_lms(mixture):
    """Other kernels sum in another order, and a router may rarely choose differently, so most logits are this near."""
    model, streamer = open_streamed(mixture, 3)
    found, expected = logits_of(model, (150,)), logits_of(load_model(mixture)[0], (150,))
    streamer.close()
    near = np.abs(found - expected).max(axis=-1) < 0.1 * np.abs(expected).max()
    assert near.mean() > 0.9
