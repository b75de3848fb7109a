"""Tiny random checkpoints with a draft head of their own, whose tensors have their published names and forms."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from conftest import write_tokenizer  # type: ignore[import-not-found]  # found beside this file
from mixtures import QUANTISATIONS, VOCABULARY, random_like  # type: ignore[import-not-found]
from mlx.utils import tree_flatten
from published_layouts import publish  # type: ignore[import-not-found]
from vlm_mixtures import (  # type: ignore[import-not-found]
    COMMON,
    LINEAR,
    QWEN_VISION,
    vlm_config_of,
    write_vlm_model,
)

DENSE = {name: value for name, value in LINEAR.items() if "expert" not in name}
HEADS = {  # model_type -> (module of mlx-vlm's head, the setting with the number of its layers)
    "deepseek_v4": ("deepseek_v4_mtp", "num_nextn_predict_layers"),
    "qwen3_5": ("qwen3_5_mtp", "mtp_num_hidden_layers"),
    "qwen3_5_moe": ("qwen3_5_mtp", "mtp_num_hidden_layers"),
    "qwen4_exp": ("qwen4_exp_mtp", "mtp_num_hidden_layers"),
}
Weights = dict[str, mx.array]


def config_with_head(model_type: str) -> dict[str, Any]:
    if model_type == "qwen3_5":
        text = {**COMMON, "model_type": "qwen3_5_text", "num_hidden_layers": 12, **DENSE}
        vision = {**QWEN_VISION, "model_type": "qwen3_5", "deepstack_visual_indexes": []}
        config = {"text_config": text, "vision_config": vision, "vocab_size": VOCABULARY, "eos_token_id": 95}
    else:
        config = vlm_config_of(model_type)
    config["model_type"] = model_type
    config.get("text_config", config)[HEADS[model_type][1]] = 1
    return config


def make_with_head(folder: Path, model_type: str, quantisation: str = "plain", published: bool = False) -> Path:
    """Writes a checkpoint with a tokenizer. quantisation: of the model and, as MLX stores it, of the head.

    published: whether the model as well has its published form, of Qwen3.5's types, without the vision part.
    """
    config = config_with_head(model_type)
    write_vlm_model(folder, config, quantisation)
    write_tokenizer(folder)
    if published:
        file = str(folder / "model.safetensors")
        loaded: Any = mx.load(file)
        text = {name: array * 1 for name, array in loaded.items() if not name.startswith("vision")}
        mx.eval(text)  # MLX reads lazily
        mx.save_safetensors(file, text)
        publish(folder, "qwen3_5_moe")
    made = head_of(config)
    weights: Weights = {name: random_like(name, array) for name, array in _named(made)}
    made.load_weights(list(weights.items()))
    if (settings := QUANTISATIONS[quantisation]) is None:
        written = {f"mtp.{name}": array for name, array in PUBLISHED[model_type](weights).items()}
        form = "pt"
    else:
        chosen = getattr(made, "quant_predicate", lambda path, module: True)
        nn.quantize(
            made, **settings, class_predicate=lambda path, layer: hasattr(layer, "to_quantized") and chosen(path, layer)
        )
        written = {f"mtp.{name}": array for name, array in _named(made)}
        form = "mlx"
    mx.eval(written)
    mx.save_safetensors(str(folder / "head.safetensors"), written, metadata={"format": form})
    names = dict.fromkeys(mx.load(str(folder / "model.safetensors")), "model.safetensors")
    index = {"weight_map": names | dict.fromkeys(written, "head.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def _named(module: Any) -> list[tuple[str, mx.array]]:
    named: Any = tree_flatten(module.parameters())
    return named  # type: ignore[no-any-return]


def head_of(config: dict[str, Any]) -> Any:
    """mlx-vlm's head for a model's configuration, with random weights."""
    name = HEADS[config["model_type"]][0]
    module = import_module(f"mlx_vlm.speculative.drafters.{name}")
    return module.Model(
        module.ModelConfig.from_dict({"model_type": name, "text_config": config.get("text_config", config)})
    )


def _qwen(weights: Weights) -> Weights:
    """Gates and ups of all experts as one tensor."""
    found = dict(weights)
    switch = "layers.0.mlp.switch_mlp"
    if f"{switch}.up_proj.weight" in found:
        both = [found.pop(f"{switch}.{name}_proj.weight") for name in ("gate", "up")]
        found["layers.0.mlp.experts.gate_up_proj"] = mx.concatenate(both, axis=-2)
        found["layers.0.mlp.experts.down_proj"] = found.pop(f"{switch}.down_proj.weight")
    return found


def _qwen35(weights: Weights) -> Weights:
    """Norms less one as well."""
    return {name: array - 1 if "norm" in name else array for name, array in _qwen(weights).items()}


def _deepseek(weights: Weights) -> Weights:
    found: Weights = {}
    for name, array in weights.items():
        name = name.removeprefix("decoder.").replace("e_score_correction_bias", "bias")
        for part in ("attn", "ffn"):
            name = name.replace(f"{part}_hc.", f"hc_{part}_")
        name = name.replace("hc_head.", "hc_head_")
        for number, projection in (("w1", "gate_proj"), ("w2", "down_proj"), ("w3", "up_proj")):
            name = name.replace(projection, number)
        if "switch_mlp" in name:
            for expert in range(array.shape[0]):
                found["0." + name.replace("switch_mlp", f"experts.{expert}")] = array[expert]
        else:
            found[f"0.{name}"] = array.reshape(-1, array.shape[-1]) if "wo_a" in name else array
    return found


PUBLISHED = {"deepseek_v4": _deepseek, "qwen3_5": _qwen35, "qwen3_5_moe": _qwen35, "qwen4_exp": _qwen}
