"""Write tiny random OPT checkpoints, as transformers saves them, and what transformers computes from them.

    python tests/golden/make_opt.py

Needs torch and transformers; the tests that read the files need neither. Each variant's folder gets ``config.json``,
``model.safetensors`` and ``golden.npz``: tokens (B, T) int32, logits (B, T, vocab) float32, greedy (16,) int32.
"""

from pathlib import Path

import numpy as np
import torch
from transformers import OPTConfig, OPTForCausalLM

GREEDY_TOKENS = 16
COMMON = {
    "vocab_size": 64,
    "hidden_size": 32,
    "ffn_dim": 128,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "init_std": 0.25,
    "dropout": 0.0,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "pad_token_id": 1,
}
# name -> (seed, dtype on disk, what differs from COMMON)
VARIANTS: dict[str, tuple[int, torch.dtype, dict]] = {
    "opt-pre": (6, torch.float16, {}),
    "opt-350m-like": (
        2,
        torch.float32,
        {"do_layer_norm_before": False, "word_embed_proj_dim": 16, "num_hidden_layers": 2},
    ),
    "opt-nobias": (
        23,
        torch.float16,
        {"enable_bias": False, "layer_norm_elementwise_affine": False, "tie_word_embeddings": False},
    ),
}


def build(seed: int, dtype: torch.dtype, changes: dict) -> OPTForCausalLM:
    """A model whose every parameter matters to the logits and is exactly representable in ``dtype``; in float32."""
    torch.manual_seed(seed)
    config = OPTConfig(**{**COMMON, **changes})
    config._attn_implementation = "eager"
    model = OPTForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            centre = 1.0 if "layer_norm.weight" in name else 0.0
            parameter.copy_((centre + config.init_std * torch.randn_like(parameter)).to(dtype))
    return model


@torch.no_grad()
def logits_of(model: OPTForCausalLM, tokens: torch.Tensor) -> torch.Tensor:
    """tokens: (B, T) -> (B, T, vocab); every position attends to all before it, whatever the token's id."""
    return model(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits


def greedy_of(model: OPTForCausalLM, prompt: torch.Tensor) -> tuple[list[int], float]:
    """The continuation of prompt (1, T), recomputed in full for each token, and the smallest lead of a winner."""
    tokens, lead = prompt, float("inf")
    for _ in range(GREEDY_TOKENS):
        best = logits_of(model, tokens)[0, -1].topk(2)
        lead = min(lead, (best.values[0] - best.values[1]).item())
        tokens = torch.cat([tokens, best.indices[None, :1]], dim=1)
    return tokens[0, prompt.shape[1] :].tolist(), lead


def active_shares(model: OPTForCausalLM, tokens: torch.Tensor) -> list[float]:
    """For each layer the share of (token, neuron) pairs that ReLU lets through."""
    shares: list[float] = []
    hooks = [
        layer.fc1.register_forward_hook(lambda module, args, out: shares.append((out > 0).float().mean().item()))
        for layer in model.model.decoder.layers
    ]
    logits_of(model, tokens)
    for hook in hooks:
        hook.remove()
    return shares


def write(name: str, folder: Path) -> None:
    seed, dtype, changes = VARIANTS[name]
    model = build(seed, dtype, changes)
    tokens = torch.randint(0, COMMON["vocab_size"], (3, 24))
    logits = logits_of(model, tokens)
    greedy, lead = greedy_of(model, tokens[:1])
    shares = active_shares(model, tokens)
    if lead < 2e-2 or len(set(greedy)) < 4 or not all(0.2 < share < 0.8 for share in shares):
        raise SystemExit(f"{name}: a poor example (lead {lead:.4f}, greedy {greedy}, active {shares}); change the seed")

    model.to(dtype).save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
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
    for variant in VARIANTS:
        write(variant, Path(__file__).parent / variant)
