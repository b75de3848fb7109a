"""The checkpoints in `golden`: their configurations, tensors and models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_flash.loading.model_types import model_classes

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
TOLERANCE = 1e-4  # logits have a standard deviation above 1


def config_of(variant: str) -> dict[str, Any]:
    return json.loads((GOLDEN / variant / "config.json").read_text())


def checkpoint_of(variant: str) -> dict[str, mx.array]:
    weights = mx.load(str(GOLDEN / variant / "model.safetensors"))
    assert isinstance(weights, dict)
    return {name: weight.astype(mx.float32) for name, weight in weights.items()}


def arguments(variant: str, **changes: Any) -> Any:
    config = config_of(variant) | changes
    return model_classes(config)[1].from_dict(config)


def load(variant: str, **changes: Any) -> Any:
    model = model_classes(config_of(variant) | changes)[0](arguments(variant, **changes))
    model.load_weights(list(model.sanitize(checkpoint_of(variant)).items()), strict=True)
    return model


def parameter_names(model: nn.Module) -> set[str]:
    return {name for name, _ in list(tree_flatten(model.parameters()))}


def largest_difference(a: mx.array, b: mx.array) -> float:
    assert a.shape == b.shape
    return float(np.abs(np.array(a) - np.array(b)).max())
