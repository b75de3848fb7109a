"""Writes tiny random checkpoints of every family in their published form, and the results of transformers for them.

    python tests/golden/make_golden.py [NAME ...]

Needs torch and transformers; the tests that read the files need neither. Each variant's folder gets ``config.json``,
``model.safetensors`` and ``golden.npz``: tokens (B, T) int32, logits (B, T, vocab) float32, greedy (16,) int32.

If transformers has no class for a family, the nearest class computes with another FFN, which is defined below.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

VOCAB = 64
GREEDY_TOKENS = 16
FATRELU_THRESHOLD = 0.125
OPT = {
    "ffn_dim": 128,
    "init_std": 0.25,
    "dropout": 0.0,
    "bos_token_id": 2,
    "pad_token_id": 1,
}
FALCON = {"activation": "relu", "ffn_hidden_size": 128}
GATED = {"intermediate_size": 128, "num_key_value_heads": 2}


def fatrelu(mlp: torch.nn.Module) -> None:
    """ProSparse (arXiv 2402.13516, section 3.3): zero up to a threshold, which is hidden_act_param in its config."""
    mlp.act_fn = torch.nn.Threshold(FATRELU_THRESHOLD, 0.0)


def drelu(mlp: torch.nn.Module) -> None:
    """Bamboo, TurboSparse (arXiv 2406.05955, section 3; code in the model card of PowerInfer/Bamboo-base-v0_1)."""
    mlp.forward = lambda x: mlp.down_proj(torch.relu(mlp.gate_proj(x)) * torch.relu(mlp.up_proj(x)))


def own_code(module: str, name: str) -> dict[str, str]:
    """The config.json keys that refer to code beside it, which is not run here."""
    model = f"modeling_{module}.{name}ForCausalLM"
    return {"AutoConfig": f"configuration_{module}.{name}Config", "AutoModel": model, "AutoModelForCausalLM": model}


@dataclass(frozen=True)
class Variant:
    kind: str  # transformers' classes are named kind + Config and kind + ForCausalLM
    seed: int
    config: dict[str, Any]
    dtype: torch.dtype = torch.float16  # on disk
    change: Callable[[torch.nn.Module], None] | None = None  # changes each MLP
    # keys of config.json in the form of transformers 4; None removes a key
    published: dict[str, Any] = field(default_factory=dict)
    std: float = 0.25


VARIANTS = {
    "opt-pre": Variant("OPT", 6, OPT),
    "opt-350m-like": Variant(
        "OPT",
        2,
        {**OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 16, "num_hidden_layers": 2},
        torch.float32,
    ),
    "opt-nobias": Variant(
        "OPT",
        23,
        {**OPT, "enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False},
    ),
    "falcon-7b-like": Variant("Falcon", 1, FALCON),
    "falcon-40b-like": Variant(  # as published: without keys that have default values
        "Falcon",
        8,
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
        torch.bfloat16,
        published={"rope_parameters": None, "ffn_hidden_size": None, "num_ln_in_parallel_attn": None},
    ),
    "falcon-11b-like": Variant(
        "Falcon",
        1,
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}
        | {"ffn_hidden_size": 96, "tie_word_embeddings": False},
    ),
    "falcon-rw-like": Variant(
        "Falcon",
        1,
        {**FALCON, "alibi": True, "bias": True, "multi_query": False, "parallel_attn": False, "num_attention_heads": 4},
    ),
    "llama-relu": Variant("Llama", 1, {**GATED, "hidden_act": "relu"}),
    "prosparse": Variant(
        "Llama",
        1,
        {**GATED, "num_key_value_heads": 4},
        torch.bfloat16,
        fatrelu,
        {
            "architectures": ["SparseLlamaForCausalLM"],
            "auto_map": own_code("sparsellama", "SparseLlama"),
            "hidden_act": "fatrelu",
            "hidden_act_param": FATRELU_THRESHOLD,
            "model_type": "sparsellama",
            "rope_parameters": None,
        },
    ),
    "bamboo": Variant(
        "Mistral",
        3,
        {**GATED, "sliding_window": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
        torch.bfloat16,
        drelu,
        {
            "architectures": ["BambooForCausalLM"],
            "auto_map": own_code("bamboo", "Bamboo"),
            "hidden_act": "relu",
            "model_type": "bamboo",
            "rope_parameters": None,
            "rope_theta": 500.0,
        },
    ),
    "persimmon": Variant(
        "Persimmon",
        14,
        {"intermediate_size": 128, "rope_parameters": {"rope_type": "default", "rope_theta": 25000.0}},
        torch.bfloat16,
        published={"rope_parameters": None, "rope_theta": 25000.0},
        std=0.2,
    ),
    "persimmon-no-qk-norm": Variant(
        "Persimmon", 10, {"intermediate_size": 96, "qk_layernorm": False, "tie_word_embeddings": True}, std=0.2
    ),
    "phi-relu": Variant(
        "Phi",
        3,
        {
            "hidden_act": "relu",
            "intermediate_size": 128,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        },
    ),
    "nemotron": Variant(
        "Nemotron", 4, {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}, torch.bfloat16, std=0.2
    ),
}


def build(variant: Variant) -> Any:
    """A float32 model whose every parameter affects the logits and is exactly representable on disk."""
    torch.manual_seed(variant.seed)
    common = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    common |= {"max_position_embeddings": 64, "eos_token_id": 2}
    config = getattr(transformers, f"{variant.kind}Config")(**{**common, **variant.config})
    # With ALiBi, the eager attention of transformers 5.24 adds it twice: in the mask, and to the scores.
    config._attn_implementation = "sdpa" if variant.config.get("alibi") else "eager"
    model = getattr(transformers, f"{variant.kind}ForCausalLM")(config).float().eval()
    for module in model.modules():
        if variant.change is not None and type(module).__name__.endswith("MLP"):
            variant.change(module)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = name.endswith("weight") and parameter.ndim == 1
            centre = 1.0 if is_scale and variant.kind != "Nemotron" else 0.0  # Nemotron's norms add 1 themselves
            parameter.copy_((centre + variant.std * torch.randn_like(parameter)).to(variant.dtype))
    return model


@torch.no_grad()
def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """tokens: (B, T) -> (B, T, vocab). Every position attends to all positions before it, whatever the token's id."""
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits


