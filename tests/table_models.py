"""Tiny random models with lookup tables, made and saved with mlx-lm's own models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mixtures import MLA, QUANTISATIONS, save_model  # type: ignore[import-not-found]
from mlx.utils import tree_flatten

VOCABULARY = 96
PLAIN: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {**PLAIN, "tie_word_embeddings": False},
    "gemma3n": {
        "text_config": {
            **PLAIN,
            "model_type": "gemma3n_text",
            "num_hidden_layers": 4,
            "intermediate_size": [64] * 4,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": 80,
            "sliding_window": 8,
            "rope_local_base_freq": 10000.0,
            "final_logit_softcapping": 30.0,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
            "hidden_size_per_layer_input": 32,
            "altup_num_inputs": 2,
            "altup_coef_clip": 120.0,
            "altup_correct_scale": True,
            "altup_active_idx": 0,
            "laurel_rank": 16,
        }
    },
    "gemma4": {
        "vocab_size": VOCABULARY,  # mlx-lm's model takes it from here
        "text_config": {
            **PLAIN,
            "model_type": "gemma4_text",
            "num_hidden_layers": 4,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "num_kv_shared_layers": 2,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": VOCABULARY,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "use_double_wide_mlp": False,
        },
    },
    "longcat_flash_ngram": {
        **PLAIN,
        "attention_bias": False,
        "ffn_hidden_size": 64,
        "moe_topk": 2,
        "expert_ffn_hidden_size": 64,
        "n_routed_experts": 6,
        "zero_expert_num": 2,
        "num_layers": 2,
        "hidden_size": 192,
        "kv_lora_rank": MLA["kv_lora_rank"],
        "q_lora_rank": MLA["q_lora_rank"],
        "qk_rope_head_dim": MLA["qk_rope_head_dim"],
        "qk_nope_head_dim": MLA["qk_nope_head_dim"],
        "v_head_dim": MLA["v_head_dim"],
        "routed_scaling_factor": 1.5,
        "mla_scale_q_lora": True,
        "mla_scale_kv_lora": True,
        "ngram_vocab_size_ratio": 3,
        "emb_neighbor_num": 3,
        "emb_split_num": 1,
    },
}


def make_model(folder: Path, name: str, quantisation: str = "plain", shards: int = 1, **changes: Any) -> Path:
    """Writes config.json and model*.safetensors of a random model, in float32 except for quantised tensors."""
    from mlx_lm.utils import _get_classes

    config = {"model_type": name, **MODELS[name], **changes}
    model_class, args_class = _get_classes(config)
    mx.random.seed(len(name))
    model = model_class(args_class.from_dict(config))
    parameters: Any = tree_flatten(model.parameters())
    noise = [(path, array, mx.random.normal(array.shape)) for path, array in parameters]
    scales = [0.1 if array.ndim < 2 else 1.5 / array.shape[-1] ** 0.5 for _, array, _ in noise]
    shifts = [1 if path.endswith("norm.weight") else 0 for path, _, _ in noise]
    model.load_weights([(n[0], n[2] * scale + shift) for n, scale, shift in zip(noise, scales, shifts, strict=True)])
    if (settings := QUANTISATIONS[quantisation]) is not None:
        fitting = lambda _, module: hasattr(module, "to_quantized") and module.weight.shape[-1] % 64 == 0  # noqa: E731
        nn.quantize(model, **settings, class_predicate=fitting)
        config["quantization"] = settings
    return save_model(folder, model, config, shards)
