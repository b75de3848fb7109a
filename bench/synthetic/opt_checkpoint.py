"""Writes a random checkpoint of an OPT shape, as sparse as the real ones, for measuring memory and speed."""

from __future__ import annotations

import argparse
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from tqdm import tqdm

from mlx_flash.cli.run import whole_number
from mlx_flash.convert.tensors import write_safetensors
from mlx_flash.errors import FlashError, UsageError
from mlx_flash.source.resolve import demo_folder

from ..tools.report import writable_folder

# name -> (hidden size, layers, heads); Zhang et al. 2022, table 1. The FFN is 4 x wider.
SHAPES = {
    "125m": (768, 12, 12),
    "1.3b": (2048, 24, 32),
    "2.7b": (2560, 32, 32),
    "6.7b": (4096, 32, 32),
    "13b": (5120, 40, 40),
}
VOCABULARY = 50272
POSITIONS = 2048
FFN_BIAS = -1.65  # makes about one neuron in twenty active at pre-activations of unit spread


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="1.3b", help="size of OPT (default: %(default)s)")
    parser.add_argument("--output", type=writable_folder, required=True, help="folder to write the checkpoint to")
    parser.add_argument(
        "--dtype", choices=("float32", "float16"), default="float32", help="type of the weights (default: %(default)s)"
    )
    parser.add_argument("--layers", type=whole_number(1), help="number of layers (default: as in the shape)")
    parser.add_argument(
        "--shards", type=whole_number(1), default=1, help="number of weight files (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="seed of the random numbers (default: %(default)s)"
    )


def main(arguments: argparse.Namespace) -> None:
    if (arguments.output / "config.json").exists():
        raise UsageError(f"{arguments.output} holds a checkpoint already. Choose another --output.")
    arguments.output.mkdir(parents=True, exist_ok=True)
    keys = ("shape", "dtype", "seed", "layers", "shards")
    try:
        write_checkpoint(arguments.output, *(getattr(arguments, key) for key in keys))
    except OSError as error:
        raise FlashError(
            f"{arguments.output} cannot be written ({error.strerror}). Free some room, or choose another --output."
        ) from None
    finally:
        for path in arguments.output.glob("*.partial"):
            path.unlink()
    print(json.dumps({key: getattr(arguments, key) for key in ("command", *keys)}))


def write_checkpoint(
    folder: Path, shape: str, dtype: str, seed: int, layers: int | None = None, shards: int = 1
) -> None:
    """Writes a checkpoint with one tensor in memory at a time. layers: None for as many as in the shape."""
    hidden, all_layers, heads = SHAPES[shape]
    layers = layers or all_layers
    tensors = {
        "model.decoder.embed_tokens.weight": ((VOCABULARY, hidden), 1.0, 0.0),
        "model.decoder.embed_positions.weight": ((POSITIONS + 2, hidden), 0.1, 0.0),
        "model.decoder.final_layer_norm.weight": ((hidden,), 0.0, 1.0),
        "model.decoder.final_layer_norm.bias": ((hidden,), 0.0, 0.0),
    }
    for i in range(layers):
        layer = f"model.decoder.layers.{i}."
        for name in ("q", "k", "v", "out"):
            tensors[f"{layer}self_attn.{name}_proj.weight"] = ((hidden, hidden), hidden**-0.5, 0.0)
            tensors[f"{layer}self_attn.{name}_proj.bias"] = ((hidden,), 0.02, 0.0)
        for name in ("self_attn_layer_norm", "final_layer_norm"):
            tensors[f"{layer}{name}.weight"] = ((hidden,), 0.0, 1.0)
            tensors[f"{layer}{name}.bias"] = ((hidden,), 0.0, 0.0)
        tensors[f"{layer}fc1.weight"] = ((4 * hidden, hidden), hidden**-0.5, 0.0)
        tensors[f"{layer}fc1.bias"] = ((4 * hidden,), 0.0, FFN_BIAS)
        tensors[f"{layer}fc2.weight"] = ((hidden, 4 * hidden), (4 * hidden) ** -0.5, 0.0)
        tensors[f"{layer}fc2.bias"] = ((hidden,), 0.02, 0.0)
    stored = getattr(mx, dtype)
    entries = [
        (name, dims, stored, partial(_normal, [seed, i], dims, spread, mean))
        for i, (name, (dims, spread, mean)) in enumerate(tensors.items())
    ]
    sizes = [int(np.prod(dims)) * stored.size for _, dims, _, _ in entries]
    begins = np.cumsum([0, *sizes])
    shard_of = (begins[:-1] * shards // begins[-1]).tolist()  # by size, in order
    index: dict[str, str] = {}
    with tqdm(total=sum(sizes), unit="B", unit_scale=True, desc="random weights", dynamic_ncols=True) as bar:
        for number in range(shards):
            file = "model.safetensors" if shards == 1 else f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
            part = [entry for entry, shard in zip(entries, shard_of, strict=True) if shard == number]
            write_safetensors(folder / file, part, bar.update)
            index |= {name: file for name, _, _, _ in part}
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}, indent=2) + "\n")
    copy_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(opt_config(hidden, layers, heads), indent=2) + "\n")


def copy_tokenizer(folder: Path) -> None:
    """Copies the demo model's tokenizer, so that the model takes and gives text."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(demo_folder() / name, folder / name)


def opt_config(hidden: int, layers: int, heads: int, vocabulary: int | None = None) -> dict[str, Any]:
    """The config.json of an OPT model of these sizes."""
    return {
        "model_type": "opt",
        "vocab_size": vocabulary or VOCABULARY,
        "hidden_size": hidden,
        "word_embed_proj_dim": hidden,
        "num_hidden_layers": layers,
        "ffn_dim": 4 * hidden,
        "num_attention_heads": heads,
        "max_position_embeddings": POSITIONS,
        "activation_function": "relu",
        "bos_token_id": 2,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }


def _normal(seed: list[int], shape: tuple[int, ...], spread: float, mean: float) -> mx.array:
    values = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return mx.array(values * np.float32(spread) + np.float32(mean))
