"""Every family against transformers (``tests/golden/make_golden.py``), and calls with a cache against plain calls."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from golden_models import (  # type: ignore[import-not-found]  # found beside this file
    TOLERANCE,
    VARIANTS,
    arguments,
    checkpoint_of,
    config_of,
    largest_difference,
    load,
    parameter_names,
)
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from mlx_flash.loading.model_types import model_classes

pytestmark = pytest.mark.usefixtures("one_processor")


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def test_logits_agree_with_transformers(model: Any, golden: dict[str, mx.array]) -> None:
    assert largest_difference(model(golden["tokens"]), golden["logits"]) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 7])
def test_through_the_cache_in_chunks(model: Any, golden: dict[str, mx.array], chunk: int) -> None:
    tokens = golden["tokens"]
    cache = make_prompt_cache(model)
    pieces = [model(tokens[:, i : i + chunk], cache) for i in range(0, tokens.shape[1], chunk)]
    assert cache[0].offset == tokens.shape[1]
    assert largest_difference(mx.concatenate(pieces, axis=1), golden["logits"]) < TOLERANCE


def test_greedy_continuation_agrees_with_transformers(model: Any, golden: dict[str, mx.array]) -> None:
    cache = make_prompt_cache(model)
    logits = model(golden["tokens"][:1], cache)
    continuation: list[int] = []
    for _ in range(golden["greedy"].size):
        continuation.append(np.array(logits[0, -1]).argmax().item())
        logits = model(mx.array([continuation[-1:]]), cache)
    assert continuation == golden["greedy"].tolist()


def test_left_padded_batch_equals_single_rows(model: Any, golden: dict[str, mx.array]) -> None:
    tokens, prompt, decoded = golden["tokens"], 20, 4
    padding = [5, 0, 13]
    rows = [mx.pad(tokens[i, : prompt - pad], (pad, 0)) for i, pad in enumerate(padding)]
    follow = [tokens[i, prompt - pad : prompt - pad + decoded] for i, pad in enumerate(padding)]

    cache = [BatchKVCache(padding) for _ in model.layers]
    pieces = [model(mx.stack(rows), cache)]
    pieces += [model(mx.stack(follow)[:, i : i + 1], cache) for i in range(decoded)]
    logits = mx.concatenate(pieces, axis=1)
    for i, pad in enumerate(padding):
        expected = golden["logits"][i : i + 1, : prompt - pad + decoded]
        assert largest_difference(logits[i : i + 1, pad:], expected) < TOLERANCE


def test_right_padded_prompts_equal_single_rows(model: Any, golden: dict[str, mx.array]) -> None:
    """mlx-lm's batch generator pads prompts on the right, then rolls the cache so that the padding is on the left."""
    tokens, lengths = golden["tokens"], [9, 14, 3]
    longest = max(lengths)
    cache = [BatchKVCache([0, 0, 0]) for _ in model.layers]
    for layer_cache in cache:
        layer_cache.prepare(lengths=lengths, right_padding=[longest - length for length in lengths])
    prompts = model(tokens[:, :longest], cache)  # the tokens after a row's length act as padding
    for layer_cache in cache:
        layer_cache.finalize()
    decoded = model(mx.stack([tokens[i, length : length + 1] for i, length in enumerate(lengths)]), cache)
    for i, length in enumerate(lengths):
        assert largest_difference(prompts[i, :length], golden["logits"][i, :length]) < TOLERANCE
        assert largest_difference(decoded[i, 0], golden["logits"][i, length]) < TOLERANCE


def test_embed_layers_and_head_make_the_model(model: Any, golden: dict[str, mx.array]) -> None:
    tokens = golden["tokens"][:, :8]  # not longer than an attention window
    h = model.embed(tokens)
    assert h.shape == (*tokens.shape, model.args.hidden_size)
    for layer in model.layers:
        assert layer.mlp(h).shape == h.shape
        assert any(isinstance(module, nn.Linear) for module in layer.self_attn.values())
        h = layer(h, "causal", None)
    assert mx.array_equal(model.head(h), model(tokens))


