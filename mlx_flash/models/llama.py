"""Llama with an FFN that is sparse: ReLU-Llama and ProSparse. mlx-lm's own Llama computes SiLU whatever is asked."""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama

from ..layers.activations import Activation
from ..layers.ffn import FFN

MATRICES = ("gate_proj", "up_proj", "down_proj")


@dataclass
class ModelArgs(llama.ModelArgs):
    """mlx-lm's, with Hugging Face's defaults for what decides the computation."""

    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    hidden_act_param: float = 0.0  # the threshold of FATReLU

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mlp_bias:
            raise ValueError("mlp_bias is true: a gated FFN with biases is not supported")
        if set(self.layer_types or []) - {"full_attention"}:
            raise ValueError("layer_types has other than full attention, which is not supported here")

    @property
    def activation(self) -> Activation:
        if self.hidden_act not in ("relu", "fatrelu"):
            raise ValueError(f"hidden_act is {self.hidden_act!r}, expected relu or fatrelu")
        return Activation("relu", self.hidden_act_param if self.hidden_act == "fatrelu" else 0.0)


class Model(llama.Model):
    """mlx-lm's, in the form that streaming needs: `head(layers(embed(tokens)))` with an `mlp` in each layer."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__(args)
        activation = args.activation
        for layer in self.layers:
            layer.mlp = FFN(MATRICES, args.hidden_size, args.intermediate_size, activation)

    @property
    def kv_width(self) -> int:
        """Numbers that a token's keys, or its values, have in one layer."""
        head_dim = self.args.head_dim or self.args.hidden_size // self.args.num_attention_heads
        return int(self.args.num_key_value_heads * head_dim)

    def embed(self, inputs: mx.array, offset: int | mx.array = 0) -> mx.array:
        """The hidden states that enter layer 0; positions are the attention's affair. (B, T) -> (B, T, D)"""
        return self.model.embed_tokens(inputs)

    def head(self, hidden: mx.array) -> mx.array:
        """What follows the last layer. (B, T, D) -> (B, T, vocab_size)"""
        out = self.model.norm(hidden)
        return self.model.embed_tokens.as_linear(out) if self.args.tie_word_embeddings else self.lm_head(out)

    @property
    def ffn_norms(self) -> list[nn.Module] | None:
        """The norm whose output each layer's FFN takes."""
        return [layer.post_attention_layernorm for layer in self.layers]
