"""The forms of the small mixture that `train_mixture` trains, with their recipes.

`qwen3_moe` has gated experts with SiLU. The other two have exact zeros inside their experts: `nemotron_h` has squared
ReLU without a gate (as Nemotron-3-Nano), and `relu_gated` has ReLU on the gate (as SmallThinker).
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from mlx_flash.demo.forms import BEGIN_ID, PAD_ID, Recipe, packaged_embeddings

EXPERTS, CHOSEN = 64, 4
GATED_SIZE, PLAIN_SIZE = 64, 96  # neurons of an expert; three matrices of 64 are as large as two of 96

QWEN = Recipe(
    form="qwen3_moe",
    hidden_size=192,
    layers=8,
    heads=4,
    key_value_heads=2,
    context=256,
    batch=4,
    steps=1200,
    peak_learning_rate=3e-3,
    warmup_steps=100,
)
RECIPES = {
    "qwen3_moe": QWEN,
    "nemotron_h": replace(QWEN, form="nemotron_h", layers=4),
    "relu_gated": replace(QWEN, form="relu_gated", layers=4),
}


def build(recipe: Recipe):
    """A randomly initialised `transformers` model of the recipe's form. It begins with the demo model's embeddings."""
    import torch

    torch.manual_seed(recipe.seed)
    model = nemotron(recipe) if recipe.form == "nemotron_h" else qwen(recipe)
    embeddings = packaged_embeddings(recipe.hidden_size, model.config.initializer_range)
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(embeddings)
        model.get_output_embeddings().weight.copy_(embeddings)  # the same tensor where they are tied
    return model


def shape(recipe: Recipe) -> dict:
    """The settings that all forms have."""
    return {
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "num_attention_heads": recipe.heads,
        "num_key_value_heads": recipe.key_value_heads,
        "head_dim": recipe.hidden_size // recipe.heads,
        "num_experts_per_tok": CHOSEN,
        "norm_topk_prob": True,
        "output_router_logits": True,
        "max_position_embeddings": recipe.context,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": BEGIN_ID,
        "pad_token_id": PAD_ID,
    }


def qwen(recipe: Recipe):
    """A Qwen3-MoE, with ReLU instead of SiLU in the form `relu_gated`."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    config = Qwen3MoeConfig(
        **shape(recipe),
        num_hidden_layers=recipe.layers,
        intermediate_size=EXPERTS * GATED_SIZE,  # for layers without experts, of which there are none
        moe_intermediate_size=GATED_SIZE,
        num_experts=EXPERTS,
        hidden_act="relu" if recipe.form == "relu_gated" else "silu",
        router_aux_loss_coef=0.0,  # That loss pools all layers, so no layer would have to use all its experts.
        tie_word_embeddings=True,
    )
    return Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation="grouped_mm")


def nemotron(recipe: Recipe):
    """A Nemotron-H of attention and experts in turn, without Mamba, which torch computes slowly on a processor.

    Its attention has no positional encoding, and a shared expert of one expert's size stands beside the others.
    """
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(
        **shape(recipe),
        layers_block_type=["full_attention", "moe"] * recipe.layers,
        intermediate_size=PLAIN_SIZE,
        moe_intermediate_size=PLAIN_SIZE,
        moe_shared_expert_intermediate_size=PLAIN_SIZE,
        n_routed_experts=EXPERTS,
        mamba_num_heads=1,  # Mamba's settings are required, though no layer uses them.
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=1,
    )
    return NemotronHForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation="grouped_mm")


def save(model, output: Path) -> None:
    """Writes the model, with its configuration also under the names that mlx-lm uses."""
    model.save_pretrained(output)
    path = output / "config.json"
    config = json.loads(path.read_text())
    if config["model_type"] == "qwen3_moe":
        config |= {"num_experts": EXPERTS, "rope_theta": config["rope_parameters"]["rope_theta"]}
    path.write_text(json.dumps(config, indent=2) + "\n")
