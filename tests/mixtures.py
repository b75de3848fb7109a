"""Tiny random mixture-of-experts checkpoints, made and saved with mlx-lm's own models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU
from zoo_types import TYPES  # type: ignore[import-not-found]

from mlx_flash.flash.in_place import InPlaceFiles
from mlx_flash.flash.layer_ring import LayerRing
from mlx_flash.flash.reader import Reader
from mlx_flash.loading.in_place_model import InPlaceModel, open_in_place
from mlx_flash.loading.layer_weights import stream_layers
from mlx_flash.loading.resident_weights import open_files

VOCABULARY = 96
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "moe_intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
MLA = {
    "q_lora_rank": 32,
    "kv_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "routed_scaling_factor": 1.5,
    "n_group": 2,
    "topk_group": 1,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 8, "num_experts_per_tok": 3, "shared_expert_intermediate_size": 64},
    "qwen3_moe": {
        "num_experts": 12,
        "num_experts_per_tok": 4,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
    },
    "qwen3_next": {
        "num_hidden_layers": 4,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "shared_expert_intermediate_size": 64,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "partial_rotary_factor": 0.5,
    },
    "olmoe": {"num_experts": 8, "num_experts_per_tok": 3},
    "gpt_oss": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_scaling": None,
    },
    "deepseek_v2": {
        **MLA,
        "topk_method": "group_limited_greedy",
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "mscale": 0.7,
            "mscale_all_dim": 0.7,
            "original_max_position_embeddings": 64,
            "beta_fast": 32,
            "beta_slow": 1,
        },
    },
    "deepseek_v3": {**MLA, "norm_topk_prob": True},
    "glm4_moe": {
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 1.5,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "use_qk_norm": True,
        "partial_rotary_factor": 0.5,
        "rope_scaling": None,
    },
    "granitemoe": {
        "num_local_experts": 8,
        "num_experts_per_tok": 3,
        "logits_scaling": 2.0,
        "attention_multiplier": 0.2,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
    },
    "nemotron_h": {  # a SwitchMLP beside state-space layers
        "num_hidden_layers": 4,
        "hybrid_override_pattern": "M*E-",
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "mamba_proj_bias": False,
        "ssm_state_size": 16,
        "conv_kernel": 4,
        "n_groups": 2,
        "time_step_limit": [0.0, 100.0],
        "layer_norm_epsilon": 1e-5,
        "mlp_bias": False,
        "use_bias": False,
        "use_conv_bias": True,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 1,
        "moe_shared_expert_intermediate_size": 64,
        "routed_scaling_factor": 1.0,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
    },
}
QUANTISATIONS: dict[str, dict[str, Any] | None] = {
    "plain": None,
    "4 bits": {"group_size": 32, "bits": 4},
    "3 bits": {"group_size": 64, "bits": 3},
    "8 bits": {"group_size": 64, "bits": 8},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}


def config_of(family: str) -> dict[str, Any]:
    return {"model_type": family, **COMMON, **(FAMILIES.get(family) or TYPES.get(family, {}))}


def make_mixture(folder: Path, family: str, quantisation: str = "plain", shards: int = 1, **changes: Any) -> Path:
    """Writes config.json and model*.safetensors of a random model, in float32 except for quantised tensors."""
    from mlx_lm.utils import _get_classes

    config = {**config_of(family), **changes}
    model_class, args_class = _get_classes(config)
    mx.random.seed(len(family))
    model = model_class(args_class.from_dict(config))
    parameters: Any = tree_flatten(model.parameters())
    model.load_weights([(name, random_like(name, array)) for name, array in parameters])
    if (settings := QUANTISATIONS[quantisation]) is not None:
        nn.quantize(model, **settings, class_predicate=lambda _, module: divides(module, settings["group_size"]))
        config["quantization"] = settings
    return save_model(folder, model, config, shards)


def save_model(folder: Path, model: Any, config: dict[str, Any], shards: int = 1) -> Path:
    """Writes config.json and the model's parameters as model*.safetensors."""
    weights: Any = dict(tree_flatten(model.parameters()))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(weights)
    for shard in range(shards):
        part = {name: weights[name] for name in names[shard::shards]}
        name = "model.safetensors" if shards == 1 else f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mx.save_safetensors(str(folder / name), part)
    return folder


def assert_same(found: list[np.ndarray], expected: list[np.ndarray], what: object) -> None:
    """Compares logits bit for bit. what: is told with a difference."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert np.isfinite(b).all() and b.std() > 1e-3
        assert np.array_equal(a, b), (what, i, np.abs(a - b).max())


def divides(module: Any, group_size: int) -> bool:
    """Whether mlx-lm quantises a module in groups of this size."""
    return hasattr(module, "to_quantized") and module.weight.shape[-1] % group_size == 0


def to_bfloat16(folder: Path, only: str = "") -> None:
    """Rounds a checkpoint's floats to bfloat16, or only those with `only` in their names."""
    path = folder / "model.safetensors"
    loaded: Any = mx.load(str(path))
    weights = {
        name: array.astype(mx.bfloat16) if only in name and mx.issubdtype(array.dtype, mx.floating) else array
        for name, array in loaded.items()
    }
    mx.eval(weights)
    mx.save_safetensors(str(path), weights)


def open_streamed(
    folder: Path,
    slots: int,
    window: int | None = None,
    pinned: int | None = None,
    zoo: str | None = None,
    adapter: Any = None,
) -> tuple[Any, InPlaceFiles]:
    """(model, streamer) of a checkpoint with so many slots per layer. The caller closes the streamer.

    pinned: number of layers whose weights are in memory; None for all. adapter: from `open_adapter`.
    """
    mixture: InPlaceModel = open_in_place(folder, zoo=zoo, adapter=adapter)
    streamer = InPlaceFiles(open_files(mixture.files, direct=True), Reader(4))
    numbers, layers = ([], []) if pinned is None else mixture.layers_to_stream(pinned)
    mixture.stream_experts(streamer, [slots] * len(mixture.switches), window)
    if layers:
        ring = LayerRing(streamer, [layer.tensors for layer in layers], numbers, len(mixture.layers))
        stream_layers(layers, ring)
    streamer.look_ahead = True  # as if a trial had found that guessing pays
    return mixture.model, streamer


def random_like(name: str, array: mx.array) -> mx.array:
    """Random numbers that make every step matter: norms around 1, matrices that preserve the scale of their input."""
    if not mx.issubdtype(array.dtype, mx.floating):
        return array
    noise = mx.random.normal(array.shape)
    if array.ndim < 2:
        return 1 + 0.1 * noise if "norm" in name or name.endswith("A_log") else 0.1 * noise
    return noise * (1.5 / array.shape[-1] ** 0.5)


def choices_seen(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Records the expert ids (T, K) of every later call of mlx-lm's `SwitchGLU`."""
    seen: list[np.ndarray] = []
    call = SwitchGLU.__call__

    def noting(self: SwitchGLU, x: mx.array, indices: mx.array) -> mx.array:
        seen.append(np.array(indices)[0])
        return call(self, x, indices)

    monkeypatch.setattr(SwitchGLU, "__call__", noting)
    return seen
