"""OPT and models that share its architecture (Galactica): a decoder with learned positions and a two-matrix FFN."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.base import BaseModelArgs, create_attention_mask, scaled_dot_product_attention

from .family import Family

FAMILY = Family(
    ffn="model.decoder.layers.{}.mlp",
    matrices=("fc1", "fc2"),
    activations={"relu": "relu"},
    activation_key="activation_function",
    default_activation="relu",
)

# Rows 0 and 1 of the position table are never used for text: position p is row p + 2.
POSITION_ROWS_RESERVED = 2

ACTIVATIONS = {"relu": nn.relu, "gelu": nn.gelu}


@dataclass
class ModelArgs(BaseModelArgs):
    """The keys of an OPT ``config.json`` that change the computation; the defaults are Hugging Face's."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    ffn_dim: int
    num_attention_heads: int
    max_position_embeddings: int = 2048
    do_layer_norm_before: bool = True
    _remove_final_layer_norm: bool = False
    word_embed_proj_dim: int | None = None
    activation_function: str = "relu"
    enable_bias: bool = True
    layer_norm_elementwise_affine: bool = True
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if self.activation_function not in ACTIVATIONS:
            raise ValueError(
                f"activation_function {self.activation_function!r} is not supported for OPT: "
                f"expected one of {', '.join(ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads {self.num_attention_heads}"
            )

    @property
    def word_dims(self) -> int:
        """Width of the token embeddings and of the output matrix's input."""
        return self.hidden_size if self.word_embed_proj_dim is None else self.word_embed_proj_dim

    @property
    def has_final_norm(self) -> bool:
        """Whether the decoder has a last norm. Post-norm models have none, because their layers end in a norm."""
        return self.do_layer_norm_before and not self._remove_final_layer_norm


class Attention(nn.Module):
    """Causal multi-head self-attention, scores scaled by ``head_dim ** -0.5``."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        dims = args.hidden_size
        self.num_heads = args.num_attention_heads
        self.scale = (dims // self.num_heads) ** -0.5
        self.q_proj = nn.Linear(dims, dims, bias=args.enable_bias)
        self.k_proj = nn.Linear(dims, dims, bias=args.enable_bias)
        self.v_proj = nn.Linear(dims, dims, bias=args.enable_bias)
        self.out_proj = nn.Linear(dims, dims, bias=args.enable_bias)

    def __call__(self, x: mx.array, mask: mx.array | str | None = None, cache: Any | None = None) -> mx.array:
        """x: (B, T, D) -> (B, T, D)"""
        queries = self._split_heads(self.q_proj(x))  # (B, heads, T, head_dim)
        keys = self._split_heads(self.k_proj(x))
        values = self._split_heads(self.v_proj(x))
        if cache is not None:
            keys, values = cache.update_and_fetch(keys, values)
        out = scaled_dot_product_attention(queries, keys, values, cache=cache, scale=self.scale, mask=mask)
        return self.out_proj(out.transpose(0, 2, 1, 3).reshape(x.shape))  # (B, heads, T, head_dim) -> (B, T, D)

    def _split_heads(self, x: mx.array) -> mx.array:
        """x: (B, T, D) -> (B, heads, T, head_dim)"""
        batch, length, _ = x.shape
        return x.reshape(batch, length, self.num_heads, -1).transpose(0, 2, 1, 3)


class MLP(nn.Module):
    """``fc2(act(fc1(x)))``. Neuron i is row i of ``fc1`` (with its bias) and column i of ``fc2``."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.fc1 = nn.Linear(args.hidden_size, args.ffn_dim, bias=args.enable_bias)
        self.fc2 = nn.Linear(args.ffn_dim, args.hidden_size, bias=args.enable_bias)
        self.activation = ACTIVATIONS[args.activation_function]

    def __call__(self, x: mx.array) -> mx.array:
        """x: (B, T, D) -> (B, T, D)"""
        return self.fc2(self.activation(self.fc1(x)))  # (B, T, D) -> (B, T, F) -> (B, T, D)


