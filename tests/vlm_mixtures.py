"""Tiny random mixtures of types that mlx-vlm builds, in the layout that it saves: the one of mlx-community."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from conftest import write_tokenizer  # type: ignore[import-not-found]
from mixtures import MLA, QUANTISATIONS, VOCABULARY, random_like  # type: ignore[import-not-found]
from mlx.utils import tree_flatten
from tokenizers import Tokenizer

from mlx_flash.source.zoos import random_mlx_vlm_model

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "eos_token_id": 95,
}
HYPER = {"hc_mult": 2, "hc_sinkhorn_iters": 3}
ROPE = {"type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4, "partial_rotary_factor": 0.25}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "out_hidden_size": 64,
    "num_heads": 2,
    "num_position_embeddings": 16,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "num_experts": 8,
    "num_experts_per_tok": 3,
    "shared_expert_intermediate_size": 64,
    "rope_parameters": ROPE,
}
# model_type -> (settings of the text model, settings beside it, name of the text model's part; "" if there is none)
GEMMA4_BESIDE = {
    "vision_config": {
        "model_type": "gemma4_vision",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 4,
        "position_embedding_size": 64,
    },
    "audio_config": None,
}
TYPES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "qwen4_exp": (
        {
            "model_type": "qwen4_exp",
            "num_hidden_layers": 4,
            "hc_count": 2,
            "hc_lowrank": 32,
            "ple_layer_ids": [1],
            "ple_embed_dim": 128,  # 32 columns for each head of each n-gram
            "ngram_size": 3,
            "heads_per_ngram": 2,
            "ngram_vocab_size_base": 200,
            "make_ngram_vocab_size_divisible_by": 8,
            "split_ngram_parts": 4,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 16,
            "indexer_compress_ratio": 4,
            **LINEAR,
        },
        {"vision_config": {**QWEN_VISION, "model_type": "qwen4_exp", "deepstack_visual_indexes": []}},
        "text_config",
    ),
    "deepseek_v4": (
        {
            "num_hidden_layers": 4,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "num_experts_per_tok": 3,
            "q_lora_rank": 32,
            "o_lora_rank": 32,
            "o_groups": 2,
            "qk_rope_head_dim": 16,
            "compress_ratios": [0, 4, 128, 0],
            "num_hash_layers": 1,
            "sliding_window": 8,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "index_topk": 4,
            **HYPER,
        },
        {},
        "",
    ),
    "glm5_next": (
        {
            "model_type": "glm5_next_text",
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 0,
            "v_head_dim": 32,
            "qk_nope_head_dim": 32,
            "index_topk": 8,
            "index_kpool": 4,
            "index_head_dim": 32,
            "index_n_heads": 2,
            "first_k_dense_replace": 1,
            "linear_head_dim": 32,
            "linear_num_heads": 2,
            **HYPER,
        },
        {
            "vision_config": {
                "depth": 1,
                "hidden_size": 32,
                "num_heads": 2,
                "patch_size": 4,
                "image_size": 16,
                "out_hidden_size": 64,
                "intermediate_size": 64,
                "projection_intermediate_size": 64,
            }
        },
        "text_config",
    ),
    "cohere2_moe": (
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "sliding_window": 8,
            "sliding_window_pattern": 2,
            "moe_num_shared_experts": 1,
            "logit_scale": 1.0,
        },
        {},
        "",
    ),
    "flint": (
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 64,
            "sliding_window": 9,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        {},
        "",
    ),
    "hy_v4": (
        {
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "v_head_dim": 32,
            "qk_nope_head_dim": 32,
            "index_head_dim": 32,
            "index_n_heads": 2,
            "index_topk": 8,
            "hc_mult": 2,
        },
        {},
        "",
    ),
    "kolibri1": (
        {
            "num_experts": 8,
            "num_experts_per_tok": 3,
            "shared_expert_intermediate_size": 64,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention"],
        },
        {},
        "",
    ),
    "longcat_flash_sparse": (
        {
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 64,
            "moe_topk": 3,
            "n_routed_experts": 8,
            "zero_expert_num": 2,
            "num_layers": 2,
            "kv_lora_rank": 32,
            "q_lora_rank": 32,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 32,
            "v_head_dim": 32,
            "index_n_heads": 2,
            "index_head_dim": 32,
            "index_topk": 8,
        },
        {},
        "",
    ),
    "qwen3_5_moe_text": ({"num_hidden_layers": 4, **LINEAR}, {}, ""),
    "xing4_0": (
        {**MLA, **HYPER, "topk_method": "noaux_tc", "rope_scaling": None},
        {},
        "",
    ),
    "mimo_v2": (
        {
            "num_hidden_layers": 3,
            "v_head_dim": 16,
            "swa_head_dim": 32,
            "swa_v_head_dim": 16,
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_rope_theta": 10000.0,
            "partial_rotary_factor": 0.5,
            "layernorm_epsilon": 1e-5,
            "sliding_window_size": 8,
            "hybrid_layer_pattern": [0, 1, 0],
            "moe_layer_freq": [0, 1, 1],
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
        },
        {"vision_config": {}, "audio_config": {}},
        "",
    ),
    "step3p7": (
        {
            "model_type": "step3p5",
            "num_hidden_layers": 3,
            "num_attention_groups": 2,
            "moe_num_experts": 8,
            "moe_top_k": 3,
            "share_expert_dim": 64,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            "moe_layers_enum": [1, 2],
            "attention_other_setting": {
                "attention_type": "sliding_attention",
                "num_attention_heads": 4,
                "num_attention_groups": 2,
                "head_dim": 32,
            },
        },
        {"vision_config": {"width": 32, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14, "mlp_ratio": 2.0}},
        "text_config",
    ),
    "minimax_m3_vl": (
        {
            "num_hidden_layers": 3,
            "num_local_experts": 8,
            "num_experts_per_tok": 3,
            "rotary_dim": 16,
            "moe_layer_freq": [0, 1, 1],
        },
        {
            "vision_config": {
                "num_hidden_layers": 1,
                "hidden_size": 32,
                "num_attention_heads": 2,
                "intermediate_size": 64,
            }
        },
        "text_config",
    ),
    "qwen3_vl_moe": (
        {
            "model_type": "qwen3_vl_moe_text",
            "num_experts": 12,
            "num_experts_per_tok": 4,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
            "rope_scaling": {"type": "default", "mrope_section": [6, 5, 5]},
        },
        {"vision_config": {**QWEN_VISION, "model_type": "qwen3_vl_moe", "deepstack_visual_indexes": [0]}},
        "text_config",
    ),
    "qwen3_5_moe": (
        {"model_type": "qwen3_5_moe_text", "num_hidden_layers": 4, **LINEAR},
        {"vision_config": {**QWEN_VISION, "model_type": "qwen3_5_moe", "deepstack_visual_indexes": []}},
        "text_config",
    ),
    "gemma4": (
        {
            "model_type": "gemma4_text",
            "num_hidden_layers": 2,
            "enable_moe_block": True,
            "num_experts": 8,
            "top_k_experts": 3,
            "hidden_size_per_layer_input": 0,
            "num_kv_shared_layers": 0,
            "sliding_window": 8,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "attention_k_eq_v": True,
            "layer_types": ["sliding_attention", "full_attention"],
            "use_double_wide_mlp": False,
            "tie_word_embeddings": True,
        },
        GEMMA4_BESIDE,
        "text_config",
    ),
}


def vlm_config_of(model_type: str) -> dict[str, Any]:
    text, beside, part = TYPES[model_type]
    text = COMMON | text
    config = {part: text, "vocab_size": VOCABULARY, "eos_token_id": 95} if part else text
    return {**config, **beside, "model_type": model_type}


def make_vlm_mixture(folder: Path, model_type: str, quantisation: str = "plain") -> Path:
    """Writes config.json and model.safetensors of a random model, in float32 except for quantised tensors."""
    return write_vlm_model(folder, vlm_config_of(model_type), quantisation)


def write_vlm_model(folder: Path, config: dict[str, Any], quantisation: str = "plain") -> Path:
    mx.random.seed(len(config["model_type"]))
    model: Any = random_mlx_vlm_model(config)
    parameters: Any = tree_flatten(model.parameters())
    model.load_weights([(name, random_like(name, array)) for name, array in parameters])
    if (settings := QUANTISATIONS[quantisation]) is not None:
        nn.quantize(
            model.language_model, **settings, class_predicate=lambda path, module: hasattr(module, "to_quantized")
        )
        config["quantization"] = settings
    weights: Any = dict(tree_flatten(model.parameters()))
    mx.eval(weights)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    return folder


MARKS = {"video_token_id": 88, "image_token_id": 89, "vision_start_token_id": 90, "vision_end_token_id": 91}
TEMPLATE = (
    "{% for message in messages %}{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}{% endfor %}"
)


def make_seeing_mixture(folder: Path, quantisation: str = "plain", most_pixels: int = 16 * 16) -> Path:
    """A random qwen3_vl_moe with a processor: an image of 16 x 16 pixels is 4 tokens."""
    make_vlm_mixture(folder, "qwen3_vl_moe", quantisation)
    config = json.loads((folder / "config.json").read_text()) | MARKS
    config |= {"image_token_index": 89, "video_token_index": 88}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder, MARKS["video_token_id"])
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|video_pad|>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "</s>"}))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    processor = {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
        "patch_size": QWEN_VISION["patch_size"],
        "temporal_patch_size": QWEN_VISION["temporal_patch_size"],
        "merge_size": QWEN_VISION["spatial_merge_size"],
        "size": {"shortest_edge": 64, "longest_edge": most_pixels},
        "min_pixels": 64,
        "max_pixels": most_pixels,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder
