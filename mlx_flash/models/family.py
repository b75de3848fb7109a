"""What a family of models says of its feed-forward neurons: where they lie in a checkpoint, and how they fire."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..layers.activations import Activation


@dataclass(frozen=True)
class Family:
    """Each file of a model type has one, as FAMILY. Names are those after the model's own `sanitize`.

    Row i of every matrix but the last, (F, D), and column i of the last, (D, F), make neuron i. A model whose FFN is
    streamed has its biases as `up_bias` and `down_bias` in the FFN's place.
    """

    ffn: str  # the FFN's place in the model; `{}` stands for the layer
    matrices: tuple[str, ...]  # (up, down) or (gate, up, down)
    activations: Mapping[str, str]  # what the configuration calls it -> the kind of Activation; others are not sparse
    activation_key: str = "hidden_act"
    default_activation: str | None = None  # where the configuration does not say
    threshold_keys: Mapping[str, str] = field(default_factory=dict)  # of an activation that has a threshold
    instead: str = "a relufied version of it"  # of a model that is not sparse
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

    def activation_of(self, args: Any) -> Activation:
        """The activation that a model's arguments name. Raises ValueError."""
        name = getattr(args, self.activation_key)
        if name not in self.activations:
            raise ValueError(f"{self.activation_key} is {name!r}, expected {' or '.join(self.activations)}")
        return self.activation_named(name, vars(args))

    def activation_named(self, name: str, settings: Mapping[str, Any]) -> Activation:
        """One of `activations`, with the threshold that a configuration has for it. Raises ValueError."""
        threshold = settings.get(self.threshold_keys[name], 0.0) if name in self.threshold_keys else 0.0
        return Activation(self.activations[name], threshold)
