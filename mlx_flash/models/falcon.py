"""Falcon with ReLU, which mlx-lm lacks.

Attention is multi-query (7B), grouped (40B) or plain (RW). It runs in parallel with the FFN or before it.
"""

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
    ffn="transformer.h.{}.mlp",
    matrices=("dense_h_to_4h", "dense_4h_to_h"),
    activations={"relu": "relu"},
    activation_key="activation",
    default_activation="gelu",
    instead="a relufied version (SparseLLM/ReluFalcon-40B)",
)


@dataclass
class ModelArgs(RopeArgs):
    """The keys of a Falcon ``config.json`` that change the computation; the defaults are Hugging Face's."""

    model_type: str
    vocab_size: int = 65024
    hidden_size: int = 4544
    num_hidden_layers: int = 32
    num_attention_heads: int = 71
    num_kv_heads: int | None = None
    num_ln_in_parallel_attn: int | None = None
    layer_norm_epsilon: float = 1e-5
    alibi: bool = False
    new_decoder_architecture: bool = False
    multi_query: bool = True
    parallel_attn: bool = True
    bias: bool = False
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: dict[str, Any] | None = None
    ffn_hidden_size: int | None = None
    activation: str = "gelu"
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        self.refuse_rope_scaling()
        if self.ffn_hidden_size is None:
            self.ffn_hidden_size = 4 * self.hidden_size
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % heads or heads % shared:
            raise ValueError(
                f"hidden_size is {self.hidden_size}, num_attention_heads {heads}, with {shared} keys per token: "
                "expected each to be a multiple of the next"
            )
        norms = self.num_ln_in_parallel_attn
        if norms not in ((None, 1, 2) if self.new_decoder_architecture else (None, 1)):
            raise ValueError(f"num_ln_in_parallel_attn is {norms}, which is not supported for this architecture")
        if self.new_decoder_architecture and not self.parallel_attn:
            raise ValueError("new_decoder_architecture with parallel_attn false is not supported")

    @property
    def num_key_value_heads(self) -> int:
        """Number of keys, and of values, per token."""
        if self.new_decoder_architecture:
            return self.num_kv_heads or self.num_attention_heads
        return 1 if self.multi_query else self.num_attention_heads

    @property
    def two_norms(self) -> bool:
        """Whether attention and FFN run in parallel with a norm each."""
        return self.new_decoder_architecture and self.num_ln_in_parallel_attn != 1


class DecoderLayer(nn.Module):
    """Attention and `mlp`, in parallel with one norm or two, or one after the other."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        width, heads = args.hidden_size, args.num_attention_heads
        rotated = 0 if args.alibi else width // heads
        self.self_attn = FusedAttention(width, heads, args.num_key_value_heads, args.bias, rotated, args.rope_theta)
        activation = FAMILY.activation_of(args)
        # Typed as a callable, because a layer that streams its neurons replaces it.
        self.mlp: Callable[[mx.array], mx.array] = FFN(
            FAMILY.matrices, width, args.ffn_hidden_size or 0, activation, args.bias
        )
        names = ("ln_attn", "ln_mlp") if args.two_norms else ("input_layernorm",)
        if not args.parallel_attn:
            names = ("input_layernorm", "post_attention_layernorm")
        for name in names:
            self[name] = nn.LayerNorm(width, eps=args.layer_norm_epsilon)
        self._norm_names = names
        self._parallel = args.parallel_attn

    @property
    def ffn_norm(self) -> nn.LayerNorm:
        return self[self._norm_names[-1]]

    def __call__(self, h: mx.array, mask: mx.array | str | None = None, cache: Any | None = None) -> mx.array:
        """h: (B, T, D) -> (B, T, D)"""
        attended = h + self.self_attn(self[self._norm_names[0]](h), mask, cache)
        return attended + self.mlp(self.ffn_norm(h if self._parallel else attended))


class FalconModel(nn.Module):
    """Everything but the output matrix. Its parts have the names of the checkpoint."""

    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(args.vocab_size, args.hidden_size)
        self.h = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        self.ln_f = nn.LayerNorm(args.hidden_size, eps=args.layer_norm_epsilon)


class Model(InParts, nn.Module):
    def __init__(self, args: ModelArgs) -> None:
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.transformer = FalconModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.hidden_size, args.vocab_size, bias=False)

    @property
    def embedding(self) -> nn.Embedding:
        return self.transformer.word_embeddings

    @property
    def final_norm(self) -> nn.Module:
        return self.transformer.ln_f

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.transformer.h

    @property
    def ffn_norms(self) -> list[nn.Module]:
        """The norm whose output each layer's FFN takes."""
        return [layer.ffn_norm for layer in self.layers]

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Renames `transformer.h.N.self_attention` to `self_attn`, its name in the other families."""
        renamed = {}
        for name, weight in weights.items():
            if not name.startswith(("transformer.", "lm_head.")):
                name = f"transformer.{name}"
            renamed[name.replace(".self_attention.", ".self_attn.")] = weight
        return super().sanitize(renamed)
