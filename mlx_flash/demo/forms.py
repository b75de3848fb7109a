"""The forms of the demo model, with their recipes: OPT, with a plain FFN, Llama, with a gated FFN, and Gemma 3n, whose
first layers keep a twentieth of a gated FFN."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

PACKAGED = Path(__file__).parent / "model"
BEGIN_ID = 2  # OPT begins every text with </s>. So does its sibling, which shares the tokenizer.
PAD_ID = 1


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the result, apart from the corpus. The shape is that of the packaged model."""

    form: str = "opt"
    vocab_size: int = 4096
    hidden_size: int = 320
    layers: int = 5
    heads: int = 5
    key_value_heads: int = 5
    ffn_size: int = 1280
    context: int = 512
    dropout: float = 0.1
    precision: str = "bfloat16"
    batch: int = 8
    steps: int = 5200
    peak_learning_rate: float = 2e-3
    warmup_steps: int = 150
    weight_decay: float = 0.1
    sparsity_start: float = 0.25  # share of the steps after which the penalty begins
    sparsity_end: float = 0.8  # share of the steps after which the target is reached
    target_density: float = 0.05  # share of FFN neurons active at the end
    penalty_by_layer: bool = False  # steer every layer to the target, instead of the mean of the layers
    controller_gain: float = 0.01  # growth of the penalty's logarithm, per step and unit of the density's logarithm
    attention_dropout: float = 0.0  # of an OPT
    muon: bool = False  # whether Muon, instead of AdamW, trains the matrices of the layers
    teachers: tuple[Recipe, ...] = ()  # models trained before, whose mean prediction the model learns
    teaching: float = 0.7  # share of the teachers' prediction in the loss; the text has the rest
    seed: int = 20231212


_TEACHER = Recipe(
    attention_dropout=0.1, batch=16, warmup_steps=80, sparsity_start=1.0, muon=True
)  # without a penalty: it would begin after the last step

RECIPES = {
    "opt": Recipe(
        batch=16,
        steps=3787,
        warmup_steps=114,
        weight_decay=0.1,
        target_density=0.065,
        controller_gain=0.0137,
        muon=True,
        teachers=(
            replace(_TEACHER, hidden_size=448, layers=5, heads=7, ffn_size=1792, dropout=0.3, steps=2651, seed=1),
            replace(_TEACHER, hidden_size=384, layers=6, heads=6, ffn_size=1536, dropout=0.25, steps=2582, seed=2),
            replace(_TEACHER, dropout=0.2, steps=3502, warmup_steps=105, muon=False, seed=3),
        ),
        seed=6,
    ),
    "llama": Recipe(
        form="llama",
        hidden_size=192,
        layers=4,
        heads=4,
        key_value_heads=2,
        ffn_size=1024,
        dropout=0.0,
        precision="float32",  # bfloat16 is slower on processors without instructions for it
        batch=2,
        steps=1300,
        peak_learning_rate=3e-3,
        warmup_steps=100,
        target_density=0.1,
        penalty_by_layer=True,
        controller_gain=0.03,
    ),
    # The first half of the layers is sparse by itself, so there is no penalty: it would begin after the last step.
    "gemma3n": Recipe(
        form="gemma3n",
        hidden_size=192,
        layers=4,
        heads=4,
        key_value_heads=2,
        ffn_size=1536,  # 8 times the width, as in E4B
        context=256,
        dropout=0.0,
        precision="float32",
        batch=4,
        steps=900,
        peak_learning_rate=3e-3,
        warmup_steps=100,
        sparsity_start=1.0,
        target_density=0.05,
    ),
}


