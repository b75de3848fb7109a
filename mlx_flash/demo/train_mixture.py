"""Trains a small mixture of experts (Qwen3-MoE), with routing learnt from text, on a folder of plain-text books.

    python -m mlx_flash.demo.train_mixture --corpus DIR/train --held-out DIR/call_of_the_wild.txt --output DIR

Needs the `train` extra. It is used to measure what depends on the routing of tokens (`bench eviction`, `bench
lookahead`), which random weights cannot show.

The model uses the demo model's tokenizer and its token embeddings, reduced to this width. As in Qwen3-30B-A3B, a token
uses one in sixteen experts of a layer. The usual loss against uneven use of the experts is computed for each layer.
Training takes about 20 minutes on one core. The result has 41 MB in float16 and is not packaged.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

import numpy as np

from mlx_flash.demo.forms import BEGIN_ID, PACKAGED, PAD_ID, Recipe, packaged_embeddings
from mlx_flash.demo.train import learning_rate, read_books

RECIPE = Recipe(
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
EXPERTS, CHOSEN, EXPERT_SIZE = 64, 4, 64
BALANCE = 0.01  # weight of `unevenness` in the loss


def build(recipe: Recipe):
    """A randomly initialised `transformers` model with tied embeddings."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(recipe.seed)
    config = Qwen3MoeConfig(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        head_dim=recipe.hidden_size // recipe.heads,
        intermediate_size=EXPERTS * EXPERT_SIZE,  # for layers without experts, of which there are none
        moe_intermediate_size=EXPERT_SIZE,
        num_experts=EXPERTS,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        output_router_logits=True,
        router_aux_loss_coef=0.0,  # That loss pools all layers, so no layer would have to use all its experts.
        max_position_embeddings=recipe.context,
        bos_token_id=BEGIN_ID,
        eos_token_id=BEGIN_ID,
        pad_token_id=PAD_ID,
        tie_word_embeddings=True,
    )
    model = Qwen3MoeForCausalLM._from_config(config, attn_implementation="sdpa", experts_implementation="grouped_mm")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(packaged_embeddings(recipe.hidden_size, config.initializer_range))
    return model


def unevenness(router_logits):
    """The unevenness of the routing: 1 if it is even.

    E / K * sum over experts of (share of tokens that chose the expert) * (its mean probability); mean over the layers.

    router_logits: (B * T, E) for each layer.
    """
    import torch

    found = []
    for logits in router_logits:
        probabilities = logits.float().softmax(-1)
        chosen = torch.zeros_like(probabilities).scatter_(1, probabilities.topk(CHOSEN).indices, 1.0)
        found.append((chosen.mean(0) * probabilities.mean(0)).sum() * EXPERTS / CHOSEN)
    return torch.stack(found).mean()


def evaluate(model, tokens: np.ndarray, context: int) -> tuple[float, float]:
    """Held-out loss (nats per token) and unevenness within a window of `context` tokens."""
    import torch

    total, uneven, count = 0.0, 0.0, 0
    model.eval()
    with torch.no_grad():
        for begin in range(0, len(tokens), context - 1):
            piece = tokens[begin : begin + context - 1]
            batch = torch.tensor(np.concatenate([[BEGIN_ID], piece])[None].astype(np.int64))
            found = model(input_ids=batch, labels=batch, use_cache=False)
            total += float(found.loss) * len(piece)
            uneven += float(unevenness(found.router_logits)) * len(piece)
            count += len(piece)
    model.train()
    return total / count, uneven / count


def save(model, output: Path) -> None:
    """Writes the model, with its configuration also under the names that mlx-lm uses."""
    model.save_pretrained(output)
    path = output / "config.json"
    config = json.loads(path.read_text())
    config |= {"num_experts": EXPERTS, "rope_theta": config["rope_parameters"]["rope_theta"]}
    path.write_text(json.dumps(config, indent=2) + "\n")


def train(recipe: Recipe, books: list[str], held_out: str, output: Path) -> dict:
    """Trains the model and writes it in float16, and every 200 steps in between. Returns the measured figures."""
    import torch
    from tokenizers import Tokenizer
    from tqdm import tqdm

    output.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(PACKAGED / name, output / name)
    tokenizer = Tokenizer.from_file(str(output / "tokenizer.json"))
    encode = lambda text: np.array(list(tokenizer.encode(text, add_special_tokens=False).ids), np.int64)  # noqa: E731
    text = torch.from_numpy(np.concatenate([encode(book) for book in books]))
    held_out_tokens = encode(held_out)
    model = build(recipe)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    other = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
    begins, start = torch.arange(recipe.context - 1), torch.full((recipe.batch, 1), BEGIN_ID)
    began = time.monotonic()
    model.train()
    with tqdm(total=recipe.steps, unit="step", dynamic_ncols=True, file=sys.stderr) as bar:
        for step in range(recipe.steps):
            starts = torch.randint(len(text) - recipe.context, (recipe.batch, 1))
            batch = torch.cat([start, text[starts + begins]], dim=1)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            found = model(input_ids=batch, labels=batch, use_cache=False)
            uneven = unevenness(found.router_logits)
            (found.loss + BALANCE * uneven).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            bar.set_postfix(loss=f"{float(found.loss.detach()):.3f}", uneven=f"{float(uneven.detach()):.2f}")
            if step % 200 == 199:
                save(model, output)
    minutes = (time.monotonic() - began) / 60
    save(model.half(), output)
    loss, uneven = evaluate(model.float(), held_out_tokens[:10_000], recipe.context)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens": len(text),
        "steps": recipe.steps,
        "minutes": round(minutes, 1),
        "held_out_loss": round(loss, 4),
        "perplexity": round(math.exp(loss), 2),
        "uneven": round(uneven, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_flash.demo.train_mixture", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder of plain-text books to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="book to measure on, not used for training")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model")
    arguments = parser.parse_args()
    held_out = arguments.held_out.read_text(encoding="utf-8")
    print(json.dumps(train(RECIPE, read_books(arguments.corpus), held_out, arguments.output)))


if __name__ == "__main__":
    main()
