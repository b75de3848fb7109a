"""Opens the models of tests/golden_zoo, whose results come from transformers 5.24, and reads their prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from golden_numbers import numbers  # type: ignore[import-not-found]  # found beside this file
from mixtures import open_streamed  # type: ignore[import-not-found]
from mlx_lm.models.cache import make_prompt_cache

GOLDEN = Path(__file__).parent / "golden_zoo"
# Where transformers 5.24 saves tensors under other names than the published checkpoint has: type -> saved -> published.
RENAMED: dict[str, dict[str, str]] = {
    "deepseek_v4": {".attn.norm.": ".attn.kv_norm.", "hc_head.hc_": "hc_head."},
    "gemma3n_text": {"model.": "model.language_model."},
    "kimi_linear": {".layers.0.block_sparse_moe.": ".layers.0.mlp."},
}


def opened(name: str, folder: Path) -> tuple[Any, Any]:
    """(streamed model, golden numbers) of a type."""
    golden = np.load(GOLDEN / name / "golden.npz")
    config = json.loads((GOLDEN / name / "config.json").read_text())
    tensors = {key: numbers(key, tuple(shape)) for key, shape in json.loads(str(golden["shapes"])).items()}
    tensors |= {key.removeprefix("tensor "): golden[key] for key in golden.files if key.startswith("tensor ")}
    weights = {}
    for key, array in tensors.items():
        for theirs, published in RENAMED.get(config["model_type"], {}).items():
            key = key.replace(theirs, published)
        weights[key] = mx.array(array)
    if config["model_type"] == "gemma3n_text":  # mlx-lm builds it as a part of Gemma 3n, as it is published
        config = {"model_type": "gemma3n", "text_config": config}
        weights |= _unused(weights, config["text_config"]["num_hidden_layers"])
    if config["model_type"] == "qwen3_5_moe":
        weights = _stacked(weights)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    model, _ = open_streamed(folder, 3, pinned=1)
    return model, golden


def _unused(weights: dict[str, mx.array], layers: int) -> dict[str, mx.array]:
    """Keys and values of the layers of Gemma 3n that use those of an earlier one. Published checkpoints have them."""
    path = "model.language_model.layers.{}.self_attn.{}.weight"
    found = {}
    for name in ("k_proj", "v_proj", "k_norm"):
        for layer in range(layers):
            if path.format(layer, name) not in weights:
                found[path.format(layer, name)] = mx.zeros_like(weights[path.format(0, name)])
    return found


def _stacked(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """The weights with each layer's experts as the published Qwen3.5-MoE has them: stacked, gate and up as one."""
    found = {key: array for key, array in weights.items() if ".experts." not in key}
    for path in sorted({key.partition(".experts.")[0] for key in weights.keys() - found.keys()}):
        parts: dict[str, list[mx.array]] = {}
        for name in ("gate_proj", "up_proj", "down_proj"):
            experts = range(sum(f"{path}.experts." in key and f".{name}." in key for key in weights))
            parts[name] = [weights[f"{path}.experts.{expert}.{name}.weight"] for expert in experts]
        found[f"{path}.experts.down_proj"] = mx.stack(parts["down_proj"])
        both = [mx.stack(parts[name]) for name in ("gate_proj", "up_proj")]
        found[f"{path}.experts.gate_up_proj"] = mx.concatenate(both, axis=1)
    return found


def prompt_and_greedy(name: str, folder: Path) -> tuple[np.ndarray, list[int], Any]:
    """(logits (1, T, vocab) of the prompt, the tokens that follow one by one, golden numbers) of a type."""
    model, golden = opened(name, folder)
    cache = make_prompt_cache(model)
    logits = np.array(model(mx.array(golden["tokens"]), cache=cache))
    made = [int(logits[0, -1].argmax())]
    while len(made) < len(golden["greedy"]):
        made.append(int(np.array(model(mx.array([made[-1:]]), cache=cache))[0, -1].argmax()))
    return logits, made, golden


def one_by_one(name: str, folder: Path) -> tuple[np.ndarray, Any]:
    """(logits (1, T, vocab) of the prompt, whose tokens are fed one by one, golden numbers) of a type."""
    model, golden = opened(name, folder)
    cache = make_prompt_cache(model)
    found = [np.array(model(mx.array([[token]]), cache=cache)) for token in golden["tokens"][0].tolist()]
    return np.concatenate(found, axis=1), golden
