"""Trains the packaged demo model, a small OPT, or one of its gated siblings on a folder of plain-text books.

    python -m mlx_flash.demo.train --corpus DIR/train --held-out DIR/call_of_the_wild.txt --output DIR
    python -m mlx_flash.demo.train --form llama --corpus ... --held-out ... --output ...
    python -m mlx_flash.demo.train --form gemma3n --corpus ... --held-out ... --output ...

Needs the `train` extra. One run makes everything in `mlx_flash/demo/model/`, or (the Llama) in
`tests/models/gated-demo/`: tokenizer, configuration, float16 weights and the model card. The run is seeded. It saves
its state every two minutes, and continues from there when it is started again with the same `--output`. On a machine
whose cores do other work as well, `OMP_WAIT_POLICY=PASSIVE` in the environment makes it several times faster.

The packaged model has three teachers, which the same run trains first, in folders of their own. It learns their mean
prediction beside the text, which on this small corpus gives a lower held-out loss than the text alone.

Late in training, an L1 penalty on the FFN activations pushes them to exact zeros (ProSparse, arXiv 2402.13516,
section 3: progressive sparsity regularisation). The penalty's weight has no fixed schedule. A controller raises or
lowers it so that the share of active neurons follows a falling target, which needs no tuning run. Each layer of the
Llama has its own controller, because the first layer needs a far larger weight.

The Gemma 3n is not packaged and gets no card. `bench topk-hits` takes it. It has no penalty, because the rule of its
first layers leaves all but a twentieth of the neurons at zero.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from mlx_flash.demo.forms import BEGIN_ID, PACKAGED, RECIPES, Recipe, build_model, ffn_activations, save_model
from mlx_flash.demo.muon import Muon

SPECIAL_TOKENS = ["<s>", "<pad>", "</s>", "<unk>"]  # OPT's first four ids


def read_books(folder: Path) -> list[str]:
    """The books, sorted by name, with white space collapsed and stray spaces before punctuation removed."""
    books = []
    for path in sorted(folder.glob("*.txt")):
        text = re.sub(r"\s+", " ", path.read_text(encoding="utf-8")).strip()
        books.append(re.sub(r" ([,.;:!?)])(?=\s)", r"\1", text))
    if not books:
        raise SystemExit(f"train: no .txt files in {folder}; --corpus must be a folder of plain-text books")
    return books


def train_tokenizer(books: list[str], recipe: Recipe, output: Path):
    """Trains a SentencePiece unigram model and writes it as a `tokenizers` JSON file.

    All white space is read as one space, and typographic quotes and dashes as their ASCII forms.
    Returns the `tokenizers.Tokenizer`.
    """
    import io

    import sentencepiece as spm
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    sentences = (s for book in books for s in re.split(r"(?<=[.!?]) ", book))
    blob = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=sentences,
        model_writer=blob,
        vocab_size=recipe.vocab_size,
        model_type="unigram",
        byte_fallback=True,
        character_coverage=1.0,
        max_sentence_length=16384,
        normalization_rule_name="identity",
        bos_id=0,
        bos_piece="<s>",
        pad_id=1,
        eos_id=2,
        unk_id=3,
        num_threads=1,
        minloglevel=2,
    )
    sp = spm.SentencePieceProcessor(model_proto=blob.getvalue())
    vocab = [(sp.id_to_piece(i), sp.get_score(i)) for i in range(sp.get_piece_size())]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=3, byte_fallback=True))
    replacements = [("[‘’]", "'"), ("[“”]", '"'), ("[—–]", "--"), ("…", "..."), (r"\s+", " ")]
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(pattern), plain) for pattern, plain in replacements]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS])
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", BEGIN_ID)])
    tokenizer.save(str(output / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "</s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "model_max_length": recipe.context,
        "clean_up_tokenization_spaces": False,
    }
    (output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return tokenizer


class ActivationMeter:
    """Collects, for one forward pass, each layer's mean FFN activation and its share of active neurons."""

    def __init__(self, model) -> None:
        self.means: list = []
        self.densities: list = []
        for activation in ffn_activations(model):
            activation.register_forward_hook(self._hook)

    def _hook(self, _module, _inputs, output) -> None:
        self.means.append(output.float().mean())
        self.densities.append((output.detach() > 0).float().mean())

    def take(self):
        """Returns the mean activation and the density of each layer, (L,) each, and resets both."""
        import torch

        result = torch.stack(self.means), torch.stack(self.densities)
        self.means, self.densities = [], []
        return result