class DecoderLayer(nn.Module):
    """Attention and ``mlp``, each with a residual. Norms come before (most OPT models) or after them (opt-350m)."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        affine = args.layer_norm_elementwise_affine
        self.norm_before = args.do_layer_norm_before
        self.self_attn = Attention(args)
        self.self_attn_layer_norm = nn.LayerNorm(args.hidden_size, affine=affine)
        # Typed as a callable, because a layer that streams its neurons replaces it.
        self.mlp: Callable[[mx.array], mx.array] = MLP(args)
        self.final_layer_norm = nn.LayerNorm(args.hidden_size, affine=affine)

    def __call__(self, h: mx.array, mask: mx.array | str | None = None, cache: Any | None = None) -> mx.array:
        """h: (B, T, D) -> (B, T, D)"""
        if self.norm_before:
            h = h + self.self_attn(self.self_attn_layer_norm(h), mask, cache)
            return h + self.mlp(self.final_layer_norm(h))
        h = self.self_attn_layer_norm(h + self.self_attn(h, mask, cache))
        return self.final_layer_norm(h + self.mlp(h))


class Decoder(nn.Module):
    """Everything but the output matrix. Its parts have the names of the checkpoint."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        dims, word_dims = args.hidden_size, args.word_dims
        self.max_positions = args.max_position_embeddings
        self.embed_tokens = nn.Embedding(args.vocab_size, word_dims)
        self.embed_positions = nn.Embedding(self.max_positions + POSITION_ROWS_RESERVED, dims)
        if word_dims != dims:
            self.project_in = nn.Linear(word_dims, dims, bias=False)
            self.project_out = nn.Linear(dims, word_dims, bias=False)
        self.layers = [DecoderLayer(args) for _ in range(args.num_hidden_layers)]
        if args.has_final_norm:
            self.final_layer_norm = nn.LayerNorm(dims, affine=args.layer_norm_elementwise_affine)

    def embed(self, inputs: mx.array, offset: int | mx.array = 0) -> mx.array:
        """Token and position embeddings. inputs: (B, T) -> (B, T, D)"""
        h = self.embed_tokens(inputs)  # (B, T, word_dims)
        if "project_in" in self:
            h = self.project_in(h)
        return h + self.embed_positions(self._position_rows(inputs.shape[1], offset))

    def finish(self, h: mx.array) -> mx.array:
        """The last norm and the projection to the word dimension. h: (B, T, D) -> (B, T, word_dims)"""
        if "final_layer_norm" in self:
            h = self.final_layer_norm(h)
        return self.project_out(h) if "project_out" in self else h

    def _position_rows(self, length: int, offset: int | mx.array) -> mx.array:
        """Rows of the position table: (T,) for an offset shared by the batch, (B, T) for one per sequence."""
        if isinstance(offset, int):
            if offset + length > self.max_positions:
                raise ValueError(
                    f"position {offset + length} is past this model's {self.max_positions} positions: "
                    "shorten the prompt or generate fewer tokens"
                )
            positions = mx.arange(offset, offset + length)
        else:
            positions = offset[..., None] + mx.arange(length)  # (B, 1) + (T,) -> (B, T)
        # A batch cache counts from minus the left padding, so padding has negative positions. Padding is masked, so any
        # row will do. A row outside the table would read foreign memory.
        return mx.clip(positions, 0, self.max_positions - 1) + POSITION_ROWS_RESERVED


class OPTModel(nn.Module):
    """Gives parameters the ``model.decoder.`` prefix that the checkpoints have."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.decoder = Decoder(args)


class Model(nn.Module):
    """A causal language model: ``head(layers(embed(tokens)))``."""

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.model_type = args.model_type
        self.model = OPTModel(args)
        if not args.tie_word_embeddings:
            self.lm_head = nn.Linear(args.word_dims, args.vocab_size, bias=False)

    def __call__(self, inputs: mx.array, cache: list[Any] | None = None) -> mx.array:
        """inputs: (B, T) token ids -> (B, T, vocab_size) logits"""
        caches = cache if cache is not None else [None] * len(self.layers)
        h = self.embed(inputs, caches[0].offset if caches[0] is not None else 0)
        mask = create_attention_mask(h, caches[0])
        for layer, layer_cache in zip(self.layers, caches, strict=True):
            h = layer(h, mask, layer_cache)
        return self.head(h)

    def embed(self, inputs: mx.array, offset: int | mx.array = 0) -> mx.array:
        """The hidden states that enter layer 0.

        Args:
            inputs: (B, T) token ids.
            offset: number of tokens before ``inputs``: an int, or (B,) with one number for each sequence. A number -p
                means that the sequence begins with p padding tokens.

        Returns:
            (B, T, D)

        Raises:
            ValueError: an int offset leads past the model's positions. The values of an array are not checked, which
                would need a synchronisation; positions past the end get the last row.
        """
        return self.model.decoder.embed(inputs, offset)

    def head(self, hidden: mx.array) -> mx.array:
        """The last norm and the output matrix. hidden: (B, T, D) -> (B, T, vocab_size)"""
        h = self.model.decoder.finish(hidden)
        if self.args.tie_word_embeddings:
            return self.model.decoder.embed_tokens.as_linear(h)
        return self.lm_head(h)

    @property
    def layers(self) -> list[DecoderLayer]:
        return self.model.decoder.layers

    @property
    def ffn_norms(self) -> list[nn.LayerNorm] | None:
        """The norm whose output each layer's FFN takes; None if the FFN takes the residual itself."""
        return [layer.final_layer_norm for layer in self.layers] if self.args.do_layer_norm_before else None

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Changes the checkpoint's names to this module's names.

        ``[model.]decoder.layers.N.fc1.weight`` becomes ``model.decoder.layers.N.mlp.fc1.weight``; ``fc2`` likewise.
        Names of this module stay as they are. The output matrix of a tied model, a final norm that the configuration
        rules out, and the version buffer of old checkpoints are dropped.
        """
        renamed = {}
        for name, weight in weights.items():
            if name.startswith("decoder."):
                name = f"model.{name}"
            if name == "model.decoder.version":
                continue
            if name == "lm_head.weight" and self.args.tie_word_embeddings:
                continue
            if name.startswith("model.decoder.final_layer_norm.") and not self.args.has_final_norm:
                continue
            parts = name.split(".")
            # model . decoder . layers . N . fc1 . weight
            if name.startswith("model.decoder.layers.") and parts[4] in ("fc1", "fc2"):
                name = ".".join([*parts[:4], "mlp", *parts[4:]])
            renamed[name] = weight
        return renamed
