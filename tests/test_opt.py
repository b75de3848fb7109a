"""Features that only OPT has. Those that it shares with other families are in test_models.py."""

from typing import Any

import mlx.core as mx
import pytest
from golden_models import (  # type: ignore[import-not-found]  # found beside this file
    TOLERANCE,
    checkpoint_of,
    config_of,
    largest_difference,
    load,
    parameter_names,
)
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.models.opt import Model, ModelArgs

pytestmark = pytest.mark.usefixtures("one_processor")

VARIANTS = ["opt-pre", "opt-350m-like", "opt-nobias"]


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> str:
    return request.param


def test_variants_differ_in_what_they_are_for() -> None:
    pre, post, no_bias = (Model(ModelArgs.from_dict(config_of(name))) for name in VARIANTS)
    names = parameter_names(pre)
    assert "model.decoder.final_layer_norm.weight" in names and "lm_head.weight" not in names
    names = parameter_names(post)
    assert "model.decoder.project_in.weight" in names and "model.decoder.final_layer_norm.weight" not in names
    names = parameter_names(no_bias)
    assert "lm_head.weight" in names and not any("bias" in name or "norm" in name for name in names)


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
