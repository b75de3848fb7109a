"""What only a Mac can show: streaming into memory that the GPU reads. Skipped elsewhere, by a marker."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache

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