def learning_rate(step: int, recipe: Recipe) -> float:
    """The learning rate of a step: linear warm-up, then a cosine down to 2 % of the peak."""
    if step < recipe.warmup_steps:
        return recipe.peak_learning_rate * (step + 1) / recipe.warmup_steps
    progress = (step - recipe.warmup_steps) / max(1, recipe.steps - recipe.warmup_steps)
    return recipe.peak_learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def next_penalty(penalty, density, start_density, step: int, recipe: Recipe):
    """One step of the controller: the penalty grows while the density is above the falling target.

    All are float64 tensors, with one number for all layers together or one for each layer.
    """
    progress = (step / recipe.steps - recipe.sparsity_start) / (recipe.sparsity_end - recipe.sparsity_start)
    progress = min(1.0, max(0.0, progress))
    target = start_density ** (1 - progress) * recipe.target_density**progress  # It falls geometrically.
    change = recipe.controller_gain * (density.clamp(min=1e-6) / target).log()
    return (penalty * change.exp()).clamp(1e-5, 1.0)


def sequence_loss(model, batch, autocast):
    """Mean next-token cross entropy in nats. batch: token ids, (B, T)."""
    import torch

    return torch.nn.functional.nll_loss(log_probabilities(model, batch, autocast), batch[:, 1:].flatten())


def log_probabilities(model, batch, autocast):
    """The logarithms of the probabilities of each next token, float32 (B * (T - 1), V). batch: token ids, (B, T)."""
    with autocast():
        hidden = model.model(input_ids=batch[:, :-1], use_cache=False).last_hidden_state
        logits = model.lm_head(hidden)
    return logits.float().flatten(0, 1).log_softmax(-1)


def taught_loss(model, batch, autocast, teachers: list, teaching: float):
    """The mean cross entropy, in nats, of the next tokens and, with weight `teaching`, of the teachers' prediction."""
    import torch

    found = log_probabilities(model, batch, autocast)
    loss = torch.nn.functional.nll_loss(found, batch[:, 1:].flatten())
    if not teachers:
        return loss
    with torch.no_grad():
        expected = sum(log_probabilities(teacher, batch, autocast).exp() for teacher in teachers) / len(teachers)
    return (1 - teaching) * loss - teaching * (expected * found).sum(-1).mean()


def evaluate(model, meter: ActivationMeter, tokens: np.ndarray, context: int) -> tuple[float, list[float]]:
    """Held-out loss (nats per token, float32) and density of each layer, over windows of `context` tokens."""
    import contextlib

    import torch

    model.eval()
    total, count, densities = 0.0, 0, []
    with torch.no_grad():
        for begin in range(0, len(tokens), context - 1):
            piece = tokens[begin : begin + context - 1]
            batch = torch.tensor(np.concatenate([[BEGIN_ID], piece])[None].astype(np.int64), device=model.device)
            total += float(sequence_loss(model, batch, contextlib.nullcontext)) * len(piece)
            count += len(piece)
            densities.append(meter.take()[1] * len(piece))
    model.train()
    return total / count, (torch.stack(densities).sum(0) / count).tolist()


