"""Persimmon, which mlx-lm lacks. It has squared ReLU, norms on queries and keys, biases, and heads rotated by half."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..layers.ffn import FFN
from .family import Family
from .fused import FusedAttention
from .parts import InParts
from .rope import RopeArgs

FAMILY = Family(
    ffn="model.layers.{}.mlp",
    matrices=("dense_h_to_4h", "dense_4h_to_h"),
    activations={"relu2": "relu2"},
    default_activation="relu2",
)


@dataclass
class ModelArgs(RopeArgs):
    """The keys of a Persimmon ``config.json`` that change the computation; the defaults are Hugging Face's."""

    model_type: str
    vocab_size: int = 262144
    hidden_size: int = 4096
    intermediate_size: int = 16384
    num_hidden_layers: int = 36
    num_attention_heads: int = 64
    hidden_act: str = "relu2"
    max_position_embeddings: int = 16384
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    partial_rotary_factor: float = 0.5
    qk_layernorm: bool = True

    def __post_init__(self) -> None:
        self.refuse_rope_scaling()
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )
        if self.rotated < 2 or self.rotated % 2:
            raise ValueError(
                f"partial_rotary_factor {self.partial_rotary_factor} rotates {self.rotated} of "
                f"{self.hidden_size // self.num_attention_heads} numbers of a head, expected an even number of them"
            )

    @property
    def num_key_value_heads(self) -> int:
        return self.num_attention_heads

    @property
    def rotated(self) -> int:
        return int(self.hidden_size // self.num_attention_heads * self.partial_rotary_factor)


class DecoderLayer(nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width, heads, eps = args.hidden_size, args.num_attention_heads, args.layer_norm_eps
        norm_eps = eps if args.qk_layernorm else None
        self.self_attn = FusedAttention(width, heads, heads, True, args.rotated, args.rope_theta, norm_eps)
        activation = FAMILY.activation_of(args)
        # Typed as a callable, because a layer that streams its neurons replaces it.
        self.mlp: Callable[[mx.array], mx.array] = FFN(
            FAMILY.matrices, width, args.intermediate_size, activation, bias=True
        )
        self.input_layernorm = nn.LayerNorm(width, eps=eps)
        self.post_attention_layernorm = nn.LayerNorm(width, eps=eps)

    def __call__(self, h: mx.array, mask: mx.array | str | None = None, cache: Any | None = None) -> mx.array:
        """h: (B, T, D) -> (B, T, D)"""
        h = h + self.self_attn(self.input_layernorm(h), mask, cache)
        return h + self.mlp(self.post_attention_layernorm(h))


class PersimmonModel(nn.Module):
    """Everything but the output matrix. Its parts have the names of the checkpoint."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(args.vocab_size, args.hidden_size)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.final_layernorm = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_eps)


class Model(InParts, nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = PersimmonModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    @property
    def final_norm(self) -> nn.Module:
        return self.model.final_layernorm

    @property
    def ffn_norms(self) -> list[nn.Module]:
        """The norm whose output each layer's FFN takes."""
        return [layer.post_attention_layernorm for layer in self.layers]