def build_model(recipe: Recipe):
    """A randomly initialised `transformers` model of the recipe's form and shape, with tied embeddings.

    The gated forms start from the token embeddings of the packaged model, because they share that model's tokenizer.
    """
    import torch
    from transformers import Gemma3nForCausalLM, LlamaConfig, LlamaForCausalLM, OPTConfig, OPTForCausalLM

    torch.manual_seed(recipe.seed)
    common: dict[str, Any] = {
        "vocab_size": recipe.vocab_size,
        "hidden_size": recipe.hidden_size,
        "num_hidden_layers": recipe.layers,
        "num_attention_heads": recipe.heads,
        "max_position_embeddings": recipe.context,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": BEGIN_ID,
        "pad_token_id": PAD_ID,
        "tie_word_embeddings": True,
    }
    if recipe.form == "opt":
        config = OPTConfig(
            **common,
            word_embed_proj_dim=recipe.hidden_size,
            ffn_dim=recipe.ffn_size,
            dropout=recipe.dropout,
            attention_dropout=recipe.attention_dropout,
            layerdrop=0.0,
        )
        return OPTForCausalLM._from_config(config, attn_implementation="sdpa")
    common |= {
        "num_key_value_heads": recipe.key_value_heads,
        "intermediate_size": recipe.ffn_size,
        "attention_dropout": recipe.dropout,
    }
    if recipe.form == "gemma3n":
        config = gemma3n_config(recipe, common)
        model = Gemma3nForCausalLM._from_config(config, attn_implementation="sdpa")
    else:
        config = LlamaConfig(**common, hidden_act="relu")  # activation of the gate
        model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(packaged_embeddings(recipe.hidden_size, config.initializer_range))
    return model


def gemma3n_config(recipe: Recipe, common: dict[str, Any]):
    """The configuration of a small Gemma 3n. Its first half of layers keeps `target_density` of the neurons."""
    from transformers import Gemma3nTextConfig

    dense = recipe.layers // 2
    return Gemma3nTextConfig(
        **common,
        head_dim=recipe.hidden_size // recipe.heads,
        layer_types=["sliding_attention", "full_attention"] * dense,
        sliding_window=recipe.context // 2,
        num_kv_shared_layers=0,
        vocab_size_per_layer_input=recipe.vocab_size,
        hidden_size_per_layer_input=32,
        laurel_rank=16,
        activation_sparsity_pattern=[1 - recipe.target_density] * (recipe.layers - dense) + [0.0] * dense,
    )


def save_model(model, output: Path) -> None:
    """Writes the model in float16. A Gemma 3n gets the names of its published form, in which it is part of a larger
    model, and its configuration those that mlx-lm reads."""
    model = model.half()
    model.save_pretrained(output)
    if model.config.model_type != "gemma3n_text":
        return
    from safetensors.torch import load_file, save_file

    weights = load_file(output / "model.safetensors")
    renamed = {name.replace("model.", "model.language_model.", 1): weight for name, weight in weights.items()}
    save_file(renamed, output / "model.safetensors", {"format": "pt"})
    path = output / "config.json"
    text = json.loads(path.read_text())
    rope = text["rope_parameters"]
    text |= {
        "rope_theta": rope["full_attention"]["rope_theta"],
        "rope_local_base_freq": rope["sliding_attention"]["rope_theta"],
    }
    config = {"model_type": "gemma3n", "architectures": ["Gemma3nForConditionalGeneration"], "text_config": text}
    path.write_text(json.dumps(config, indent=2) + "\n")


def packaged_embeddings(width: int, deviation: float):
    """The packaged model's token embeddings, projected on their `width` principal directions.

    Returns (V, width), scaled to the standard deviation `deviation`.
    """
    import torch
    from safetensors.torch import load_file

    weight = load_file(PACKAGED / "model.safetensors")["model.decoder.embed_tokens.weight"].float()
    left, singular, _ = torch.linalg.svd(weight - weight.mean(0), full_matrices=False)
    reduced = left[:, :width] * singular[:width]
    return reduced * (deviation / reduced.std())


def ffn_activations(model) -> list:
    """One module per layer. Its output, (B, T, F), is zero for neurons that add nothing to the FFN's result."""
    if model.config.model_type == "opt":
        return [layer.activation_fn for layer in model.model.decoder.layers]
    return [layer.mlp.act_fn for layer in model.model.layers]