def train(recipe: Recipe, books: list[str], held_out: str, output: Path) -> dict:
    """Trains the model, after its teachers, and saves `training_state.pt` beside it.

    Returns the figures for the model card.
    """
    import contextlib

    import torch
    from tokenizers import Tokenizer
    from tqdm import tqdm

    output.mkdir(parents=True, exist_ok=True)
    tokenizer_path = output / "tokenizer.json"
    if recipe.form != "opt":
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(PACKAGED / name, output / name)
    if tokenizer_path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    else:
        print("training the tokenizer", file=sys.stderr)
        tokenizer = train_tokenizer(books, recipe, output)
    teacher_folders = [output / f"teacher-{number}" for number, _ in enumerate(recipe.teachers, 1)]
    for teacher, folder in zip(recipe.teachers, teacher_folders, strict=True):
        folder.mkdir(exist_ok=True)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(output / name, folder / name)
        if not (folder / "model.safetensors").exists():
            train(teacher, books, held_out, folder)
    encode = lambda text: np.array(list(tokenizer.encode(text, add_special_tokens=False).ids), np.int32)  # noqa: E731
    tokens = np.concatenate([encode(book) for book in books])
    held_out_tokens = encode(held_out)
    print(f"{len(tokens):,} training tokens, {len(held_out_tokens):,} held out", file=sys.stderr)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_model(recipe).to(device)
    teachers = [
        type(model).from_pretrained(folder, dtype=torch.float32).to(device).eval() for folder in teacher_folders
    ]
    meter = ActivationMeter(model)
    inner = [p for name, p in model.named_parameters() if recipe.muon and p.ndim == 2 and ".embed_" not in name]
    muon = Muon(inner, recipe.weight_decay)
    taken = {id(p) for p in inner}
    decayed = [p for p in model.parameters() if p.ndim == 2 and id(p) not in taken]
    other = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=recipe.peak_learning_rate, betas=(0.9, 0.98))
    autocast = lambda: torch.autocast(device, torch.bfloat16, enabled=recipe.precision == "bfloat16")  # noqa: E731

    state_path = output / "training_state.pt"
    step, cpu_seconds = 0, 0.0
    penalty, density, start_density = torch.zeros(3, recipe.layers if recipe.penalty_by_layer else 1).double()
    if state_path.exists():
        state = torch.load(state_path, weights_only=True, map_location=device)
        if state["recipe"] | {"steps": recipe.steps} != asdict(recipe):  # Only the number of steps may change.
            raise SystemExit(f"train: {state_path} belongs to another recipe; remove it, or use the same options")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        muon.momenta = state["momenta"]
        step, (penalty, density, start_density) = state["step"], (part.cpu() for part in state["controller"])
        cpu_seconds = state["cpu_seconds"]
    cpu_began = time.process_time() - cpu_seconds  # Time while the process is stopped or waits does not count.

    def save_state() -> None:
        state = {
            "recipe": asdict(recipe),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "momenta": muon.momenta,
            "step": step,
            "controller": (penalty, density, start_density),
            "cpu_seconds": time.process_time() - cpu_began,
        }
        partial = state_path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(state_path)

    model.train()
    saved_at = time.monotonic()
    begins = torch.arange(recipe.context - 1)
    text = torch.from_numpy(tokens.astype(np.int64))
    log = (output / "training_log.jsonl").open("a")
    with contextlib.closing(log), tqdm(total=recipe.steps, initial=step, unit="step", dynamic_ncols=True) as bar:
        while step < recipe.steps:
            torch.manual_seed(recipe.seed + 1 + step)  # gives the same batch and dropout after a resume
            starts = torch.randint(len(tokens) - recipe.context, (recipe.batch, 1))
            batch = torch.cat([torch.full((recipe.batch, 1), BEGIN_ID), text[starts + begins]], dim=1).to(device)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, recipe)
            loss = taught_loss(model, batch, autocast, teachers, recipe.teaching)
            activations, densities = meter.take()
            measured = densities.double().cpu()
            measured = measured if recipe.penalty_by_layer else measured.mean(0, keepdim=True)
            density = 0.95 * density + 0.05 * measured if step else measured
            if step >= recipe.sparsity_start * recipe.steps:
                if not start_density.any():
                    start_density, penalty = density, torch.full_like(penalty, 1e-4)
                penalty = next_penalty(penalty, density, start_density, step, recipe)
            (loss + (penalty.to(activations) * activations).sum()).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            muon.step(learning_rate(step, recipe))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            step += 1
            bar.update()
            bar.set_postfix(loss=f"{float(loss.detach()):.3f}", active=f"{float(density.mean()):.3f}")
            if step % 250 == 0 or step == recipe.steps:
                held_out_loss, by_layer = evaluate(model, meter, held_out_tokens[:10_000], recipe.context)
                line: dict = {
                    "step": step,
                    "loss": round(float(loss.detach()), 4),
                    "held_out_loss": round(held_out_loss, 4),
                }
                line |= {"density": [round(d, 4) for d in by_layer], "penalty": penalty.tolist()}
                print(json.dumps(line), file=log, flush=True)
            if time.monotonic() - saved_at > 120:
                save_state()
                saved_at = time.monotonic()
    save_state()
    cpu_seconds = time.process_time() - cpu_began
    model.half().float()  # Measure the weights that are shipped, which are rounded to float16.
    loss_value, by_layer = evaluate(model, meter, held_out_tokens, recipe.context)
    save_model(model, output)
    return {
        "books": len(books),
        "tokens": len(tokens),
        "cpu_minutes": cpu_seconds / 60,
        "parameters": sum(p.numel() for p in model.parameters()),
        "held_out_tokens": len(held_out_tokens),
        "held_out_characters": len(held_out),
        "held_out_loss": loss_value,
        "bits_per_character": loss_value * len(held_out_tokens) / len(held_out) / math.log(2),
        "density_by_layer": by_layer,
    }