def greedy_of(model: Any, prompt: torch.Tensor) -> tuple[list[int], float]:
    """The continuation of prompt (1, T), recomputed in full for each token, and the smallest lead of a winner."""
    tokens, lead = prompt, float("inf")
    for _ in range(GREEDY_TOKENS):
        best = logits_of(model, tokens)[0, -1].topk(2)
        lead = min(lead, (best.values[0] - best.values[1]).item())
        tokens = torch.cat([tokens, best.indices[None, :1]], dim=1)
    return tokens[0, prompt.shape[1] :].tolist(), lead


def active_shares(model: Any, tokens: torch.Tensor) -> list[float]:
    """By layer, the share of (token, neuron) pairs that are not zero as inputs of the last matrix."""
    shares: list[float] = []
    hooks = [
        module.register_forward_pre_hook(lambda module, args: shares.append((args[0] != 0).float().mean().item()))
        for name, module in model.named_modules()
        if name.endswith((".fc2", ".down_proj", ".dense_4h_to_h"))
    ]
    logits_of(model, tokens)
    for hook in hooks:
        hook.remove()
    return shares


def write_config(path: Path, published: dict[str, Any]) -> None:
    config = json.loads(path.read_text())
    config |= published
    config = {key: value for key, value in config.items() if key not in published or value is not None}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def write(name: str, folder: Path) -> None:
    variant = VARIANTS[name]
    model = build(variant)
    tokens = torch.randint(0, VOCAB, (3, 24))
    logits = logits_of(model, tokens)
    greedy, lead = greedy_of(model, tokens[:1])
    shares = active_shares(model, tokens)
    if len(shares) != model.config.num_hidden_layers:
        raise SystemExit(f"{name}: the name of the FFN's last matrix is unknown; add it to active_shares")
    if lead < 2e-2 or len(set(greedy)) < 4 or not all(0.15 < share < 0.8 for share in shares):
        raise SystemExit(f"{name}: a poor example (lead {lead:.4f}, greedy {greedy}, active {shares}); change the seed")

    model.to(variant.dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    if variant.published:
        write_config(folder / "config.json", variant.published)
    np.savez(
        folder / "golden.npz",
        tokens=tokens.numpy().astype(np.int32),
        logits=logits.numpy().astype(np.float32),
        greedy=np.array(greedy, dtype=np.int32),
    )
    size_kb = (folder / "model.safetensors").stat().st_size / 1e3
    print(
        f"{name}: {size_kb:.0f} kB, active {[round(share, 2) for share in shares]}, smallest lead {lead:.3f}, "
        f"logits std {logits.std():.2f}, greedy {greedy}"
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or VARIANTS:
        write(name, Path(__file__).parent / name)
