"""The same text at every budget, on a checkpoint that is large beside the process: real budgets, nothing patched."""

import gc
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from conftest import PREDICTORS, write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from mlx_lm.models.cache import make_prompt_cache
from tiny import make_checkpoint  # type: ignore[import-not-found]

import mlx_flash
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.errors import BudgetError

pytestmark = pytest.mark.slow

LAYERS, HIDDEN, NEURONS = 16, 1024, 6144  # 0.8 GB of neurons in float32


@pytest.fixture(scope="module")
def large_store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("large")
    checkpoint = make_checkpoint(
        folder / "checkpoint", layers=LAYERS, hidden=HIDDEN, neurons=NEURONS, positions=512, bias=-1.6
    )
    write_tokenizer(checkpoint)
    convert(checkpoint, folder / "store", Settings(calibration_tokens=256))
    return folder / "store"


def logits_of(model: Any) -> np.ndarray:
    """A prompt of 20 tokens and 20 more, one by one: float32 (20, V)."""
    tokens = mx.array(np.random.default_rng(0).integers(4, 96, (1, 40)))
    cache = make_prompt_cache(model)
    mx.eval(model(tokens[:, :20], cache=cache))
    steps = [np.array(model(tokens[:, i : i + 1], cache=cache))[0, 0] for i in range(20, 40)]
    return np.stack(steps)


def smallest(store, predictor):
    with pytest.raises(BudgetError) as refused:
        mlx_flash.load(store, predictor=predictor, memory=1, context=256)
    return refused.value.smallest_bytes + 8_000_000  # this process grows a little from load to load


@pytest.mark.parametrize("predictor", PREDICTORS)
def test_same_logits_and_text(large_store, predictor):
    least = smallest(large_store, predictor)
    first = None
    shares = []
    for memory, window, threads in (
        (least, 1, 1),
        (least + 200_000_000, 8, 16),
        (least + 500_000_000, None, 16),
        (None, None, 16),
    ):
        model, tokenizer = mlx_flash.load(
            large_store, predictor=predictor, memory=memory, window=window, threads=threads, context=256
        )
        shares.append(model.flash.plan.slots / model.flash.plan.blocks)
        got = (
            logits_of(model),
            list(
                response.token
                for response in mlx_flash.stream_generate(model, tokenizer, "Once upon a time", max_tokens=12)
            ),
        )
        model.flash.close()
        del model
        gc.collect()
        first = first or got
        assert np.array_equal(got[0], first[0])
        assert got[1] == first[1]
    assert shares == sorted(shares) and shares[0] < 0.1 and shares[-1] == 1
