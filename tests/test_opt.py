"""OPT against transformers' logits (``tests/golden/make_opt.py``), and the cached ways against the plain one."""

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.cache import BatchKVCache, make_prompt_cache

from mlx_flash.models.opt import Model, ModelArgs

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = ["opt-pre", "opt-350m-like", "opt-nobias"]
TOLERANCE = 1e-4  # logits have a standard deviation above 1


def config_of(variant: str) -> dict[str, Any]:
    return json.loads((GOLDEN / variant / "config.json").read_text())


def checkpoint_of(variant: str) -> dict[str, mx.array]:
    weights = mx.load(str(GOLDEN / variant / "model.safetensors"))
    assert isinstance(weights, dict)
    return {name: weight.astype(mx.float32) for name, weight in weights.items()}


def load(variant: str, **changes: Any) -> Model:
    model = Model(ModelArgs.from_dict({**config_of(variant), **changes}))
    model.load_weights(list(model.sanitize(checkpoint_of(variant)).items()), strict=True)
    return model


def parameter_names(model: Model) -> set[str]:
    return {name for name, _ in list(tree_flatten(model.parameters()))}


def largest_difference(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return float(np.abs(np.array(a) - np.array(b)).max())


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def model(variant: str) -> Model:
    return load(variant)


@pytest.fixture
def golden(variant: str) -> dict[str, mx.array]:
    with np.load(GOLDEN / variant / "golden.npz") as arrays:
        return {name: mx.array(arrays[name]) for name in arrays.files}


def test_variants_differ_in_what_they_are_for() -> None:
    pre, post, no_bias = (Model(ModelArgs.from_dict(config_of(name))) for name in VARIANTS)
    names = parameter_names(pre)
    assert "model.decoder.final_layer_norm.weight" in names and "lm_head.weight" not in names
    names = parameter_names(post)
    assert "model.decoder.project_in.weight" in names and "model.decoder.final_layer_norm.weight" not in names
    names = parameter_names(no_bias)
    assert "lm_head.weight" in names and not any("bias" in name or "norm" in name for name in names)


def test_logits_agree_with_transformers(model: Model, golden: dict[str, mx.array]) -> None:
    assert largest_difference(model(golden["tokens"]), golden["logits"]) < TOLERANCE


@pytest.mark.parametrize("chunk", [1, 7])
def test_through_the_cache_in_chunks(model: Model, golden: dict[str, mx.array], chunk: int) -> None:
    tokens = golden["tokens"]
    cache = make_prompt_cache(model)
    pieces = [model(tokens[:, i : i + chunk], cache) for i in range(0, tokens.shape[1], chunk)]
    assert cache[0].offset == tokens.shape[1]
    assert largest_difference(mx.concatenate(pieces, axis=1), golden["logits"]) < TOLERANCE


def test_greedy_continuation_agrees_with_transformers(model: Model, golden: dict[str, mx.array]) -> None:
    cache = make_prompt_cache(model)
    logits = model(golden["tokens"][:1], cache)
    continuation: list[int] = []
    for _ in range(golden["greedy"].size):
        continuation.append(np.array(logits[0, -1]).argmax().item())
        logits = model(mx.array([continuation[-1:]]), cache)
    assert continuation == golden["greedy"].tolist()


def test_left_padded_batch_equals_single_rows(model: Model, golden: dict[str, mx.array]) -> None:
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


def test_right_padded_prompts_equal_single_rows(model: Model, golden: dict[str, mx.array]) -> None:
    """mlx-lm's batch generator pads prompts on the right, then rolls the cache so that the padding is on the left."""
    tokens, lengths = golden["tokens"], [9, 14, 3]
    longest = max(lengths)
    cache = [BatchKVCache([0, 0, 0]) for _ in model.layers]
    for layer_cache in cache:
        layer_cache.prepare(lengths=lengths, right_padding=[longest - length for length in lengths])
    prompts = model(tokens[:, :longest], cache)  # whatever follows a row's length stands in for padding
    for layer_cache in cache:
        layer_cache.finalize()
    decoded = model(mx.stack([tokens[i, length : length + 1] for i, length in enumerate(lengths)]), cache)
    for i, length in enumerate(lengths):
        assert largest_difference(prompts[i, :length], golden["logits"][i, :length]) < TOLERANCE
        assert largest_difference(decoded[i, 0], golden["logits"][i, length]) < TOLERANCE


def test_embed_layers_and_head_make_the_model(model: Model, golden: dict[str, mx.array]) -> None:
    tokens = golden["tokens"]
    h = model.embed(tokens)
    assert h.shape == (*tokens.shape, model.args.hidden_size)
    for layer in model.layers:
        assert layer.mlp(h).shape == h.shape
        h = layer(h, "causal", None)
    assert mx.array_equal(model.head(h), model(tokens))


def test_mlp_can_be_replaced(golden: dict[str, mx.array], model: Model) -> None:
    class Doubled(nn.Module):
        def __init__(self, mlp: Any):
            super().__init__()
            self.mlp = mlp

        def __call__(self, x: mx.array) -> mx.array:
            return 2 * self.mlp(x)

    before = model(golden["tokens"])
    model.layers[0].mlp = Doubled(model.layers[0].mlp)
    assert largest_difference(model(golden["tokens"]), before) > 0.1


def test_embed_offsets(model: Model, golden: dict[str, mx.array]) -> None:
    tokens = golden["tokens"]
    assert mx.array_equal(model.embed(tokens, 5), model.embed(tokens, mx.array([5, 5, 5])))
    assert mx.array_equal(model.embed(tokens, 5), model.embed(tokens, mx.array(5)))
    # Not to the bit: with project_in, a BLAS may round a product of fewer rows differently.
    assert largest_difference(model.embed(tokens)[:, 9:], model.embed(tokens[:, 9:], 9)) < 1e-5
    assert largest_difference(model.embed(tokens, 1), model.embed(tokens, 0)) > 0.1


def test_array_offsets_stay_inside_the_table(model: Model) -> None:
    token = mx.array([[3]])
    last = model.args.max_position_embeddings - 1
    assert mx.array_equal(model.embed(token, mx.array([-100])), model.embed(token, 0))
    assert mx.array_equal(model.embed(token, mx.array([last + 100])), model.embed(token, last))


def test_sanitize_takes_every_form_of_name(variant: str, model: Model) -> None:
    weights = checkpoint_of(variant)
    once = model.sanitize(weights)
    assert set(once) == parameter_names(model)
    assert model.sanitize(once).keys() == once.keys()
    assert any(".mlp.fc1.weight" in name for name in once)

    short = {name.removeprefix("model."): weight for name, weight in weights.items()}
    assert any(name.startswith("decoder.") for name in short)
    assert model.sanitize(short).keys() == once.keys()
    for name, weight in model.sanitize(short).items():
        assert weight is once[name]


def test_sanitize_drops_what_the_model_has_no_place_for(variant: str, model: Model) -> None:
    extra = {
        "lm_head.weight": mx.zeros((64, 32)),
        "decoder.version": mx.zeros((1,)),
        "decoder.final_layer_norm.weight": mx.zeros((32,)),
    }
    kept = {
        "opt-pre": {"model.decoder.final_layer_norm.weight"},
        "opt-350m-like": set(),
        "opt-nobias": {"lm_head.weight", "model.decoder.final_layer_norm.weight"},
    }
    assert set(model.sanitize(extra)) == kept[variant]


def test_remove_final_layer_norm(golden: dict[str, mx.array], variant: str) -> None:
    if variant == "opt-350m-like":
        pytest.skip("a post-norm model has no final norm to remove")
    tokens, model, bare = golden["tokens"], load(variant), load(variant, _remove_final_layer_norm=True)
    h = model.embed(tokens)
    for layer in model.layers:
        h = layer(h, "causal")
    output = model.model.decoder.embed_tokens.as_linear if variant == "opt-pre" else model.lm_head
    assert largest_difference(bare(tokens), output(h)) < TOLERANCE
    assert largest_difference(bare(tokens), model(tokens)) > 0.1


def test_positions_past_the_table_are_refused() -> None:
    model = load("opt-pre")
    assert model(mx.zeros((1, 64), dtype=mx.int32)).shape == (1, 64, 64)
    with pytest.raises(ValueError, match="position 65 is past this model's 64 positions"):
        model(mx.zeros((1, 65), dtype=mx.int32))
    cache = make_prompt_cache(model)
    model(mx.zeros((1, 64), dtype=mx.int32), cache)
    with pytest.raises(ValueError, match="position 65 is past this model's 64 positions"):
        model(mx.zeros((1, 1), dtype=mx.int32), cache)
    assert cache[0].offset == 64


def test_gelu_is_the_exact_one() -> None:
    model = load("opt-pre", activation_function="gelu")
    mlp: Any = model.layers[0].mlp
    x = mx.linspace(-3, 3, 32).reshape(1, 1, 32)
    hidden = mlp.fc1(x)
    expected = mlp.fc2(hidden * (1 + mx.erf(hidden / 2**0.5)) / 2)
    assert largest_difference(mlp(x), expected) < 1e-5
    assert largest_difference(mlp(x), load("opt-pre").layers[0].mlp(x)) > 1e-2


@pytest.mark.parametrize("name", ["silu", "gelu_new", ""])
def test_other_activations_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"activation_function .* is not supported for OPT"):
        ModelArgs.from_dict({**config_of("opt-pre"), "activation_function": name})


def test_heads_must_divide_the_width() -> None:
    with pytest.raises(ValueError, match="hidden_size 32 is not a multiple of num_attention_heads 5"):
        ModelArgs.from_dict({**config_of("opt-pre"), "num_attention_heads": 5})


def test_float16_stays_float16(model: Model, golden: dict[str, mx.array]) -> None:
    model.set_dtype(mx.float16)
    logits = model(golden["tokens"])
    assert logits.dtype == mx.float16
    assert largest_difference(logits.astype(mx.float32), golden["logits"]) < 0.1
