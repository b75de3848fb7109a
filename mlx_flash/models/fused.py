"""Attention with one matrix for queries, keys and values, as in Falcon and Persimmon."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import create_causal_mask, scaled_dot_product_attention


class FusedAttention(nn.Module):
    """Attention with H heads in G groups, each of which shares a key and a value.

    G = 1 is multi-query attention, G = H plain attention. The matrix's rows go group by group: H / G queries, the key,
    the value.

    rotated: how many numbers of a head are rotated by position. If 0, ALiBi takes the place of the rotation: it adds a
    bias of slope * p to the score of a key at position p.
    norm_eps: epsilon of the norms on queries and keys; None if there are no such norms.
    """

    def __init__(
        self, width: int, heads: int, groups: int, bias: bool, rotated: int, theta: float, norm_eps: float | None = None
    ) -> None:
        super().__init__()
        self.heads, self.groups, self.head_dim = heads, groups, width // heads
        self.scale = self.head_dim**-0.5
        self.query_key_value = nn.Linear(width, (heads + 2 * groups) * self.head_dim, bias=bias)
        self.dense = nn.Linear(width, width, bias=bias)
        if norm_eps is not None:
            self.q_layernorm = nn.LayerNorm(self.head_dim, eps=norm_eps)
            self.k_layernorm = nn.LayerNorm(self.head_dim, eps=norm_eps)
        if rotated:
            self.rope = nn.RoPE(rotated, base=theta)
        else:
            self._slopes = alibi_slopes(heads)

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None) -> mx.array:
        """x: (B, T, D) -> (B, T, D)"""
        batch, length, _ = x.shape
        fused = self.query_key_value(x).reshape(batch, length, self.groups, -1, self.head_dim)  # (B, T, G, H/G + 2, d)
        queries = fused[..., :-2, :].flatten(2, 3)  # (B, T, H, d)
        keys, values = fused[..., -2, :], fused[..., -1, :]  # (B, T, G, d)
        if "q_layernorm" in self:
            queries, keys = self.q_layernorm(queries), self.k_layernorm(keys)
        queries, keys, values = (array.transpose(0, 2, 1, 3) for array in (queries, keys, values))
        if "rope" in self:
            offset = cache.offset if cache is not None else 0
            queries, keys = self.rope(queries, offset=offset), self.rope(keys, offset=offset)
        total = length
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
            total = (keys[0] if hasattr(cache, "bits") else keys).shape[2]  # Quantised keys are three arrays.
        if "rope" not in self:
            mask = self._with_alibi(mask, length, total, cache).astype(queries.dtype)
        out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.dense(out.transpose(0, 2, 1, 3).reshape(x.shape))  # (B, H, T, d) -> (B, T, D)

    def _with_alibi(self, mask: mx.array | str | None, length: int, total: int, cache: Any | None) -> mx.array:
        """The numbers added to the scores, (H, T, L) or (B, H, T, L): biases, and nearly -inf where `mask` forbids.

        Biases are rounded to bfloat16 as in transformers. This makes a difference from position 257 on.
        """
        end = cache.offset if cache is not None else total  # keys, without padding: an int, or (B,)
        begin = mx.array(end)[..., None] - total  # (1,) or (B, 1)
        positions = (begin + mx.arange(total)).astype(mx.bfloat16)  # (L,) or (B, L)
        bias = (self._slopes[:, None] * positions[..., None, :]).astype(mx.float32) * self.scale  # ([B,] H, L)
        bias = bias[..., None, :]  # ([B,] H, 1, L)
        if mask is None:
            return bias
        allowed: mx.array = create_causal_mask(length, total - length) if isinstance(mask, str) else mask
        return mx.where(allowed, bias, mx.finfo(mx.float16).min)


def alibi_slopes(heads: int) -> mx.array:
    """The slopes of H heads, bfloat16 (H,).

    With n the largest power of two up to H, the first n slopes are 2^(-8 i / n) for i = 1 to n. The others are every
    second slope of 2n heads.
    """
    n = 2 ** int(math.log2(heads))
    slopes = [2 ** (-8 * i / n) for i in range(1, n + 1)]
    slopes += [2 ** (-8 * i / (2 * n)) for i in range(1, 2 * (heads - n), 2)]
    return mx.array(slopes, mx.bfloat16)
