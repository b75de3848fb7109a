"""Writes a synthetic checkpoint whose lookup tables are as large as a published model's, with small layers.

The tables hold random numbers. Which rows real text asks for cannot be seen in it. Every other matrix is small, so a
token's time is the time of looking up rather than of the layers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.convert.tensors import write_safetensors

from .random_tensors import bytes_of, complete, must_be_new, must_fit

PIECE_BYTES = 64 << 20  # written at once
GROUP_SIZE = 32  # numbers that share a scale, in 4 bits

PER_LAYER: dict[str, Any] = {
    "vocab_size": 262144,
    "vocab_size_per_layer_input": 262144,
    "num_hidden_layers": 35,
    "num_kv_shared_layers": 15,
    "hidden_size_per_layer_input": 256,
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 25,
    "altup_num_inputs": 4,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "laurel_rank": 16,
    "model_type": "gemma3n_text",
    "rms_norm_eps": 1e-6,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
    "rope_local_base_freq": 10000.0,
    "rope_theta": 1000000.0,
    "final_logit_softcapping": 30.0,
    "altup_coef_clip": 120.0,
    "altup_correct_scale": True,
    "altup_active_idx": 0,
}
N_GRAMS: dict[str, Any] = {
    "vocab_size": 8192,
    "ngram_vocab_size_ratio": 955,  # 7.8 million rows in each of the tables
    "emb_neighbor_num": 3,
    "emb_split_num": 4,
    "hidden_size": 1280,  # 8 tables of 160 numbers
    "num_layers": 2,
    "ffn_hidden_size": 64,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 64,
    "n_routed_experts": 4,
    "zero_expert_num": 2,
    "num_attention_heads": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 32,
    "routed_scaling_factor": 1.0,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 32768,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
}
# name -> (model type, configuration)
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    # huggingface.co/google/gemma-3n-E4B-it, config.json
    "per-layer": ("gemma3n", {"text_config": PER_LAYER}),
    "n-grams": ("longcat_flash_ngram", N_GRAMS),
    "tiny": ("longcat_flash_ngram", {**N_GRAMS, "vocab_size": 512, "ngram_vocab_size_ratio": 20}),  # for the tests
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="per-layer", help="kind of tables (default: %(default)s)")
    parser.add_argument(
        "--bits", type=int, choices=(4, 16), default=16, help="bits of a table's number (default: %(default)s)"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")


def main(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    must_be_new(output)
    size = write_tables(output, arguments.shape, arguments.bits)
    print(json.dumps({"command": "synthetic-tables", "shape": arguments.shape, "bits": arguments.bits, "bytes": size}))


def write_tables(output: Path, shape: str, bits: int) -> int:
    """Writes a checkpoint to a temporary folder and renames it, so that it is complete. Returns its bytes."""
    model_type, config = SHAPES[shape]
    config = {"model_type": model_type, **config}
    if bits == 4:
        config["quantization"] = {"group_size": GROUP_SIZE, "bits": 4}
    tensors = list(_tensors(config, bits))
    size = bytes_of(tensors)
    with complete(output) as partial_folder:
        must_fit(size, partial_folder, output, "another --output")
        (partial_folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        with tqdm(total=size, unit="B", unit_scale=True, desc="synthetic tables", dynamic_ncols=True) as bar:
            write_safetensors(partial_folder / "model.safetensors", tensors, bar.update)
    return size


def _tensors(config: dict[str, Any], bits: int) -> Iterator[tuple[str, tuple[int, ...], mx.Dtype, Any]]:
    """(name, shape, dtype, load) of all tensors, in mlx-lm's names. Tables have `bits` bits, other tensors 32."""
    from mlx.nn import Embedding
    from mlx.utils import tree_flatten
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    mx.random.seed(0)
    model = model_class(args_class.from_dict(config))
    embeddings = [(path, module) for path, module in model.named_modules() if isinstance(module, Embedding)]
    largest = max(module.weight.size for _, module in embeddings)
    tables = {f"{path}.weight" for path, module in embeddings if module.weight.size > largest / 2}
    parameters: Any = tree_flatten(model.parameters())
    for number, (name, array) in enumerate(parameters):
        rows, shape = array.shape[0], tuple(array.shape)
        if name not in tables:
            yield name, shape, mx.float32, partial(lambda array: array.astype(mx.float32), array)
        elif bits == 16:
            yield name, shape, mx.float16, partial(_numbers, rows, shape[1], number)
        else:
            path, groups = name.removesuffix(".weight"), shape[1] // GROUP_SIZE
            yield name, (rows, shape[1] // 8), mx.uint32, partial(_words, rows, shape[1] // 8, number)
            for part in ("scales", "biases"):
                yield f"{path}.{part}", (rows, groups), mx.float16, partial(_numbers, rows, groups, number)


def _numbers(rows: int, width: int, seed: int) -> Iterator[mx.array]:
    """Pieces of a table (rows, width) of float16: random numbers of either sign, from 1/16 to 1/8."""
    for piece in _random(rows, 2 * width, seed):
        halves = piece.view(np.uint16)
        halves &= 0x83FF  # sign and fraction
        halves |= 0x2C00  # exponent
        yield mx.array(halves).view(mx.float16)


def _words(rows: int, width: int, seed: int) -> Iterator[mx.array]:
    """Pieces of a table (rows, width) of packed numbers."""
    for piece in _random(rows, 4 * width, seed):
        yield mx.array(piece.view(np.uint32))


def _random(rows: int, row_bytes: int, seed: int) -> Iterator[np.ndarray]:
    """Random bytes, uint8 (n, row_bytes), of `rows` rows in pieces."""
    generator, at_once = np.random.default_rng(seed), max(1, PIECE_BYTES // row_bytes)
    for begin in range(0, rows, at_once):
        count = min(at_once, rows - begin)
        yield np.frombuffer(generator.bytes(count * row_bytes), np.uint8).reshape(count, row_bytes).copy()
