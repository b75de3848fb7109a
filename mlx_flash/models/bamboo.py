"""Bamboo and TurboSparse-Mistral: Mistral with dReLU, relu(gate) relu(up).

TurboSparse's checkpoints hold a predictor beside each FFN (`mlp.predictor`), which its published code uses. It is not
part of the trained function. It is left out here, because predictors are made at conversion.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from . import llama, mistral

FAMILY = replace(llama.FAMILY, activations={"relu": "drelu"}, default_activation="relu")


@dataclass
class ModelArgs(mistral.ModelArgs):
    hidden_act: str = "relu"


class Model(mistral.Model):
    family = FAMILY

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        return super().sanitize({name: weight for name, weight in weights.items() if ".mlp.predictor." not in name})
