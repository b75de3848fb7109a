"""The gated demo model: its files match its card, and it streams like the model in memory."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import Tiny  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache

from mlx_flash.convert.conversion import Settings, convert
from mlx_flash.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.usefixtures("one_processor")

FOLDER = Path(__file__).parent / "models" / "gated-demo"
LARGEST_BYTES = 8_000_000  # includes the tokenizer
TEXT = (
    "The old man put down his pipe and looked at the fire. It was a cold night, and the wind went about the house like "
    "a thing that wished to come in. 'You must not go to-morrow,' he said to the boy, who sat upon the floor with the "
    "dog between his knees; 'there is snow upon the hills, and the river is not to be crossed until it is frozen.'"
)


@pytest.fixture(scope="module")
def config() -> dict[str, Any]:
    return json.loads((FOLDER / "config.json").read_text())


@pytest.fixture(scope="module")
def weights() -> dict[str, mx.array]:
    loaded = mx.load(str(FOLDER / "model.safetensors"))
    assert isinstance(loaded, dict)
    return loaded


@pytest.fixture(scope="module")
def card() -> str:
    return (FOLDER / "README.md").read_text()


@pytest.fixture(scope="module")
def text_ids(config: dict[str, Any]) -> mx.array:
    """Token ids of the text, (1, T)."""
    return mx.array([load_tokenizer(FOLDER, config).encode(TEXT)])


@pytest.fixture(scope="module")
def dense_logits(gated: Tiny, text_ids: mx.array) -> np.ndarray:
    """Logits (T, V) of the whole text in one call."""
    return np.array(gated.dense(text_ids)[0])


@pytest.fixture(scope="module")
def gated(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    store = tmp_path_factory.mktemp("gated-demo") / "store"
    convert(FOLDER, store, Settings())
    return Tiny(FOLDER, store)


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The tensors of a Llama without biases and with tied embeddings."""
    d, f = config["hidden_size"], config["intermediate_size"]
    key_value_width = config["num_key_value_heads"] * config["head_dim"]
    layer = {
        "input_layernorm": (d,),
        "post_attention_layernorm": (d,),
        "self_attn.q_proj": (d, d),
        "self_attn.k_proj": (key_value_width, d),
        "self_attn.v_proj": (key_value_width, d),
        "self_attn.o_proj": (d, d),
        "mlp.gate_proj": (f, d),
        "mlp.up_proj": (f, d),
        "mlp.down_proj": (d, f),
    }
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], d), "model.norm.weight": (d,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def test_it_is_a_gated_relu_llama(config):
    assert (config["model_type"], config["hidden_act"]) == ("llama", "relu")
    assert config["architectures"] == ["LlamaForCausalLM"] and config["tie_word_embeddings"]
    assert config["num_key_value_heads"] < config["num_attention_heads"]


def test_it_is_small():
    assert 0 < sum(path.stat().st_size for path in FOLDER.iterdir()) <= LARGEST_BYTES


def test_the_weights_are_those_of_the_configuration(config, weights):
    assert {name: weight.shape for name, weight in weights.items()} == expected_shapes(config)
    for name, weight in weights.items():
        assert weight.dtype == mx.float16, name
        assert mx.isfinite(weight).all().item() and weight.astype(mx.float32).std().item() > 1e-3, name


def test_the_card_states_its_parameters(card, weights):
    millions = sum(weight.size for weight in weights.values()) / 1e6
    assert f"| {millions:.2f} million parameters in float16" in card


def test_it_has_learnt_and_its_gates_are_sparse(card, gated, text_ids):
    model = gated.dense
    stated = [float(share) / 100 for share in re.findall(r"^\| \d+ \| ([\d.]+)% \|$", card, re.MULTILINE)]
    assert len(stated) == len(model.layers) and all(0.7 < share < 0.98 for share in stated)
    hidden = model.embed(text_ids)
    for layer, share in zip(model.layers, stated, strict=True):
        hidden = hidden + layer.self_attn(layer.input_layernorm(hidden), mask="causal")
        x = layer.post_attention_layernorm(hidden)
        assert (layer.mlp.gate_proj(x) <= 0).mean().item() == pytest.approx(share, abs=0.05)
        hidden = hidden + layer.mlp(x)
    loss = nn.losses.cross_entropy(model.head(hidden)[:, :-1], text_ids[:, 1:], reduction="mean")
    assert np.array(loss) < 5.5  # a uniform guess costs ln 4096 = 8.3


def test_its_tokenizer_fits_it(config):
    tokenizer = load_tokenizer(FOLDER, config)
    text = "It was a dark night, and the dogs pulled."
    ids = tokenizer.encode(text)
    assert ids[0] == config["bos_token_id"] and tokenizer.decode(ids, skip_special_tokens=True).strip() == text
    assert len(tokenizer.get_vocab()) == config["vocab_size"]
    assert tokenizer.eos_token_ids == {config["eos_token_id"]}


@pytest.mark.parametrize("predictor", ["none", "exact"])
def test_it_streams_as_it_runs_in_memory(
    gated: Tiny, open_model: Callable[..., Any], text_ids: mx.array, dense_logits: np.ndarray, predictor: str
) -> None:
    streamed = open_model(gated.store, slots=gated.manifest.layout.blocks // 4, predictor=predictor)
    cache = make_prompt_cache(streamed)
    for position in range(40):
        ours = streamed(text_ids[:, position : position + 1], cache=cache)
        assert np.abs(np.array(ours[0, 0]) - dense_logits[position]).max() < 1e-3, position
    counters = streamed.flash.streamer.counters
    assert counters.misses > 0 and (counters.hits > 0) == (predictor == "exact")  # "none" reads all neurons in order


def test_its_predictor_catches_what_it_is_set_to_catch(gated: Tiny) -> None:
    report = gated.manifest.predictors[gated.manifest.default_predictor]
    for recall, predicted, active in zip(report["recall"], report["predicted"], report["active"], strict=True):
        assert 0.98 < recall <= 1 and 0.02 < active < predicted < 2 * active
