"""Nemotron (Minitron, Nemotron-4): squared ReLU, and norms that multiply by their weight plus one."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn
from mlx_lm.models import nemotron

from ..layers.ffn import FFN
from .family import Family
from .parts import InParts
from .rope import RopeArgs

FAMILY = Family(
    ffn="model.layers.{}.mlp",
    matrices=("up_proj", "down_proj"),
    activations={"relu2": "relu2"},
    default_activation="relu2",
)


@dataclass
class ModelArgs(RopeArgs, nemotron.ModelArgs):
    """mlx-lm's arguments, with Hugging Face's defaults."""

    num_key_value_heads: int | None = None
    max_position_embeddings: int = 4096

    def __post_init__(self) -> None:
        self.refuse_rope_scaling()
        self.rope_scaling = None
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads


class Model(InParts, nemotron.Model):
    """mlx-lm's model, in parts."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        activation = FAMILY.activation_of(args)
        for layer in self.layers:
            layer.mlp = FFN(FAMILY.matrices, args.hidden_size, args.intermediate_size, activation, args.mlp_bias)

    @property
    def ffn_norms(self) -> list[nn.Module]:
        """The norm whose output each layer's FFN takes, as a LayerNorm with its weight plus one."""
        return [_plain(layer.post_attention_layernorm) for layer in self.layers]


def _plain(norm: nemotron.NemotronLayerNorm1P) -> nn.LayerNorm:
    plain = nn.LayerNorm(norm.weight.size, eps=norm.eps)
    plain.weight, plain.bias = norm.weight + 1, norm.bias
    return plain
