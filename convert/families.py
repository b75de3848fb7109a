"""The table of model families: which tensors are the feed-forward neurons, and which activation they pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mlx_flash.errors import UnsupportedModelError
from mlx_flash.layers.activations import Activation


@dataclass(frozen=True)
class Family:
    """A row. Names are those after the model's own `sanitize`; `{}` stands for the layer.

    Row i of every matrix but the last, (F, D), and column i of the last, (D, F), make neuron i. A model whose FFN is
    streamed has its biases as `up_bias` and `down_bias` in the FFN's place.
    """

    ffn: str  # the FFN's place in the model
    matrices: tuple[str, ...]  # (up, down) or (gate, up, down)
    activations: Mapping[str, str]  # what the configuration calls it -> the kind of Activation; others are not sparse
    activation_key: str = "hidden_act"
    default_activation: str | None = None  # where the configuration does not say
    threshold_key: str | None = None
    layers_key: str = "num_hidden_layers"
    positions_key: str = "max_position_embeddings"
    biases: bool = True  # whether the FFN may have them
    parts: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", ("gate", "up", "down")[-len(self.matrices) :])

    def weights(self, layer: int) -> list[str]:
        """Names of a layer's matrices, in the order of a bundle's parts."""
        return [f"{self.ffn.format(layer)}.{name}.weight" for name in self.matrices]

    def biases_of(self, layer: int) -> dict[str, str]:
        """A layer's biases: name in the whole model -> name in the model with a streamed FFN."""
        ffn, up, down = self.ffn.format(layer), *self.matrices[-2:]
        return {f"{ffn}.{up}.bias": f"{ffn}.up_bias", f"{ffn}.{down}.bias": f"{ffn}.down_bias"}

    def activation(self, config: Mapping[str, Any], where: object) -> Activation:
        """Raises UnsupportedModelError, naming what was found."""
        found = config.get(self.activation_key, self.default_activation)
        if not isinstance(found, str) or found not in self.activations:
            raise UnsupportedModelError(
                f"{where} uses the activation {found!r}, which leaves no neuron exactly zero; streaming by neuron "
                f"needs {' or '.join(self.activations)} there. If it fits into memory, run it with mlx-lm; else look "
                "for a relufied version of it, or for a mixture-of-experts model."
            )
        threshold = config.get(self.threshold_key, 0.0) if self.threshold_key else 0.0
        try:
            return Activation(self.activations[found], threshold)
        except ValueError as error:
            raise UnsupportedModelError(f"{where}: {error}.") from None


FAMILIES = {
    "llama": Family(
        ffn="model.layers.{}.mlp",
        matrices=("gate_proj", "up_proj", "down_proj"),
        activations={"relu": "relu", "fatrelu": "relu"},
        default_activation="silu",
        threshold_key="hidden_act_param",
        biases=False,
    ),
    "opt": Family(
        ffn="model.decoder.layers.{}.mlp",
        matrices=("fc1", "fc2"),
        activations={"relu": "relu"},
        activation_key="activation_function",
        default_activation="relu",
    ),
}


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """The row for a checkpoint's configuration. Raises UnsupportedModelError, naming what was found."""
    model_type = config.get("model_type")
    family = FAMILIES.get(str(model_type))
    if family is None:
        raise UnsupportedModelError(
            f"{where} is of model type {model_type!r}; neurons can be streamed for: {', '.join(FAMILIES)}. "
            "Models that fit into memory run with mlx-lm itself."
        )
    return family
