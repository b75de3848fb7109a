"""Adapters of random numbers, in the form that mlx-lm's training writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")
ADDED = ("lora_a", "lora_b", "m")  # the parameters of mlx-lm's adapters


def make_adapter(
    folder: Path, base: Path, kind: str = "lora", keys: tuple[str, ...] | None = ATTENTION, layers: int = -1
) -> Path:
    """Writes an adapter for the checkpoint `base`. The arguments are those of mlx-lm's configuration."""
    model, _ = mlx_lm.utils.load_model(base)
    parameters = {"rank": 4, "scale": 3.0, "dropout": 0.1, "keys": None if keys is None else list(keys)}
    linear_to_lora_layers(model, layers, parameters, use_dora=kind == "dora")
    named: Any = tree_flatten(model.parameters())
    mx.random.seed(len(named))
    added = {name: 0.2 * mx.random.normal(a.shape) for name, a in named if name.rpartition(".")[2] in ADDED}
    folder.mkdir()
    mx.save_safetensors(str(folder / "adapters.safetensors"), added)
    settings = {"fine_tune_type": kind, "num_layers": layers, "lora_parameters": parameters, "data": "data/"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
