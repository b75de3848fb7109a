"""Rewrites checkpoints in MLX's layout into the layout that the model's makers publish.

Every entry of LAYOUTS undoes what the `sanitize` of mlx-lm's model does, so that it finds the names and shapes that it
expects of the original.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx

Weights = dict[str, Any]
Layout = Callable[[Weights], Weights]


def each(ours: str, theirs: str, names: dict[str, str] | None = None) -> Layout:
    """One tensor per expert: `ours` + "up_proj.weight" (E, ...) -> `theirs` + "7.up_proj.weight" (...).

    names: MLX's name of a projection -> the original's, where they differ.
    """

    def rewrite(weights: Weights) -> Weights:
        result: Weights = {}
        for name, array in weights.items():
            head, found, tail = name.partition(ours)
            projection, _, rest = tail.partition(".")
            if found:
                projection = (names or {}).get(projection, projection)
                result |= {f"{head}{theirs}{e}.{projection}.{rest}": array[e] for e in range(len(array))}
            else:
                result[name] = array
        return result

    return rewrite


def fused(ours: str, gate_up: str, down: str, order: tuple[str, str] = ("gate_proj", "up_proj")) -> Layout:
    """Gate and up in one tensor, by rows: (E, I, D) twice -> (E, 2 I, D), named `gate_up`; the down one is renamed."""

    def rewrite(weights: Weights) -> Weights:
        result = dict(weights)
        for name in weights:
            head, found, tail = name.partition(f"{ours}{order[0]}.weight")
            if found and not tail:
                parts = [result.pop(f"{head}{ours}{part}.weight") for part in order]
                result[f"{head}{gate_up}"] = mx.concatenate(parts, axis=1)
                result[f"{head}{down}"] = result.pop(f"{head}{ours}down_proj.weight")
        return result

    return rewrite


def renamed(*pairs: tuple[str, str]) -> Layout:
    """Replaces each regular expression by the other."""

    def rewrite(weights: Weights) -> Weights:
        result = {}
        for name, array in weights.items():
            for old, new in pairs:
                name = re.sub(old, new, name)
            result[name] = array
        return result

    return rewrite


def transposed_convolutions(weights: Weights) -> Weights:
    """Convolutions (C, 1, K), as in PyTorch."""
    return {n: a.moveaxis(1, 2) if re.search(r"conv\w*\.weight$", n) and a.ndim == 3 else a for n, a in weights.items()}


def in_turn(*layouts: Layout) -> Layout:
    def rewrite(weights: Weights) -> Weights:
        for layout in layouts:
            weights = layout(weights)
        return weights

    return rewrite


def less_one(*names: str) -> Layout:
    """Norms that multiply by 1 + weight."""
    return lambda weights: {n: a - 1 if n.endswith(names) and a.ndim == 1 else a for n, a in weights.items()}


def interleaved_blocks(weights: Weights) -> Weights:
    """MXFP4 experts as blocks of 16 bytes, with the rows of gate and up by turns."""
    result = dict(weights)
    for name in weights:
        head, found, tail = name.partition(".experts.gate_proj.")
        if found:
            gate, up = (result.pop(f"{head}.experts.{part}.{tail}") for part in ("gate_proj", "up_proj"))
            both = mx.stack([gate, up], axis=2).flatten(1, 2)
            down = result.pop(f"{head}.experts.down_proj.{tail}")
            suffix = "blocks" if tail == "weight" else tail
            for part, array in (("gate_up_proj", both), ("down_proj", down)):
                if tail == "weight":
                    array = mx.unflatten(array.view(mx.uint8), -1, (-1, 16))
                result[f"{head}.experts.{part}_{suffix}"] = array
    return result


def transposed_experts(ours: str, theirs: str) -> Layout:
    """Experts (E, D, 2 I) and (E, I, D), gate and up side by side."""

    def rewrite(weights: Weights) -> Weights:
        result = dict(weights)
        for name in weights:
            head, found, tail = name.partition(f"{ours}gate_proj.weight")
            if found and not tail:
                gate, up, down = (
                    result.pop(f"{head}{ours}{part}.weight").swapaxes(1, 2)
                    for part in ("gate_proj", "up_proj", "down_proj")
                )
                result[f"{head}{theirs}gate_up_proj"] = mx.concatenate([gate, up], axis=-1)
                result[f"{head}{theirs}down_proj"] = down
        return result

    return rewrite


def latent_attention(weights: Weights) -> Weights:
    """One up-projection for keys and values, which MLX's form splits by heads."""
    result = dict(weights)
    for name in weights:
        head, found, tail = name.partition("embed_q.weight")
        if found and not tail and not head.endswith("un"):
            keys = result.pop(name).swapaxes(1, 2)  # (H, nope, rank)
            values = result.pop(f"{head}unembed_out.weight")  # (H, V, rank)
            result[f"{head}kv_b_proj.weight"] = mx.concatenate([keys, values], axis=1).flatten(0, 1)
    return result


W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
MLP = each(".mlp.switch_mlp.", ".mlp.experts.")
GRANITE = fused(
    ".block_sparse_moe.switch_mlp.", ".block_sparse_moe.input_linear.weight", ".block_sparse_moe.output_linear.weight"
)
LAYOUTS: dict[str, Layout] = {
    "deepseek_v3": in_turn(MLP, latent_attention),
    "gemma4": in_turn(
        fused(".experts.switch_glu.", ".experts.gate_up_proj", ".experts.down_proj"),
        renamed((r"^language_model\.model\.", "model.language_model.")),
    ),
    "gpt_oss": interleaved_blocks,
    "granitemoe": GRANITE,
    "granitemoehybrid": in_turn(GRANITE, transposed_convolutions),
    "llama4": transposed_experts(".feed_forward.experts.", ".feed_forward.experts."),
    "mixtral": each(".block_sparse_moe.switch_mlp.", ".block_sparse_moe.experts.", W123),
    "olmoe": MLP,
    "qwen3_5_moe": in_turn(
        fused(".mlp.switch_mlp.", ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"),
        transposed_convolutions,
        less_one("layernorm.weight", "model.norm.weight", "_norm.weight"),
        renamed((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head")),
    ),
    "qwen3_moe": MLP,
}

CHANGED = frozenset({"gpt_oss", "llama4"})  # mlx-lm rearranges or computes their experts


def publish(folder: Path, family: str) -> None:
    """Rewrites the checkpoint in a folder, whose weights are one file."""
    path = folder / "model.safetensors"
    loaded: Any = mx.load(str(path))
    weights = LAYOUTS[family](dict(loaded))
    mx.eval(weights)
    path.unlink()  # MLX reads lazily
    mx.save_safetensors(str(path), weights)