def test_mlp_can_be_replaced(golden: dict[str, mx.array], model: Any) -> None:
    class Doubled(nn.Module):
        def __init__(self, mlp: Any):
            super().__init__()
            self.mlp = mlp

        def __call__(self, x: mx.array) -> mx.array:
            return 2 * self.mlp(x)

    before = model(golden["tokens"])
    model.layers[0].mlp = Doubled(model.layers[0].mlp)
    assert largest_difference(model(golden["tokens"]), before) > 0.1


def test_ffn_norms_are_what_the_ffn_takes(model: Any, golden: dict[str, mx.array]) -> None:
    """Each FFN's input, minus the norm's bias and divided by its weight, has a mean square of 1."""
    norms = model.ffn_norms
    if norms is None or "weight" not in norms[0]:
        pytest.skip("nothing to look ahead with")
    inputs: list[mx.array] = []

    class Kept(nn.Module):
        def __init__(self, mlp: Any):
            super().__init__()
            self.mlp = mlp

        def __call__(self, x: mx.array) -> mx.array:
            inputs.append(x)
            return self.mlp(x)

    for layer in model.layers:
        layer.mlp = Kept(layer.mlp)
    model(golden["tokens"])
    for x, norm in zip(inputs, norms, strict=True):
        normal = (x - norm.bias if "bias" in norm else x) / norm.weight
        assert np.abs(np.array(normal.square().mean(-1)) - 1).max() < 1e-2


def test_sanitize_takes_tensors_one_by_one_and_its_own_names(variant: str, model: Any) -> None:
    weights = checkpoint_of(variant)
    once = model.sanitize(weights)
    assert set(once) == parameter_names(model)
    assert model.sanitize(once).keys() == once.keys()
    one_by_one = {new for name in weights for new in model.sanitize({name: mx.array(0)})}
    assert one_by_one == set(once)


@pytest.mark.parametrize("tied", [False, True])
def test_sanitize_drops_what_the_model_has_no_place_for(variant: str, tied: bool) -> None:
    if tied and variant == "phi-relu":
        pytest.skip("Phi is never tied")
    config = config_of(variant) | {"tie_word_embeddings": tied}
    model = model_classes(config)[0](arguments(variant, tie_word_embeddings=tied))
    extra = {"lm_head.weight": mx.zeros((64, 32))}
    if not variant.startswith("opt"):
        extra["model.layers.0.self_attn.rotary_emb.inv_freq"] = mx.zeros((4,))
    if variant == "bamboo":
        extra["model.layers.0.mlp.predictor.fc1.weight"] = mx.zeros((4, 32))
    assert set(model.sanitize(extra)) == (set() if tied else {"lm_head.weight"})


@pytest.mark.parametrize("name", ["silu", "gelu", ""])
def test_other_activations_are_refused(variant: str, name: str) -> None:
    key = {"opt": "activation_function", "falcon": "activation"}.get(config_of(variant)["model_type"], "hidden_act")
    if (key, name) == ("activation_function", "gelu"):
        pytest.skip("OPT has it")
    with pytest.raises(ValueError, match=rf"{key} .*{name!r}"):
        load(variant, **{key: name})


def test_float16_stays_float16(variant: str, model: Any, golden: dict[str, mx.array]) -> None:
    model.set_dtype(mx.float16)
    logits = model(golden["tokens"])
    assert logits.dtype == mx.float16
    bound = 0.3 if variant == "prosparse" else 0.1  # FATReLU jumps at its threshold, and rounding may go to either side
    assert largest_difference(logits.astype(mx.float32), golden["logits"]) < bound


