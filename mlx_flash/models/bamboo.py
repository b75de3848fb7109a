"""Bamboo and TurboSparse-Mistral: Mistral with dReLU, relu(gate) relu(up).

TurboSparse's checkpoints hold a predictor beside each FFN (`mlp.predictor`), which its published code consults. It is
not part of the function that was trained, and is left out: predictors are made at conversion.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx

from ..layers.activations import Activation
from . import mistral
from .parts import activation_named


@dataclass
class ModelArgs(mistral.ModelArgs):
    hidden_act: str = "relu"

    @property
    def activation(self) -> Activation:
        return activation_named(self.hidden_act, {"relu": Activation("drelu")})


class Model(mistral.Model):
    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return super().sanitize({name: weight for name, weight in weights.items() if ".mlp.predictor." not in name})
