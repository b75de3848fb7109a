"""The table of families: each row agrees with the golden checkpoints, and refusals have clear sentences."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from conftest import GOLDEN, Tiny, write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from golden_models import VARIANTS, checkpoint_of, config_of  # type: ignore[import-not-found]
from mlx.utils import tree_flatten

from mlx_flash import models
from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.errors import CheckpointError, UnsupportedModelError
from mlx_flash.layers.activations import Activation
from mlx_flash.loading.load import load
from mlx_flash.loading.model_types import activation_of, family_of, family_types, model_classes, runs_as_it_is
from mlx_flash.text.generation import stream_generate
from mlx_flash.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_processor")

KINDS = {
    "bamboo": Activation("drelu"),
    "nemotron": Activation("relu2"),
    "persimmon": Activation("relu2"),
    "persimmon-no-qk-norm": Activation("relu2"),
    "prosparse": Activation("relu", 0.125),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_name_the_ffn_of_their_models(variant: str) -> None:
    config = config_of(variant)
    family = family_of(config, variant)
    assert activation_of(config, variant) == KINDS.get(variant, Activation())
    model_class, args_class = model_classes(config)
    model = model_class(args_class.from_dict(config))
    weights = model.sanitize(checkpoint_of(variant))
    for layer in range(config["num_hidden_layers"]):
        of_layer = family.weights(layer) + list(family.biases_of(layer))
        assert set(family.weights(layer)) <= set(weights)
        ffn = family.ffn.format(layer) + "."
        assert {name for name in weights if name.startswith(ffn)} <= set(of_layer)


def test_every_row_has_a_model_and_a_golden_checkpoint() -> None:
    for model_type in family_types():
        assert model_classes({"model_type": model_type})
    # A Mistral with ReLU computes with Bamboo's attention and Llama's FFN.
    assert {config_of(variant)["model_type"] for variant in VARIANTS} == set(family_types()) - {"mistral"}


SQUIRREL = """
from dataclasses import dataclass, replace

from mlx_flash.models import llama

FAMILY = replace(llama.FAMILY, matrices=("w1", "w3", "w2"), activations={"nutty": "relu2"}, default_activation="nutty")

@dataclass
class ModelArgs(llama.ModelArgs):
    hidden_act: str = "nutty"

class Model(llama.Model):
    family = FAMILY
"""


def test_a_new_family_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The family is converted, loaded and streamed with the whole model's tokens, and no other file knows it."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "squirrel.py").write_text(SQUIRREL)
    monkeypatch.setattr(models, "__path__", [*models.__path__, str(tmp_path / "models")])
    monkeypatch.setattr(models, "squirrel", None, raising=False)  # monkeypatch removes it at the end
    monkeypatch.setitem(sys.modules, "mlx_flash.models.squirrel", None)
    del sys.modules["mlx_flash.models.squirrel"]
    assert "squirrel" in family_types()

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 96, "num_attention_heads": 4}
    config = {"model_type": "squirrel", **sizes, "rms_norm_eps": 1e-5, "vocab_size": 64}
    model_class, args_class = model_classes(config)
    dense = model_class(args_class.from_dict(config))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(dense.parameters())))
    write_tokenizer(folder, 64)
    manifest = convert(folder, tmp_path / "store", Settings(calibration_tokens=64))
    assert manifest.activation["kind"] == "relu2" and manifest.layout.parts == ("gate", "up", "down")
    model, tokenizer = load(tmp_path / "store", predictor="exact")
    streamed = [response.token for response in stream_generate(model, tokenizer, [5, 6, 7], max_tokens=12)]
    model.flash.close()
    tokens = [5, 6, 7]
    for _ in streamed:
        tokens.append(int(mx.argmax(dense(mx.array([tokens]))[0, -1])))
    assert tokens[3:] == streamed


@pytest.mark.parametrize(
    ("config", "by_layers"),
    [
        ({"model_type": "qwen2"}, True),
        ({"model_type": "llama", "hidden_act": "silu"}, True),
        ({"model_type": "llama"}, True),
        ({"model_type": "phi", "hidden_act": "gelu_new"}, True),
        ({"model_type": "llama", "hidden_act": "relu"}, False),
        ({"model_type": "opt", "activation_function": "relu"}, False),
        ({"model_type": "nemotron", "hidden_act": "relu2"}, False),
    ],
)
def test_which_dense_models_are_run_by_layers(config: dict[str, Any], by_layers: bool) -> None:
    assert runs_as_it_is(config, "X") is by_layers


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "llama", "hidden_act": "silu"},
            "X uses the activation 'silu', which leaves no neuron exactly zero. It is a dense model (llama), which "
            "needs no conversion: its layers are streamed. Run it as it is.",
        ),
        (
            {"model_type": "falcon"},
            "X uses the activation 'gelu' by default (its config.json has no activation; if its own code computes "
            'relu, add "activation": "relu"), which neither mlx_flash nor mlx-lm computes for falcon: mlx_flash '
            "computes relu. Use a relufied version (SparseLLM/ReluFalcon-40B) instead.",
        ),
        ({"model_type": "mistral", "hidden_act": "gelu"}, "its mixture-of-experts sibling Mixtral instead."),
        ({"model_type": "phi", "hidden_act": "gelu_new"}, "It is a dense model (phi), which needs no conversion"),
        ({"model_type": "llama", "hidden_act": "gelu"}, "which neither mlx_flash nor mlx-lm computes for llama"),
        ({"model_type": "nemotron", "hidden_act": "silu"}, "for nemotron: mlx_flash computes relu2."),
        ({"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": -1}, "threshold -1"),
        ({"model_type": "sparsellama", "hidden_act": "fatrelu", "hidden_act_param": 10**400}, "threshold 1000"),
    ],
)
def test_what_is_refused_is_named_with_what_would_work(config: dict[str, Any], said: str) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        activation_of(config, "X")
    assert said in str(caught.value)


def test_only_fatrelu_has_a_threshold() -> None:
    config = {"model_type": "sparsellama", "hidden_act_param": 0.5}
    found = [activation_of({**config, "hidden_act": name}, "X") for name in ("relu", "fatrelu")]
    assert [activation.threshold for activation in found] == [0.0, 0.5]


def published(tmp_path: Path, variant: str, **changes: Any) -> Path:
    """A golden checkpoint with other keys in its config.json; None removes a key."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    config = {key: value for key, value in (config_of(variant) | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), checkpoint_of(variant))
    write_tokenizer(folder, 64)
    return folder