@pytest.mark.parametrize(
    ("variant", "flat"),
    [
        ("phi-relu", {"rope_theta": 10000.0, "partial_rotary_factor": 0.25}),
        ("nemotron", {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        ("persimmon-no-qk-norm", {"rope_theta": 10000.0, "partial_rotary_factor": 0.5}),
        ("falcon-7b-like", {"rope_theta": 10000.0}),
        ("llama-relu", {"rope_theta": 10000.0}),
    ],
)
def test_rotations_are_read_from_either_place(variant: str, flat: dict[str, float]) -> None:
    config = config_of(variant)
    older = {key: value for key, value in config.items() if key != "rope_parameters"}
    args = model_classes(config)[1]
    assert args.from_dict(config) == args.from_dict(older | flat)
    changed = {**config, "rope_parameters": {**config["rope_parameters"], "rope_theta": 77.0}}
    assert args.from_dict(changed).rope_theta == 77.0


LINEAR = {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}


@pytest.mark.parametrize("variant", ["phi-relu", "nemotron", "persimmon", "falcon-7b-like"])
@pytest.mark.parametrize("changes", [{"rope_parameters": LINEAR}, {"rope_scaling": {"type": "linear", "factor": 2.0}}])
def test_scaled_rotations_are_refused(variant: str, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"rope_scaling is .*'linear'.* not supported"):
        arguments(variant, **changes)


def test_llama_s_rotations_may_be_scaled() -> None:
    tokens = mx.array([[1, 2, 3, 4, 5, 6]])
    scaled = load("llama-relu", rope_parameters=LINEAR)(tokens)
    assert mx.array_equal(scaled, load("llama-relu", rope_parameters=None, rope_scaling=LINEAR)(tokens))
    assert largest_difference(scaled, load("llama-relu")(tokens)) > 0.1


@pytest.mark.parametrize(
    ("variant", "changes", "said"),
    [
        ("phi-relu", {"qk_layernorm": True}, "qk_layernorm is true"),
        ("phi-relu", {"tie_word_embeddings": True}, "tie_word_embeddings is true"),
        ("llama-relu", {"mlp_bias": True}, "mlp_bias is true"),
        ("llama-relu", {"layer_types": ["sliding_attention"] * 3}, "layer_types has other entries than full_attention"),
        ("bamboo", {"sliding_window": 0}, "sliding_window is 0"),
        ("persimmon", {"num_attention_heads": 5}, "hidden_size 32 is not a multiple of num_attention_heads 5"),
        ("persimmon", {"partial_rotary_factor": 0.4}, "rotates 3 of 8 numbers"),
        ("falcon-7b-like", {"num_attention_heads": 5}, "expected each to be a multiple"),
        ("falcon-7b-like", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn is 2"),
        ("falcon-40b-like", {"num_kv_heads": 3}, "expected each to be a multiple"),
        ("falcon-40b-like", {"num_ln_in_parallel_attn": 3}, "num_ln_in_parallel_attn is 3"),
        ("falcon-40b-like", {"parallel_attn": False}, "parallel_attn false is not supported"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(variant: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        arguments(variant, **changes)


@pytest.mark.parametrize("variant", ["bamboo"])
def test_the_window_hides_what_lies_before_it(model: Any) -> None:
    """Three layers that look back 8 tokens see 3 x 7 tokens before the last one and none before those."""
    tokens = mx.arange(24)[None]
    before, at_its_edge = (mx.array(np.where(np.arange(24) == i, 50, np.array(tokens))) for i in (1, 2))
    last = [np.array(model(t)[0, -1]) for t in (tokens, before, at_its_edge)]
    assert np.array_equal(last[0], last[1])
    assert not np.array_equal(last[0], last[2])
    unbounded = load("bamboo", sliding_window=None)
    assert not np.array_equal(np.array(unbounded(tokens)[0, -1]), np.array(unbounded(before)[0, -1]))
    assert mx.array_equal(unbounded(tokens[:, :8]), model(tokens[:, :8]))


def test_mistral_with_relu_is_llama_with_relu_within_the_window() -> None:
    tokens = mx.array([[1, 2, 3, 4, 5, 6]])
    mistral = load("llama-relu", model_type="mistral")
    assert mistral.args.sliding_window == 4096
    assert mx.array_equal(mistral(tokens), load("llama-relu")(tokens))


@pytest.mark.parametrize("variant", ["falcon-rw-like"])
def test_alibi_depends_on_distance_alone(model: Any) -> None:
    """The slopes of four heads are powers of two, so that rounding of the positions cannot hide an error."""
    attention = model.layers[0].self_attn
    assert np.array(attention._slopes.astype(mx.float32)).tolist() == [0.25, 0.0625, 0.015625, 0.00390625]
    bias = np.array(attention._with_alibi(None, 1, 9, None))[:, 0]  # (H, L)
    assert np.allclose(np.diff(bias), 8**-0.5 * np.array([[0.25], [0.0625], [0.015625], [0.00390625]]))


def test_alibi_slopes_of_heads_that_are_no_power_of_two() -> None:
    from mlx_flash.models.fused import alibi_slopes

    found = np.array(alibi_slopes(6).astype(mx.float32))
    expected = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]
    assert found.tolist() == expected
