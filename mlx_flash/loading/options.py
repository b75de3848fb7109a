"""The options for loading a model."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ..defaults import (
    DRAFTS,
    IO_MODES,
    KV_BITS,
    MAX_CONTEXT,
    MOST_PARALLEL,
    MOST_PREFILL_TOKENS,
    PREDICTORS,
    PREFILL_TOKENS,
    WIRE_MODES,
)
from ..errors import UsageError
from .plan import parse_memory


@dataclass(frozen=True)
class LoadOptions:
    """The options of `load` and `plan`.

    revision: a branch, tag or commit of the Hugging Face repository; None for its main branch.
    memory: budget for the whole process, "6GB" or bytes; None for a share of the free memory.
    predictor: "auto" (the store's default), "none", "exact", "lowrank", "shadow" or "imported".
    recall: share of the active neurons that a stored predictor should find; None for the store's own target.
    window: evict by a sliding window of this many tokens; None to evict the least used.
    threads: number of reader threads; None to try 8, 16 and 32 while tokens are generated.
    context: number of tokens that the plan makes room for (at most the model's positions); "max" for all positions;
        None for as many as suit the budget, see `plan_context`.
    prompt_cache: memory for the KV caches of earlier conversations, "2GB" or bytes; 0 for none. "auto" for a tenth of
        what the budget has beyond the smallest one, but at most three contexts. `ReusedPromptCache` uses it, and so the
        server and the chat.
    kv_bits: bits per number of the KV cache, 8 or 4; None for the model's own precision. This may change the text.
    prefill_chunk: tokens of a prompt that are read in one pass. This may change the text.
    io: "direct" to read past the page cache, or "buffered"; None to begin with "direct" and to try both while tokens
        are generated.
    draft: "ngram" to draft tokens by repeating what followed the same words before, "mtp" to draft with the
        checkpoint's own head, wholly in memory, where mlx-vlm runs it, or "none". This may change the text by rounding.
    draft_model: a folder or a Hugging Face repository with a small model of the same vocabulary, which drafts tokens.
        It is wholly in memory. This may change the text by rounding.
    adapter: a folder or a Hugging Face repository with an adapter that mlx-lm trained for the model (LoRA or DoRA).
        What it adds is in memory.
    verify: compare everything that is read of a mixture's checkpoint with checksums, every expert at every read. The
        first such load reads the whole checkpoint to make the checksums.
    images: whether the model is to read images. mlx-vlm builds it then, with its vision part in memory.
    parallel: number of answers that are decoded at once, 1 to 8. The plan has a KV cache for each. The server uses it.
    warm_start: fill the slots with the units that earlier runs used most, and keep in the cache folder how often this
        run uses each unit. The commands that generate do so.
    wire: keep weights and slots in memory on macOS 15 and later: "on", "off", or "auto", if the system swapped while an
        earlier run of this model generated.
    trials: whether options that do not change the text are tried while tokens are generated, and the results kept in
        the cache folder. Otherwise they are at their defaults.
    """

    revision: str | None = None
    memory: str | int | None = None
    predictor: str = "auto"
    recall: float | None = None
    window: int | None = None
    threads: int | None = None
    context: int | str | None = None
    prompt_cache: str | int = 0
    kv_bits: int | None = None
    prefill_chunk: int = PREFILL_TOKENS
    io: str | None = None
    draft: str = "none"
    draft_model: str | os.PathLike[str] | None = None
    adapter: str | os.PathLike[str] | None = None
    verify: bool = False
    images: bool = False
    parallel: int = 1
    warm_start: bool = False
    wire: str = "auto"
    trials: bool = True

    @property
    def budget(self) -> int | None:
        """The budget in bytes, or None. Raises UsageError if `memory` is not a size."""
        return None if self.memory is None else parse_memory(self.memory)

    @property
    def prompt_cache_bytes(self) -> int | None:
        """The bytes for earlier conversations, or None for a share. Raises UsageError if it is not a size."""
        if self.prompt_cache == "auto":
            return None
        return 0 if self.prompt_cache == "0" else parse_memory(self.prompt_cache, "prompt_cache")

    def check(self) -> None:
        """Raises UsageError for a value that no model can be loaded with."""
        numbers = (("window", self.window), ("threads", self.threads), ("prefill_chunk", self.prefill_chunk))
        for name, value in numbers:
            if type(value) is not int and not (name != "prefill_chunk" and value is None):
                raise UsageError(f"{name} is {value!r:.80}, expected a whole number.")
        if self.memory is not None and type(self.memory) not in (int, str):
            raise UsageError(f"memory is {self.memory!r:.80}, expected a size such as '6GB', or bytes.")
        if type(self.prompt_cache) not in (int, str):
            raise UsageError(
                f"prompt_cache is {self.prompt_cache!r:.80}, expected a size such as '2GB', bytes, or 'auto'."
            )
        if self.recall is not None and type(self.recall) not in (int, float):
            raise UsageError(f"recall is {self.recall!r:.80}, expected a number.")
        for name in ("verify", "images", "warm_start", "trials"):
            flag = getattr(self, name)
            if type(flag) is not bool:
                raise UsageError(f"{name} is {flag!r:.80}, expected True or False.")
        if self.predictor not in PREDICTORS:
            raise UsageError(f"predictor is {self.predictor!r}, expected one of {', '.join(PREDICTORS)}.")
        if self.window is not None and not 1 <= self.window <= 10**6:
            raise UsageError(f"window is {self.window}, expected 1 to 1000000 tokens.")
        if self.threads is not None and not 1 <= self.threads <= 256:
            raise UsageError(f"threads is {self.threads}, expected 1 to 256.")
        if not 1 <= self.prefill_chunk <= MOST_PREFILL_TOKENS:
            raise UsageError(f"prefill_chunk is {self.prefill_chunk}, expected 1 to {MOST_PREFILL_TOKENS} tokens.")
        if self.context not in (None, MAX_CONTEXT) and type(self.context) is not int:
            raise UsageError(f"context is {self.context!r:.80}, expected a whole number, or {MAX_CONTEXT!r}.")
        if isinstance(self.context, int) and self.context < 1:
            raise UsageError(f"context is {self.context}, expected at least 1 token.")
        if self.kv_bits is not None and (type(self.kv_bits) is not int or self.kv_bits not in KV_BITS):
            raise UsageError(f"kv_bits is {self.kv_bits!r:.80}, expected {' or '.join(map(str, KV_BITS))}, or None.")
        if self.wire not in WIRE_MODES:
            raise UsageError(f"wire is {self.wire!r:.80}, expected one of {', '.join(WIRE_MODES)}.")
        if self.io is not None and self.io not in IO_MODES:
            raise UsageError(f"io is {self.io!r}, expected 'direct', 'buffered', or None.")
        if self.draft not in DRAFTS:
            raise UsageError(f"draft is {self.draft!r:.80}, expected one of {', '.join(DRAFTS)}.")
        for name, given in (("draft_model", self.draft_model), ("adapter", self.adapter)):
            if given is not None and not isinstance(given, (str, os.PathLike)):
                raise UsageError(f"{name} is {given!r:.80}, expected a folder or a repository id.")
        if self.draft_model is not None and self.draft != "none":
            raise UsageError(f"draft is {self.draft!r} and a draft model is given as well. Leave one of them out.")
        if type(self.parallel) is not int or not 1 <= self.parallel <= MOST_PARALLEL:
            raise UsageError(f"parallel is {self.parallel!r:.80}, expected a whole number from 1 to {MOST_PARALLEL}.")
        if self.parallel > 1:
            self._check_alone()
        _ = self.budget, self.prompt_cache_bytes

    def _check_alone(self) -> None:
        """Raises UsageError for an option that works for one answer at a time."""
        alone = {
            "images": self.images,
            "drafts": self.draft != "none" or self.draft_model is not None,
            "a quantised KV cache (kv_bits)": self.kv_bits is not None,
        }
        if named := [name for name, given in alone.items() if given]:
            raise UsageError(
                f"parallel is {self.parallel}, but {' and '.join(named)} work for one answer at a time. "
                "Leave one of them out."
            )