def test_predictors_that_a_checkpoint_brings_along_are_left_out(tmp_path: Path) -> None:
    folder = published(tmp_path, "bamboo")
    extra = {f"model.layers.{i}.mlp.predictor.fc1.weight": mx.zeros((4, 32)) for i in range(3)}
    mx.save_safetensors(str(folder / "model.safetensors"), checkpoint_of("bamboo") | extra)
    manifest = convert(folder, tmp_path / "store", Settings(calibration_tokens=64))
    assert manifest.activation == {"kind": "drelu", "threshold": 0.0}
    assert not any("predictor" in name for name in mx.load(str(tmp_path / "store" / manifest.resident_file)))


@pytest.mark.parametrize(
    ("variant", "changes", "said"),
    [
        ("falcon-40b-like", {"parallel_attn": False}, "parallel_attn false is not supported"),
        ("llama-relu", {"rope_parameters": None, "rope_scaling": {"type": "xpos", "factor": 2}}, "RoPE type xpos"),
        ("phi-relu", {"qk_layernorm": True}, "qk_layernorm is true, which is not supported for Phi"),
    ],
)
def test_variants_that_are_not_supported_are_refused(
    tmp_path: Path, variant: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(CheckpointError, match=said):
        convert(published(tmp_path, variant, **changes), tmp_path / "store", Settings(calibration_tokens=64))


@pytest.mark.parametrize(
    ("variant", "said"),
    [
        ("prosparse", "exact: all gates, a third of the FFN; the other two thirds are streamed"),
        ("persimmon", "exact: all up projections, half of the FFN; the other half is streamed"),
    ],
)
def test_the_plan_says_what_the_exact_predictor_keeps(
    tiny_of: Callable[[str], Tiny], open_model: Callable[..., Any], variant: str, said: str
) -> None:
    told: list[str] = []
    model = open_model(tiny_of(variant).store, predictor="exact", say=told.append)
    assert said in "\n".join(told)
    layout = model.flash.manifest.layout
    item_bytes = 4 if mx.default_device() == mx.cpu else 2
    kept = layout.layers * layout.neurons * layout.width * item_bytes
    assert model.flash.plan.demand.predictors == kept
    assert model.flash.plan.slot_bytes < layout.block_bytes


def test_a_checkpoint_s_own_code_is_neither_run_nor_asked_about(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = published(tmp_path, "prosparse")
    assert "auto_map" in config_of("prosparse")
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    assert load_tokenizer(folder).encode("ab") == [0, 1, 2]
    assert not caplog.records
    path = folder / "tokenizer_config.json"
    own = {"auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}, "tokenizer_class": "OwnTokenizer"}
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    with pytest.raises(CheckpointError, match="contains custom code"):
        load_tokenizer(folder)


def test_golden_checkpoints_are_small() -> None:
    assert all(path.stat().st_size < 130_000 for path in GOLDEN.glob("*/model.safetensors"))
