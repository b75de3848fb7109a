"""Mistral with ReLU: Llama whose attention may look back on a window only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from . import llama

FAMILY = replace(
    llama.FAMILY,
    activations={"relu": "relu"},
    instead="a relufied version (PowerInfer/TurboSparse-Mistral-Instruct), its mixture-of-experts sibling Mixtral",
)


@dataclass
class ModelArgs(llama.ModelArgs):
    max_position_embeddings: int = 4096 * 32
    sliding_window: int | None = 4096

    def __post_init__(self) -> None:
        self.layer_types = None  # the window is every layer's
        super().__post_init__()
        if self.sliding_window is not None and self.sliding_window < 1:
            raise ValueError(f"sliding_window is {self.sliding_window}, expected at least 1 token, or null")


class Model(llama.Model):
    """Keys that fell out of the window stay in the cache, masked: so it is trimmed and batched as any other."""

    family = FAMILY

    def window(self, cache: Any | None, length: int) -> int | None:
        size = self.args.sliding_window
        offset = 0 if cache is None else cache.offset
        whole = size is None or (isinstance(offset, int) and offset + length <= size)
        return None if whole else size
