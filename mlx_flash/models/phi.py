"""Phi with ReLU, such as the relufied Phi-2: attention and FFN run in parallel. mlx-lm's own Phi computes only GELU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn
from mlx_lm.models import phi

from ..layers.ffn import FFN
from .family import Family
from .parts import InParts
from .rope import RopeArgs

FAMILY = Family(
    ffn="model.layers.{}.mlp",
    matrices=("fc1", "fc2"),
    activations={"relu": "relu"},
    default_activation="gelu_new",
)


@dataclass
class ModelArgs(RopeArgs, phi.ModelArgs):
    """mlx-lm's arguments, with Hugging Face's defaults for keys that change the computation."""

    num_key_value_heads: int | None = None
    partial_rotary_factor: float = 0.5
    hidden_act: str = "gelu_new"
    qk_layernorm: bool = False
    rope_scaling: dict[str, Any] | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.refuse_rope_scaling()
        for key in ("qk_layernorm", "tie_word_embeddings"):
            if getattr(self, key):
                raise ValueError(f"{key} is true, which is not supported for Phi: expected false")


class Model(InParts, phi.Model):
    """mlx-lm's model, in parts."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        activation = FAMILY.activation_of(args)
        for layer in self.layers:
            layer.mlp = FFN(FAMILY.matrices, args.hidden_size, args.intermediate_size, activation, bias=True)

    @property
    def final_norm(self) -> nn.Module:
        return self.model.final_layernorm

    @property
    def ffn_norms(self) -> list[nn.Module]:
        """The norm whose output each layer's FFN and attention take."""
        return [layer.input_layernorm for layer in self.layers]
