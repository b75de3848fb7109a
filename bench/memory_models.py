"""Makes models of every kind for `peak-memory`: wide, with few layers, 1 to 2 GB each."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_flash.convert.neuron_file import write_neurons
from mlx_flash.convert.output import publish
from mlx_flash.convert.tensors import write_safetensors
from mlx_flash.flash.files import Manifest, NeuronLayout
from mlx_flash.loading.model_types import activation_of

from .synthetic.neuron_store import store_entry
from .synthetic.opt_checkpoint import FFN_BIAS, copy_tokenizer, opt_config
from .tools.report import writable_folder

FOUR_BITS = {"group_size": 64, "bits": 4}
MXFP4 = {"group_size": 32, "bits": 4, "mode": "mxfp4"}

COMMON: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "num_hidden_layers": 2,
    "intermediate_size": 2048,
    "moe_intermediate_size": 384,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "num_experts_per_tok": 2,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": False,
    "attention_bias": False,
}
# MLX's CPU backend multiplies quantised and 16-bit numbers at about 1 GFLOP/s, so a token uses few, small experts.
MIXTURES: dict[str, tuple[dict[str, Any], dict[str, Any] | None, mx.Dtype]] = {
    "qwen3-moe-4bit": (
        {
            "model_type": "qwen3_moe",
            "num_experts": 768,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
        FOUR_BITS,
        mx.float32,
    ),
    "olmoe-bf16": (
        {
            "model_type": "olmoe",
            "intermediate_size": 256,
            "num_attention_heads": 8,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_experts": 320,
        },
        None,
        mx.bfloat16,
    ),
    "gpt-oss-mxfp4": (
        {
            "model_type": "gpt_oss",
            "intermediate_size": 384,
            "num_local_experts": 768,
            "sliding_window": 128,
            "layer_types": ["sliding_attention", "full_attention"],
            "rope_scaling": None,
            "num_key_value_heads": 8,
        },
        MXFP4,
        mx.float32,
    ),
    "deepseek-v2-4bit": (
        {
            "model_type": "deepseek_v2",
            "num_hidden_layers": 3,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "q_lora_rank": None,
            "kv_lora_rank": 512,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "n_routed_experts": 768,
            "n_shared_experts": 2,
            "first_k_dense_replace": 1,
            "moe_layer_freq": 1,
            "routed_scaling_factor": 1.0,
            "n_group": 1,
            "topk_group": 1,
            "topk_method": "greedy",
            "rope_scaling": {
                "type": "yarn",
                "factor": 4.0,
                "mscale": 0.7,
                "mscale_all_dim": 0.7,
                "original_max_position_embeddings": 1024,
                "beta_fast": 32,
                "beta_slow": 1,
            },
        },
        FOUR_BITS,
        mx.float32,
    ),
}
RELU_LLAMA: dict[str, Any] = {
    **COMMON,
    "model_type": "llama",
    "hidden_act": "relu",
    "vocab_size": 48000,
    "hidden_size": 2048,
    "num_hidden_layers": 3,
    "intermediate_size": 5632,
    "num_key_value_heads": 8,
}
OPT = opt_config(2048, 3, 32)
STORES: dict[str, tuple[dict[str, Any], str, int]] = {  # name -> (configuration, dtype, bits of the neurons)
    "opt-f32": (OPT, "float32", 16),
    "opt-f16": ({**OPT, "num_hidden_layers": 4}, "float16", 16),
    "opt-4bit": ({**OPT, "vocab_size": 65536}, "float16", 4),
    "relu-llama-bf16": (RELU_LLAMA, "bfloat16", 16),
}
SHADOW_BITS, SHADOW_GROUP = 4, 64
SHARE = 0.1  # predicted neurons / neurons, in the predictors' reports


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=writable_folder, required=True, help="folder to write one folder per model to")


def main(arguments: argparse.Namespace) -> None:
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    for name in (*STORES, *MIXTURES):
        folder, partial_folder = output / name, output / f"{name}.partial"
        if not folder.exists():
            shutil.rmtree(partial_folder, ignore_errors=True)
            partial_folder.mkdir()
            if name in STORES:
                write_random_store(partial_folder, *STORES[name])
            else:
                changes, quantisation, dtype = MIXTURES[name]
                write_random_mixture(partial_folder, {**COMMON, **changes}, dtype, quantisation)
            partial_folder.rename(folder)
        print(folder)
    print(json.dumps({"command": "memory-models", "models": [str(output / name) for name in (*STORES, *MIXTURES)]}))


def write_random_store(folder: Path, config: dict[str, Any], dtype: str, bits: int) -> None:
    """Writes a store with random weights. Its shadow predictor is the deciding projection of each layer."""
    from mlx_flash.loading.model_types import model_classes

    model_class, args_class = model_classes(config)
    model = model_class(args_class.from_dict(config))  # its own random weights are never evaluated
    layers, width = config["num_hidden_layers"], config["hidden_size"]
    neurons = config.get("ffn_dim") or config["intermediate_size"]
    parts = ("up", "down") if config["model_type"] == "opt" else ("gate", "up", "down")
    layout = NeuronLayout.plan(dtype, layers, neurons, width, parts, bits)
    kind = getattr(mx, dtype)

    def rows(layer: int) -> tuple[mx.array, ...]:
        return tuple(_random(f"{layer}.{part}", (neurons, width), kind) for part in parts)

    def shadow(layer: int, place: int) -> mx.array:
        return mx.quantize(rows(layer)[0].T, group_size=SHADOW_GROUP, bits=SHADOW_BITS)[place]

    write_neurons(folder, layout, rows, lambda _: None)
    parameters: Any = tree_flatten(model.parameters())
    shapes = {name: array.shape for name, array in parameters if ".mlp." not in name}
    if config["model_type"] == "opt":
        for layer in range(layers):
            shapes |= {f"model.decoder.layers.{layer}.mlp.up_bias": (neurons,)}
            shapes |= {f"model.decoder.layers.{layer}.mlp.down_bias": (width,)}
    resident = [(name, shape, kind, partial(_random, name, shape, kind)) for name, shape in shapes.items()]
    sums = {Manifest.resident_file: write_safetensors(folder / Manifest.resident_file, resident)}
    groups = (width, neurons // SHADOW_GROUP)
    words = (width, neurons * SHADOW_BITS // 32)
    predictor: list[tuple[str, tuple[int, ...], mx.Dtype, Any]] = []
    for layer in range(layers):
        for place, (name, shape, of) in enumerate(
            (("weight", words, mx.uint32), ("scales", groups, kind), ("biases", groups, kind))
        ):
            predictor.append((f"{layer}.{name}", shape, of, partial(shadow, layer, place)))
        bias = FFN_BIAS if config["model_type"] == "opt" else 0.0
        predictor.append((f"{layer}.c", (neurons,), mx.float32, partial(mx.full, (neurons,), bias, mx.float32)))
    shadow_file = Manifest.predictor_file("shadow")
    sums[shadow_file] = write_safetensors(folder / shadow_file, predictor)
    copy_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    each, table = [SHARE] * layers, [[SHARE]] * layers
    report = {
        "recall": each,
        "predicted": each,
        "active": each,
        "bytes": (folder / shadow_file).stat().st_size,
        "bits": SHADOW_BITS,
        "group_size": SHADOW_GROUP,
        "target": 0.99,
        "table": {"recall": [0.99], "threshold": [[0.0]] * layers, "caught": table, "predicted": table},
        "perplexity": None,
    }
    manifest = Manifest(
        model_type=config["model_type"],
        source={"synthetic": {}},
        layout=layout,
        activation=asdict(activation_of(config, folder)),
        resident_dtype=dtype,
        decode_tokens=8,
        all_neurons_layers=(),
        predictors={"shadow": report},
        default_predictor="shadow",
        files={path.name: store_entry(path, sums) for path in sorted(folder.iterdir())},
    )
    publish(folder, manifest)


def write_random_mixture(
    folder: Path, config: dict[str, Any], dtype: mx.Dtype, quantisation: dict[str, Any] | None
) -> None:
    """Writes a checkpoint with the names and shapes of mlx-lm's model.

    quantisation: how the experts, and nothing else, are quantised; None: not at all.
    """
    from mlx_lm.utils import _get_classes

    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))  # its own random weights are never evaluated
    if quantisation is not None:
        nn.quantize(
            model,
            **quantisation,
            class_predicate=lambda path, module: (
                hasattr(module, "to_quantized") and ("switch_mlp" in path or ".experts." in path)
            ),
        )
        config = {**config, "quantization": quantisation}
    parameters: Any = tree_flatten(model.parameters())
    entries = []
    for name, array in parameters:
        kind = array.dtype if array.dtype in (mx.uint32, mx.uint8) else dtype
        packed = quantisation is not None and ("switch_mlp" in name or ".experts." in name)
        entries.append((name, array.shape, kind, partial(_random, name, array.shape, kind, packed)))
    write_safetensors(folder / "model.safetensors", entries)
    copy_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _random(name: str, shape: tuple[int, ...], dtype: mx.Dtype, packed: bool = False) -> mx.array:
    """Random numbers: norms around 1, and matrices that preserve the scale of their input.

    packed: whether the tensor belongs to a quantised matrix.
    """
    rng = np.random.default_rng(list(name.encode()))
    count = math.prod(shape)
    if dtype == mx.uint32:
        return mx.array(_tiled(rng.integers(0, 2**32, 1 << 20, np.uint32), count).reshape(shape))
    spread = COMMON["hidden_size"] ** -0.5
    if dtype == mx.uint8:  # exponents of mxfp4
        return mx.full(shape, 127 + round(math.log2(spread / 2.9)), mx.uint8)
    if packed and name.endswith("scales"):  # for numbers spread evenly over 16 levels
        return mx.full(shape, spread * 12**0.5 / 16, dtype)
    if packed and name.endswith("biases"):
        return mx.full(shape, -spread * 12**0.5 / 2, dtype)
    values = _tiled(rng.standard_normal(1 << 20, dtype=np.float32), count).reshape(shape)
    if name.endswith("up_bias"):
        return mx.array(values * 0 + FFN_BIAS).astype(dtype)
    if len(shape) < 2:
        return mx.array(0.02 * values + ("norm" in name and name.endswith("weight"))).astype(dtype)
    return mx.array(values * np.float32(shape[-1] ** -0.5)).astype(dtype)


def _tiled(values: np.ndarray, count: int) -> np.ndarray:
    """Repeats the numbers up to `count`. Drawing as many would take minutes, and nothing depends on their values."""
    return np.resize(values, count)
