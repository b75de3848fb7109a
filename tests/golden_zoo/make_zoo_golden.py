"""Writes tiny random models of types that the zoos build, and the results of transformers for them.

    python tests/golden_zoo/make_zoo_golden.py [NAME ...]

Needs torch and transformers 5.24; the tests that read the files need neither. Each folder gets ``config.json`` and
``golden.npz``: tokens (1, T) int32, logits (1, T, vocab) float32 of reading them at once, greedy (16,) int32: how they
continue, token by token; the names and shapes of the tensors that transformers saves, whose numbers follow from their
names (golden_numbers.py), and tensors of whole numbers.

An indexer with few heads often gives several keys a score of exactly 0. Which of them it chooses then differs between
libraries, so the indexers here have many heads.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
from golden_numbers import numbers  # type: ignore[import-not-found]

GREEDY_TOKENS = 16
PROMPT = [5, 17, 80, 3, 44, 61, 9, 9, 30, 72, 1, 55, 8, 90, 31, 2, 77, 64, 12, 40, 33, 21, 7, 68, 50]


def configuration(name: str) -> dict[str, Any]:
    """The config.json of a type."""
    settings: dict[str, Any] = json.loads((Path(__file__).parent / "configurations.json").read_text())[name]
    return settings


def make(name: str, folder: Path) -> None:
    settings = configuration(name)
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(settings)))
    kinds: Any = transformers.AutoModelForCausalLM
    if "vision_config" in settings:
        kinds = transformers.AutoModelForImageTextToText
    with tempfile.TemporaryDirectory() as saved:
        kinds.from_config(config).float().save_pretrained(saved)
        file = Path(saved, "model.safetensors")
        tensors = {
            tensor: torch.from_numpy(numbers(tensor, tuple(held.shape))) if held.is_floating_point() else held
            for tensor, held in load_file(file).items()
        }
        save_file(tensors, file, {"format": "pt"})
        model = kinds.from_pretrained(saved, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        tokens = torch.tensor([PROMPT])
        logits = model(input_ids=tokens, use_cache=False).logits
        made = model.generate(tokens, min_new_tokens=GREEDY_TOKENS, max_new_tokens=GREEDY_TOKENS, do_sample=False)
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings, indent=1) + "\n")
    shapes = {tensor: list(held.shape) for tensor, held in tensors.items() if held.is_floating_point()}
    others = {f"tensor {tensor}": held.numpy() for tensor, held in tensors.items() if not held.is_floating_point()}
    np.savez_compressed(
        folder / "golden.npz",
        tokens=np.array([PROMPT], np.int32),
        logits=logits.float().numpy(),
        greedy=made[0, len(PROMPT) :].numpy().astype(np.int32),
        shapes=np.array(json.dumps(shapes)),
        **others,
    )


if __name__ == "__main__":
    here = Path(__file__).parent
    for wanted in sys.argv[1:] or json.loads((here / "configurations.json").read_text()):
        make(wanted, here / wanted)
        print(wanted, sum(file.stat().st_size for file in (here / wanted).iterdir()), "bytes")
