"""Mistral with ReLU: Llama whose attention may be limited to a sliding window."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from . import llama

FAMILY = replace(
    llama.FAMILY,
    activations={"relu": "relu"},
    instead="a relufied version (PowerInfer/TurboSparse-Mistral-Instruct) or its mixture-of-experts sibling Mixtral",
)


@dataclass
class ModelArgs(llama.ModelArgs):
    max_position_embeddings: int = 4096 * 32
    sliding_window: int | None = 4096

    def __post_init__(self) -> None:
        self.layer_types = None  # every layer has the window
        super().__post_init__()
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}, expected at least 1 token, or null")


class Model(llama.Model):
    """Keys outside the window stay in the cache, masked. The cache is therefore trimmed and batched like any other."""

    family = FAMILY

    def window(self, cache: Any | None, length: int) -> int | None:
        size = self.args.sliding_window
        offset = 0 if cache is None else cache.offset
        whole = size is None or (isinstance(offset, int) and offset + length <= size)
        return None if whole else size
