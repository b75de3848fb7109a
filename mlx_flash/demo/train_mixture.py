"""Trains a small mixture of experts, with routing learnt from text, on a folder of plain-text books.

    python -m mlx_flash.demo.train_mixture --corpus DIR/train --held-out DIR/call_of_the_wild.txt --output DIR
    python -m mlx_flash.demo.train_mixture --form nemotron_h --corpus ... --held-out ... --output ...

Needs the `train` extra. It is used to measure what depends on the routing of tokens (`bench eviction`, `bench
lookahead`) and on the zeros inside experts (`bench relu-experts`), which random weights cannot show. See `mixtures.py`
for the forms.

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
from dataclasses import replace
from pathlib import Path

import numpy as np

from mlx_flash.demo.forms import BEGIN_ID, PACKAGED, Recipe
from mlx_flash.demo.mixtures import CHOSEN, EXPERTS, RECIPES, build, save
from mlx_flash.demo.train import learning_rate, read_books

BALANCE = 0.01  # weight of `unevenness` in the loss


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
    parser.add_argument("--form", choices=RECIPES, default="qwen3_moe", help="architecture (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="number of optimiser steps (default: from the form's recipe)")
    arguments = parser.parse_args()
    held_out = arguments.held_out.read_text(encoding="utf-8")
    recipe = RECIPES[arguments.form]
    recipe = replace(recipe, steps=arguments.steps or recipe.steps)
    print(json.dumps(train(recipe, read_books(arguments.corpus), held_out, arguments.output)))


if __name__ == "__main__":
    main()
