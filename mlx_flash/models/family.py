"""The description of a family's feed-forward neurons: their place in a checkpoint and their activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..layers.activations import Activation


@dataclass(frozen=True)
class Family:
    """The feed-forward neurons of a family. Every file of a model type has one, as FAMILY.

    Names are those after the model's own `sanitize`. Neuron i consists of row i of every matrix but the last, (F, D),
    and column i of the last, (D, F). A model with a streamed FFN has the biases `up_bias` and `down_bias` in place of
    the FFN's own.
    """

    ffn: str  # the FFN's path in the model; `{}` stands for the layer
    matrices: tuple[str, ...]  # (up, down) or (gate, up, down)
    activations: Mapping[str, str]  # name in the configuration -> kind of Activation; other names are not sparse
    activation_key: str = "hidden_act"
    default_activation: str | None = None  # used if the configuration names none
    threshold_keys: Mapping[str, str] = field(default_factory=dict)  # activation -> the key of its threshold
    instead: str = "a relufied version of it"  # what errors suggest in place of a model that is not sparse
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
        """One of `activations`, with its threshold from a configuration. Raises ValueError."""
        threshold = settings.get(self.threshold_keys[name], 0.0) if name in self.threshold_keys else 0.0
        return Activation(self.activations[name], threshold)
