"""Llama with a sparse FFN: ReLU-Llama and ProSparse. mlx-lm's own Llama always computes SiLU."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.nn as nn
from mlx_lm.models import llama

from ..layers.ffn import FFN
from .family import Family
from .parts import InParts
from .rope import RopeArgs

FAMILY = Family(
    ffn="model.layers.{}.mlp",
    matrices=("gate_proj", "up_proj", "down_proj"),
    activations={"relu": "relu", "fatrelu": "relu"},
    default_activation="silu",
    threshold_keys={"fatrelu": "hidden_act_param"},
    instead="a relufied version (SparseLLM/ReluLLaMA-7B, SparseLLM/prosparse-llama-2-7b)",
)


@dataclass
class ModelArgs(RopeArgs, llama.ModelArgs):
    """mlx-lm's arguments, with Hugging Face's defaults for keys that change the computation."""

    max_position_embeddings: int = 2048
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    hidden_act_param: float = 0.0  # the threshold of FATReLU

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_bias:
            raise ValueError("mlp_bias is true: a gated FFN with biases is not supported")
        if set(self.layer_types or []) - {"full_attention"}:
            raise ValueError("layer_types has other entries than full_attention, which are not supported here")


class Model(InParts, llama.Model):
    """mlx-lm's model, in parts."""

    family = FAMILY

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        activation = self.family.activation_of(args)
        for layer in self.layers:
            layer.mlp = FFN(self.family.matrices, args.hidden_size, args.intermediate_size, activation)

    @property
    def ffn_norms(self) -> list[nn.Module]:
        """The norm whose output each layer's FFN takes."""
        return [layer.post_attention_layernorm for layer in self.layers]
