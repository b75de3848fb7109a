"""Prompt caches that keep their contexts on the disk, with fake models, and questions to them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import test_prompt_caches  # type: ignore[import-not-found]  # found beside this file

from mlx_flash.source.conversation_folder import ConversationFolder
from mlx_flash.text.conversation_files import ConversationFiles
from mlx_flash.text.prompt_cache import ReusedPromptCache

NAME = "model-0123456789ab"
MANY = 1 << 30
STEP = test_prompt_caches.STEP


def fake(kind: str, planned: int = 0) -> Any:
    model = test_prompt_caches.FakeModel(kind, planned)
    model.flash.plan.demand.context_bytes = MANY
    return model


def kept(root: Path, model: Any, notes: list[str], most: int | None = MANY, name: str = NAME) -> ReusedPromptCache:
    folder = ConversationFolder(root / "conversations", name, {"model": "m"}, most)
    return ReusedPromptCache(model, ConversationFiles(folder, model, notes.append))


def prompt(seed: int, count: int) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(1, 90, count)]


def ask(turns: ReusedPromptCache, endless: Any, ids: list[int], count: int = 3, **options: Any) -> Any:
    responses = list(turns.stream_generate(endless, ids, count, prefill_step_size=STEP, **options))
    return [response.token for response in responses], [np.array(response.logprobs).tobytes() for response in responses]


def names(root: Path) -> list[str]:
    return sorted(path.name for path in (root / "conversations").glob("*/*.safetensors"))
