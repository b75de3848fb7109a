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


def deepseek_v41(weights: Weights) -> Weights:
    """DeepSeek's own names, with packed numbers as bytes."""
    pairs = [
        (r"^model\.", ""), (r"^lm_head\.", "head."), (r"^embed_tokens\.", "embed."), (r"\.self_attn\.", ".attn."),
        (r"\.mlp\.experts\.switch_mlp\.", ".ffn.experts."), (r"\.mlp\.", ".ffn."),
        (r"\.input_layernorm\.", ".attn_norm."), (r"\.post_attention_layernorm\.", ".ffn_norm."),
        (r"\.attn_hc\.", ".hc_attn_"), (r"\.ffn_hc\.", ".hc_ffn_"), (r"\.sinks$", ".attn_sink"),
        (r"(shared_experts\.)gate_proj", r"\1w1"), (r"(shared_experts\.)down_proj", r"\1w2"),
        (r"(shared_experts\.)up_proj", r"\1w3"), (r"\.q_a_proj\.", ".wq_a."), (r"\.q_b_proj\.", ".wq_b."),
        (r"\.kv_proj\.", ".wkv."), (r"(?<!experts)\.gate_proj\.", ".wgate."), (r"\.o_a_proj\.", ".wo_a."),
        (r"\.o_b_proj\.", ".wo_b."), (r"\.q_a_norm\.", ".q_norm."), (r"(compressor)\.kv_norm\.", r"\1.norm."),
        (r"\.indexer\.k_proj\.", ".indexer.wk."), (r"\.e_score_correction_bias$", ".bias"), (r"\.scales$", ".scale"),
    ]  # fmt: skip
    result = each(".ffn.experts.", ".ffn.experts.", W123)(renamed(*pairs)(weights))
    for name, array in result.items():
        if ".wo_a." in name:  # block diagonal
            array = array.flatten(0, 1)
        result[name] = array.view(mx.uint8) if array.dtype == mx.uint32 else array
    return result


