"""Writes a synthetic mixture-of-experts checkpoint in mlx-lm's format, with real expert shapes and planted routing.

Each expert has a random popularity, and the rest of a router's choice depends on the token. The popularities are drawn
so that the next token reuses as many of a token's experts as published for Qwen3-30B-A3B. Real routing follows the
text, so conclusions about eviction or guessing cannot be drawn from this checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_flash.cli.run import whole_number

from .random_tensors import Load, must_be_new, normal, packed, write_random

# Share of a token's experts that the next token reuses: github.com/kekzl/imp, pull request 1359, three prompts.
REPEATED = 0.45
SHARED = 0.5  # the part of an embedding that all tokens share; popularity comes from it
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}


@dataclass(frozen=True)
class Shape:
    """The shape of a published model. layers: the number in the whole model."""

    model_type: str
    layers: int
    hidden: int
    neurons: int  # per expert
    experts: int
    choices: int  # experts per token
    heads: int
    kv_heads: int
    head_dim: int
    quantisation: dict[str, Any]
    all_quantised: bool  # everything but routers and norms is quantised; False: only the experts


SHAPES = {
    # huggingface.co/Qwen/Qwen3-30B-A3B, config.json; quantised as in huggingface.co/mlx-community/Qwen3-30B-A3B-4bit
    "qwen3-30b-a3b": Shape("qwen3_moe", 48, 2048, 768, 128, 8, 32, 4, 128, {"group_size": 64, "bits": 4}, True),
    # huggingface.co/openai/gpt-oss-20b, config.json
    "gpt-oss-20b": Shape("gpt_oss", 24, 2880, 2880, 32, 4, 64, 8, 64, MXFP4, False),
    "tiny": Shape("qwen3_moe", 4, 128, 64, 32, 4, 4, 2, 32, {"group_size": 64, "bits": 4}, True),  # for the tests
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shape", choices=SHAPES, default="qwen3-30b-a3b", help="model to copy the shape of (default: %(default)s)"
    )
    parser.add_argument("--layers", type=whole_number(1, 1000), help="number of layers (default: as in the model)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="float32",
        help="type of unquantised tensors and of scales; MLX's CPU backend is slow with 16 bits (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: %(default)s)")


def main(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    must_be_new(output)
    shape = SHAPES[arguments.shape]
    layers = arguments.layers or shape.layers
    size = write_mixture(output, shape, layers, getattr(mx, arguments.dtype), arguments.seed)
    print(
        json.dumps({"command": "synthetic-mixture", "shape": arguments.shape, "layers": layers, "bytes": size}),
    )


def write_mixture(
    output: Path, shape: Shape, layers: int, dtype: mx.Dtype, seed: int, repeated: float = REPEATED
) -> int:
    """Writes a checkpoint to a temporary folder and renames it, so that it is complete. Returns its bytes.

    repeated: the share of a token's experts that the next token reuses.
    """
    return write_random(
        output,
        lambda vocabulary: _tensors(shape, layers, vocabulary, dtype, seed, repeated),
        lambda vocabulary: _config(shape, layers, vocabulary, seed, repeated),
    )


def popularity(experts: int, choices: int, repeated: float, rng: np.random.Generator) -> np.ndarray:
    """A bias (E,) for each expert's logit at which tokens repeat a share `repeated` of each other's `choices`.

    The rest of a logit is a standard normal for every token. The biases are normal, and the repeated share grows with
    their spread, which is found by bisection.
    """
    shape = rng.standard_normal(experts)
    noise = rng.standard_normal((400, experts))
    low, high = 0.0, 20.0
    for _ in range(30):
        spread = (low + high) / 2
        chosen = np.zeros(noise.shape, np.bool_)
        np.put_along_axis(chosen, np.argpartition(-(noise + spread * shape), choices, axis=1)[:, :choices], True, 1)
        share = (chosen[1:] & chosen[:-1]).sum() / (choices * (len(chosen) - 1))
        low, high = (spread, high) if share < repeated else (low, spread)
    return low * shape


def _tensors(
    shape: Shape, layers: int, vocabulary: int, dtype: mx.Dtype, seed: int, repeated: float
) -> Iterator[tuple[str, tuple[int, ...], mx.Dtype, Load]]:
    """(name, shape, dtype, load) of all tensors, under mlx-lm's names."""
    hidden = shape.hidden
    common = _unit(np.random.default_rng([seed, 0]).standard_normal(hidden))

    def plain(name: str, dims: tuple[int, ...], spread: float, mean: float = 0.0) -> Any:
        return name, dims, dtype, partial(normal, [seed, *name.encode()], dims, spread, mean, dtype)

    def embedding() -> mx.array:
        own = np.random.default_rng([seed, 1]).standard_normal((vocabulary, hidden)) / np.sqrt(hidden)
        return mx.array((np.sqrt(1 - SHARED**2) * own + SHARED * common).astype(np.float32)).astype(dtype)

    def router(layer: int) -> mx.array:
        rng = np.random.default_rng([seed, 2, layer])
        own = rng.standard_normal((shape.experts, hidden)) / np.sqrt(hidden)
        own -= np.outer(own @ common, common)  # make a token's own part independent of the common part
        bias = popularity(shape.experts, shape.choices, repeated, rng) * np.sqrt(1 - SHARED**2)
        return mx.array((own + np.outer(bias / (np.sqrt(hidden) * SHARED), common)).astype(np.float32)).astype(dtype)

    def matrix(name: str, dims: tuple[int, int], spread: float) -> Iterator[Any]:
        if shape.all_quantised:
            yield from packed(name, shape.quantisation, dims, spread, dtype, [seed, *name.encode()])
        else:
            yield plain(f"{name}.weight", dims, spread)

    if shape.all_quantised:
        bits, group = shape.quantisation["bits"], shape.quantisation["group_size"]
        quantised = cache(lambda: mx.quantize(embedding(), group, bits))
        parts = (("weight", hidden * bits // 32, mx.uint32), ("scales", hidden // group, dtype))
        for i, (part, columns, kind) in enumerate((*parts, ("biases", hidden // group, dtype))):
            yield f"model.embed_tokens.{part}", (vocabulary, columns), kind, partial(lambda i: quantised()[i], i)
    else:
        yield "model.embed_tokens.weight", (vocabulary, hidden), dtype, embedding
    yield from matrix("lm_head", (vocabulary, hidden), hidden**-0.5)
    yield plain("model.norm.weight", (hidden,), 0.0, 1.0)
    for layer in range(layers):
        prefix = f"model.layers.{layer}."
        gpt = shape.model_type == "gpt_oss"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield plain(f"{prefix}{norm}.weight", (hidden,), 0.0, 1.0)
        width = shape.heads * shape.head_dim
        sizes = {
            "q_proj": (width, hidden),
            "k_proj": (shape.kv_heads * shape.head_dim, hidden),
            "v_proj": (shape.kv_heads * shape.head_dim, hidden),
            "o_proj": (hidden, width),
        }
        for name, dims in sizes.items():
            # Attention and experts add little to the residual, so that the planted routing holds in every layer.
            spread = dims[1] ** -0.5 * (0.01 if name == "o_proj" else 1.0)
            yield from matrix(f"{prefix}self_attn.{name}", dims, spread)
            if gpt:
                yield plain(f"{prefix}self_attn.{name}.bias", dims[:1], 0.0)
        if gpt:
            yield plain(f"{prefix}self_attn.sinks", (shape.heads,), 0.1)
        else:
            for norm in ("q_norm", "k_norm"):
                yield plain(f"{prefix}self_attn.{norm}.weight", (shape.head_dim,), 0.0, 1.0)
        gate = "router" if gpt else "gate"
        yield f"{prefix}mlp.{gate}.weight", (shape.experts, hidden), dtype, partial(router, layer)
        if gpt:
            yield plain(f"{prefix}mlp.router.bias", (shape.experts,), 0.0)
        for name in ("gate_proj", "up_proj", "down_proj"):
            rows, columns = (hidden, shape.neurons) if name == "down_proj" else (shape.neurons, hidden)
            path = f"{prefix}mlp.{'experts' if gpt else 'switch_mlp'}.{name}"
            spread = columns**-0.5 * (0.01 if name == "down_proj" else 1.0)
            yield from packed(
                path, shape.quantisation, (shape.experts, rows, columns), spread, dtype, [seed, layer, len(name)]
            )
            if gpt:
                yield plain(f"{path}.bias", (shape.experts, rows), 0.0)


def _config(shape: Shape, layers: int, vocabulary: int, seed: int, repeated: float) -> dict[str, Any]:
    config: dict[str, Any] = {
        "model_type": shape.model_type,
        "synthetic": {"repeated": repeated, "seed": seed},
        "vocab_size": vocabulary,
        "hidden_size": shape.hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_experts_per_tok": shape.choices,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
        "quantization": shape.quantisation,
    }
    if shape.model_type == "gpt_oss":
        kinds = ["sliding_attention" if layer % 2 == 0 else "full_attention" for layer in range(layers)]
        return config | {
            "max_position_embeddings": 131072,  # 32 x 4096, where 32 is its RoPE scaling factor
            "intermediate_size": shape.neurons,
            "num_local_experts": shape.experts,
            "sliding_window": 128,
            "layer_types": kinds,
            "rope_theta": 150000,
        }
    return config | {
        "intermediate_size": 3 * shape.hidden,
        "moe_intermediate_size": shape.neurons,
        "num_experts": shape.experts,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rope_theta": 1000000.0,
    }


def _unit(vector: np.ndarray) -> np.ndarray:
    return vector / np.linalg.norm(vector)