def card(recipe: Recipe, figures: dict, held_out_name: str) -> str:
    """The model card with the measured figures."""
    density = figures["density_by_layer"]
    epochs = recipe.steps * recipe.batch * (recipe.context - 1) / figures["tokens"]
    loss = figures["held_out_loss"]
    shape = f"{recipe.layers} layers, width {recipe.hidden_size}, {recipe.ffn_size} FFN neurons per layer, "
    shape += f"{recipe.heads} heads"
    optimiser = "AdamW, and Muon for the matrices of the layers" if recipe.muon else "AdamW"
    teaching = ""
    if recipe.teachers:
        teaching = f"; {recipe.teaching:.0%} of the loss from the mean prediction of {len(recipe.teachers)} teachers, "
        teaching += "models of up to twice the size, without a penalty, trained before on the same text"
    if recipe.form == "opt":
        title, kind = "The demo model", "OPT (`model_type: opt`, ReLU)"
        purpose = "everything in this project can be tried, tested and measured without a download"
        tokenizer = f"SentencePiece unigram, {recipe.vocab_size} pieces with byte fallback, trained on the same text"
    else:
        title, kind = "The gated demo model", "Llama with ReLU gates (`model_type: llama`, `hidden_act: relu`)"
        purpose = "the streaming of gated neurons can be tested and measured on real activations"
        tokenizer = "the demo model's; training began with that model's token embeddings, reduced to this width"
        shape += f", {recipe.key_value_heads} of keys and values"
    rows = {
        "data": f"{figures['books']} public-domain English novels and collections of tales, {figures['tokens']:,} "
        "tokens; the texts are not included",
        "size": f"{figures['parameters'] / 1e6:.2f} million parameters in float16: {shape}, {recipe.context} positions",
        "tokenizer": f"{tokenizer}; white space of any kind counts as one space",
        "training": f"{recipe.steps} steps of {recipe.batch} x {recipe.context} tokens ({epochs:.1f} epochs), "
        f"{optimiser}, {recipe.precision}{teaching}, seed {recipe.seed}, "
        f"{figures['cpu_minutes']:.0f} minutes of processor time: "
        f"`python -m mlx_flash.demo.train --form {recipe.form} --steps {recipe.steps}`",
        "held-out text": f"{held_out_name}: {figures['held_out_tokens']:,} tokens, "
        f"{figures['held_out_characters']:,} characters",
        "held-out loss": f"{loss:.4f} nats per token, which is perplexity {math.exp(loss):.2f} per token and "
        f"{figures['bits_per_character']:.3f} bits per character",
        "FFN activations exactly zero": f"{1 - sum(density) / len(density):.1%} on the held-out text",
        "licence": "MIT, like the project; the texts are in the public domain",
    }
    steered = "with a separate weight for each layer" if recipe.penalty_by_layer else "on average over the layers"
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    layers = "\n".join(f"| {layer} | {1 - share:.1%} |" for layer, share in enumerate(density))
    return f"""# {title} of mlx_flash

A small {kind} that continues English prose in the manner of the
nineteenth century. It exists so that {purpose}.
It knows nothing and follows no instructions.

| | |
|---|---|
{table}

Share of FFN activations that are exactly zero on the held-out text, by layer:

| layer | zero |
|---|---|
{layers}

The sparsity comes from an L1 penalty on the activations. It begins after {recipe.sparsity_start:.0%} of the steps
and is steered towards {recipe.target_density:.1%} active neurons on the training text, {steered}.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m mlx_flash.demo.train", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="folder of plain-text books to train on")
    parser.add_argument("--held-out", type=Path, required=True, help="book to measure on, not used for training")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and the training state")
    parser.add_argument("--form", choices=RECIPES, default="opt", help="architecture (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="number of optimiser steps (default: from the form's recipe)")
    arguments = parser.parse_args()
    books = read_books(arguments.corpus)
    held_out = arguments.held_out.read_text(encoding="utf-8")
    recipe = RECIPES[arguments.form]
    recipe = replace(recipe, steps=arguments.steps or recipe.steps)
    figures = train(recipe, books, held_out, arguments.output)
    if recipe.form != "gemma3n":  # It is not packaged.
        (arguments.output / "README.md").write_text(card(recipe, figures, arguments.held_out.stem), encoding="utf-8")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
