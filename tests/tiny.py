"""Tiny random checkpoints of OPT and of a gated Llama, as sparse as real ones."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np


def make_checkpoint(
    folder: Path,
    *,
    layers: int = 2,
    hidden: int = 64,
    neurons: int = 256,
    vocab: int = 96,
    positions: int = 64,
    dtype: mx.Dtype = mx.float32,
    bias: float = -1.0,
    seed: int = 0,
    **config: object,
) -> Path:
    """Writes config.json and model.safetensors; `bias` moves the FFN's activations (-1: about one neuron in six)."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)

    def normal(*shape: int, scale: float) -> mx.array:
        return mx.array(rng.standard_normal(shape, dtype=np.float32) * scale).astype(dtype)

    prefix = "model.decoder."
    weights = {
        prefix + "embed_tokens.weight": normal(vocab, hidden, scale=1.0),
        prefix + "embed_positions.weight": normal(positions + 2, hidden, scale=0.1),
        prefix + "final_layer_norm.weight": mx.ones((hidden,), dtype),
        prefix + "final_layer_norm.bias": normal(hidden, scale=0.1),
    }
    for i in range(layers):
        layer = f"{prefix}layers.{i}."
        for name in ("q", "k", "v", "out"):
            weights[f"{layer}self_attn.{name}_proj.weight"] = normal(hidden, hidden, scale=hidden**-0.5)
            weights[f"{layer}self_attn.{name}_proj.bias"] = normal(hidden, scale=0.02)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            weights[f"{layer}{name}.weight"] = mx.ones((hidden,), dtype)
            weights[f"{layer}{name}.bias"] = normal(hidden, scale=0.02)
        weights[f"{layer}fc1.weight"] = normal(neurons, hidden, scale=hidden**-0.5)
        weights[f"{layer}fc1.bias"] = normal(neurons, scale=0.1) + mx.array(bias, dtype)
        weights[f"{layer}fc2.weight"] = normal(hidden, neurons, scale=neurons**-0.5)
        weights[f"{layer}fc2.bias"] = normal(hidden, scale=0.02)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    settings = {
        "model_type": "opt",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "num_hidden_layers": layers,
        "ffn_dim": neurons,
        "num_attention_heads": 4,
        "max_position_embeddings": positions,
        "activation_function": "relu",
        **config,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def make_gated_checkpoint(folder: Path, *, hidden: int = 64, neurons: int = 256, vocab: int = 96) -> Path:
    """Writes a float32 Llama with FATReLU. Its gates are normal with unit spread, and about one in six is active."""
    rng = np.random.default_rng(2)
    folder.mkdir(parents=True, exist_ok=True)

    def normal(*shape: int, scale: float) -> mx.array:
        return mx.array(rng.standard_normal(shape, dtype=np.float32) * scale)

    weights = {
        "model.embed_tokens.weight": normal(vocab, hidden, scale=1.0),
        "lm_head.weight": normal(vocab, hidden, scale=1.0),
        "model.norm.weight": mx.ones((hidden,)),
    }
    for i in range(2):
        layer = f"model.layers.{i}."
        for name in ("q", "k", "v", "o"):
            weights[f"{layer}self_attn.{name}_proj.weight"] = normal(hidden, hidden, scale=hidden**-0.5)
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"{layer}{name}.weight"] = mx.ones((hidden,))
        for name in ("gate", "up"):
            weights[f"{layer}mlp.{name}_proj.weight"] = normal(neurons, hidden, scale=hidden**-0.5)
        weights[f"{layer}mlp.down_proj.weight"] = normal(hidden, neurons, scale=neurons**-0.5)
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    settings = {
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": neurons,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "hidden_act": "fatrelu",
        "hidden_act_param": 1.0,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
