"""Writes a random Llama, dense and with SiLU, for measuring models whose layers are streamed.

The numbers are random, so the text is noise. Sizes, types and the order of reading are those of a real checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_flash.cli.run import whole_number

from .random_tensors import RandomTensor, must_be_new, normal, packed, write_random

# Hidden size, FFN width, heads, key-value heads: huggingface.co/meta-llama/Llama-3.2-1B and Llama-3.1-8B, config.json;
# "tiny" is for the tests.
SHAPES = {"1b": (2048, 8192, 32, 8), "8b": (4096, 14336, 32, 8), "tiny": (128, 256, 4, 2)}
QUANTISATION = {"group_size": 64, "bits": 4}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="1b", help="model to copy the widths of (default: 1b)")
    parser.add_argument("--layers", type=whole_number(1, 1000), default=16, help="number of layers (default: 16)")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "4bit"),
        default="float32",
        help="type of the weights; MLX's CPU backend is slow with 16 bits (default: %(default)s)",
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random numbers (default: %(default)s)")


def main(arguments: argparse.Namespace) -> None:
    must_be_new(arguments.output)
    size = write_dense(arguments.output, arguments.shape, arguments.layers, arguments.dtype, arguments.seed)
    print(
        json.dumps({"command": "synthetic-dense", "shape": arguments.shape, "layers": arguments.layers, "bytes": size})
    )


def write_dense(output: Path, shape: str, layers: int, dtype: str, seed: int) -> int:
    """Writes a checkpoint and returns its bytes. dtype: "float32", "bfloat16" or "4bit" (with float32 scales)."""
    hidden, neurons, heads, kv_heads = SHAPES[shape]
    quantised = dtype == "4bit"
    kind = mx.float32 if quantised else getattr(mx, dtype)

    def matrix(name: str, dims: tuple[int, int], spread: float) -> Iterator[RandomTensor]:
        if quantised:
            yield from packed(name, QUANTISATION, dims, spread, kind, [seed, *name.encode()])
        else:
            yield f"{name}.weight", dims, kind, partial(normal, [seed, *name.encode()], dims, spread, 0.0, kind)

    def tensors(vocabulary: int) -> Iterator[RandomTensor]:
        yield from matrix("model.embed_tokens", (vocabulary, hidden), 1.0)
        yield from matrix("lm_head", (vocabulary, hidden), hidden**-0.5)
        yield "model.norm.weight", (hidden,), kind, partial(mx.ones, (hidden,), kind)
        width = hidden // heads * kv_heads
        sizes = {"q_proj": (hidden, hidden), "k_proj": (width, hidden), "v_proj": (width, hidden)}
        sizes["o_proj"] = (hidden, hidden)
        for layer in range(layers):
            prefix = f"model.layers.{layer}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"{prefix}{norm}.weight", (hidden,), kind, partial(mx.ones, (hidden,), kind)
            for name, dims in sizes.items():
                yield from matrix(f"{prefix}self_attn.{name}", dims, dims[1] ** -0.5)
            for name, dims in (("gate_proj", (neurons, hidden)), ("up_proj", (neurons, hidden))):
                yield from matrix(f"{prefix}mlp.{name}", dims, hidden**-0.5)
            yield from matrix(f"{prefix}mlp.down_proj", (hidden, neurons), neurons**-0.5)

    def config(vocabulary: int) -> dict[str, Any]:
        told: dict[str, Any] = {
            "model_type": "llama",
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "intermediate_size": neurons,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "rms_norm_eps": 1e-5,
            "rope_theta": 500000.0,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "hidden_act": "silu",
            "synthetic": {"seed": seed},
        }
        return told | ({"quantization": QUANTISATION} if quantised else {"torch_dtype": dtype})

    return write_random(output, tensors, config)