W123 = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
EVERY = ("layernorm.weight", "model.norm.weight", "q_norm.weight", "k_norm.weight")
MLP = each(".mlp.switch_mlp.", ".mlp.experts.")
OWN = each(".mlp.experts.", ".mlp.experts.")
SPARSE = each(".block_sparse_moe.switch_mlp.", ".block_sparse_moe.experts.", W123)
LATENT = in_turn(MLP, latent_attention)
GATE = renamed((r"\.mlp\.gate\.gate_proj\.", ".mlp.gate."))
FUSED = fused(".mlp.switch_mlp.", ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
NESTED = renamed((r"^language_model\.model\.", "model.language_model."), (r"^language_model\.lm_head", "lm_head"))
GRANITE = fused(
    ".block_sparse_moe.switch_mlp.", ".block_sparse_moe.input_linear.weight", ".block_sparse_moe.output_linear.weight"
)
GEMMA = fused(".experts.switch_glu.", ".experts.gate_up_proj", ".experts.down_proj")
KIMI = in_turn(
    each(".mlp.switch_mlp.", ".block_sparse_moe.experts.", W123),
    renamed(
        (r"(layers\.[12])\.mlp\.(shared_experts|gate|routed_expert\w*)\.", r"\1.block_sparse_moe.\2."),
        (r"\.mlp\.e_score_correction_bias", ".block_sparse_moe.gate.e_score_correction_bias"),
    ),
    latent_attention,
)
LAYOUTS: dict[str, Layout] = {
    "Klear": OWN,
    "afmoe": OWN,
    "bailing_hybrid": in_turn(LATENT, GATE),
    "bailing_moe": in_turn(MLP, GATE),
    "bailing_moe_linear": in_turn(MLP, GATE),
    "bailing_moe_v3": in_turn(LATENT, transposed_convolutions),
    "deepseek": MLP,
    "deepseek_v2": MLP,
    "deepseek_v3": LATENT,
    "deepseek_v32": LATENT,
    "deepseek_v41": deepseek_v41,
    "dots1": OWN,
    "ernie4_5_moe": MLP,
    "exaone_moe": in_turn(MLP, renamed((r"\.gate\.e_score_correction_bias", ".e_score_correction_bias"))),
    "gemma4": in_turn(GEMMA, renamed((r"^language_model\.model\.", "model.language_model."))),
    "gemma4_text": GEMMA,
    "glm4_moe": MLP,
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": LATENT,
    "gpt_oss": interleaved_blocks,
    "granitemoe": GRANITE,
    "granitemoehybrid": in_turn(GRANITE, transposed_convolutions),
    "hunyuan": MLP,
    "jamba": in_turn(each(".feed_forward.switch_mlp.", ".feed_forward.experts."), transposed_convolutions),
    "kimi_k25": LATENT,
    "kimi_k3": KIMI,
    "kimi_linear": in_turn(KIMI, transposed_convolutions, renamed((r"\.([qkv])_conv\.conv\.", r".\1_conv1d."))),
    "kimi_vl": MLP,
    "laguna": in_turn(
        MLP,
        renamed(
            (r"\.gate\.proj\.", ".gate."), (r"\.gate\.e_score_correction_bias", ".experts.e_score_correction_bias")
        ),
    ),
    "lfm2_moe": in_turn(
        each(".feed_forward.switch_mlp.", ".feed_forward.experts.", W123),
        renamed(*((rf"\.{ours}\.weight", f".{theirs}.weight") for ours, theirs in W123.items())),
        transposed_convolutions,
    ),
    "llama4": transposed_experts(".feed_forward.experts.", ".feed_forward.experts."),
    "longcat_flash": LATENT,
    "longcat_flash_ngram": in_turn(LATENT, renamed((r"ngram_embeddings\.word_embeddings\.", "embed_tokens."))),
    "mellum": MLP,
    "mimo_v2_flash": MLP,
    "minimax": SPARSE,
    "minimax_m3_vl": SPARSE,
    "mistral3": in_turn(FUSED, latent_attention),
    "mistral4": in_turn(FUSED, latent_attention),
    "mixtral": SPARSE,
    "nemotron_h": in_turn(
        each(".mixer.switch_mlp.", ".mixer.experts.", {"fc1": "up_proj", "fc2": "down_proj"}), transposed_convolutions
    ),
    "olmoe": MLP,
    "phimoe": SPARSE,
    "phixtral": each(".moe.switch_mlp.", ".moe.mlp."),
    "qwen2_moe": MLP,
    "qwen3_5_moe": in_turn(FUSED, transposed_convolutions, less_one(*EVERY), NESTED),
    "qwen3_moe": MLP,
    "qwen3_next": in_turn(MLP, transposed_convolutions, less_one(*EVERY)),
    "qwen3_vl_moe": in_turn(transposed_experts(".mlp.switch_mlp.", ".mlp.experts."), NESTED),
    "solar_open": MLP,
    "step3p5": in_turn(
        less_one("norm.weight"),
        renamed(
            (r"\.mlp\.switch_mlp\.", ".moe."),
            (r"\.mlp\.gate\.gate\.", ".moe.gate."),
            (r"\.mlp\.gate\.router_bias", ".moe.router_bias"),
            (r"\.mlp\.share_expert\.", ".share_expert."),
        ),
    ),
}
CHANGED = frozenset({"gpt_oss", "llama4", "qwen3_vl_moe"})  # mlx-lm rearranges or computes their experts
PACKED = {"deepseek_v41": "mxfp4", "gpt_oss": "mxfp4"}  # published with packed experts


def publish(folder: Path, family: str) -> None:
    """Rewrites the checkpoint in a folder, whose weights are one file."""
    path = folder / "model.safetensors"
    loaded: Any = mx.load(str(path))
    weights = LAYOUTS[family](dict(loaded))
    mx.eval(weights)
    path.unlink()  # MLX reads lazily
    mx.save_safetensors(str(path), weights)
