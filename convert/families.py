"""The table of model families: which tensors are the feed-forward neurons, and which activation they pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mlx_flash.errors import UnsupportedModelError


@dataclass(frozen=True)
class Family:
    """Names are those after the model's own `sanitize`; `{}` stands for the layer."""

    up: str  # (F, D): row i is neuron i
    down: str  # (D, F): column i is neuron i
    up_bias: str
    down_bias: str
    streamed_up_bias: str  # the biases' names in a model whose FFN is streamed
    streamed_down_bias: str
    activation_key: str
    relu_activations: tuple[str, ...]
    layers_key: str
    positions_key: str


FAMILIES = {
    "opt": Family(
        up="model.decoder.layers.{}.mlp.fc1.weight",
        down="model.decoder.layers.{}.mlp.fc2.weight",
        up_bias="model.decoder.layers.{}.mlp.fc1.bias",
        down_bias="model.decoder.layers.{}.mlp.fc2.bias",
        streamed_up_bias="model.decoder.layers.{}.mlp.up_bias",
        streamed_down_bias="model.decoder.layers.{}.mlp.down_bias",
        activation_key="activation_function",
        relu_activations=("relu",),
        layers_key="num_hidden_layers",
        positions_key="max_position_embeddings",
    )
}


def family_of(config: dict[str, Any], where: object) -> Family:
    """The row for a checkpoint's configuration. Raises UnsupportedModelError, naming what was found."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedModelError(
            f"{where} is of model type {model_type!r}; neurons can be streamed for: {', '.join(FAMILIES)}. "
            "Models that fit into memory run with mlx-lm itself."
        )
    activation = config.get(family.activation_key, family.relu_activations[0])
    if activation not in family.relu_activations:
        raise UnsupportedModelError(
            f"{where} uses the activation {activation!r}, which leaves no neuron exactly zero; streaming by neuron "
            f"needs {' or '.join(family.relu_activations)}. Run this model with mlx-lm, or look for a relufied one."
        )
    return family
