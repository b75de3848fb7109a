"""A model in the parts that streaming and conversion use: `head(layers(embed(tokens)))`."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_attention_mask


class InParts:
    """A base class of Model, before mlx-lm's own: a decoder with Llama's names, unless they are overridden.

    Each layer has `self_attn` and `mlp`, which a streamed layer replaces, and is called as `layer(h, mask, cache)`. The
    model also has `ffn_norms`, the norms whose outputs the FFNs take.
    """

    args: Any
    model: Any
    lm_head: Any

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """inputs: (B, T) token ids -> (B, T, vocab_size) logits"""
        caches = cache if cache is not None else [None] * len(self.layers)
        h = self.embed(inputs)
        mask = create_attention_mask(h, caches[0], window_size=self.window(caches[0], inputs.shape[1]))
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            h = layer(h, mask, layer_cache)
        return self.head(h)

    @property
    def layers(self) -> Any:
        return self.model.layers

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    @property
    def final_norm(self) -> nn.Module:
        return self.model.norm

    def window(self, cache: Any | None, length: int) -> int | None:
        """How many tokens a token attends to, itself included, in a call of `length` tokens; None for all."""
        return None

    def embed(self, inputs: mx.array, offset: int | mx.array = 0) -> mx.array:
        """The hidden states that enter layer 0; attention adds the positions. (B, T) -> (B, T, D)"""
        return self.embedding(inputs)

    def head(self, hidden: mx.array) -> mx.array:
        """The last norm and the output matrix. (B, T, D) -> (B, T, vocab_size)"""
        out = self.final_norm(hidden)
        return self.embedding.as_linear(out) if self.args.tie_word_embeddings else self.lm_head(out)

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """The checkpoint's tensors without the output matrix of a tied model and without tables of rotations."""
        tied = self.args.tie_word_embeddings
        return {
            name: weight
            for name, weight in weights.items()
            if not (name.endswith(".inv_freq") or (tied and name == "lm_head.weight"))
        }
