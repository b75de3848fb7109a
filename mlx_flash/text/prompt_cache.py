"""The planned KV cache, kept over the turns of a conversation, so that only the new part of a prompt is read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, QuantizedKVCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..defaults import KV_STEP_TOKENS
from ..flash.files import round_up
from .generation import FlashResponse, stream_generate


class ReusedPromptCache:
    """`stream_generate` for whole prompts, which does not read again what the cache holds from the last call.

    The cache is trimmed to its common prefix with the prompt, if its kind allows that (mlx-lm's can_trim_prompt_cache).
    If not, it is used for prompts that continue it, and any other prompt begins with an empty cache. A decoded token
    stays in the cache as it was decoded; reading it again as part of a prompt might change its last bits.

    For one thread at a time.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokens: list[int] = []  # tokens in the cache
        self.reused = 0  # number of the last prompt's tokens that were in the cache already
        self._cache: list[Any] = make_prompt_cache(model)

    def forget(self) -> None:
        """Empties the cache and frees its memory."""
        self.tokens = []
        self._cache = make_prompt_cache(self.model)
        mx.clear_cache()

    def stream_generate(
        self,
        tokenizer: Any,
        prompt: list[int],
        max_tokens: int = 256,
        *,
        prompt_progress_callback: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> Generator[FlashResponse, None, None]:
        """Like `mlx_flash.stream_generate`, with the same errors; `prompt_tokens` in the responses counts the new ones.

        The iterator may be closed, and the callback may raise: the next call then uses what the cache holds by then.
        After any other error the cache is empty.
        """
        try:
            self.reused = self._keep(prompt)
        except BaseException:  # MLX counts an array whose evaluation failed as evaluated.
            self.forget()
            raise
        rest = prompt[self.reused :]
        whole = True  # whether every layer's cache holds exactly self.tokens

        def progress(done: int, total: int) -> None:
            nonlocal whole
            self.tokens = prompt[: self.reused + done]
            if prompt_progress_callback is not None:
                whole = True
                prompt_progress_callback(done, total)
            whole = False

        responses = stream_generate(
            self.model,
            tokenizer,
            rest,
            max_tokens,
            prompt_cache=self._cache,
            prompt_progress_callback=progress,
            **options,
        )

        def stream() -> Generator[FlashResponse, None, None]:
            nonlocal whole
            made: list[int] = []
            try:
                for response in responses:
                    self.tokens = [*prompt, *made]  # The newest token is not in the cache yet.
                    made.append(response.token)
                    whole = True
                    yield response
                    whole = False
                whole = True
            finally:
                if not whole:
                    self.forget()

        return stream()

    def _keep(self, prompt: list[int]) -> int:
        """Trims the cache to the beginning of the prompt. Returns the number of tokens that it keeps."""
        fed = prompt[:-1]  # The last token must go through the model, which gives the next one.
        common = common_prefix(self.tokens, fed)
        surplus = len(self.tokens) - common
        if surplus and (
            not common or not can_trim_prompt_cache(self._cache) or trim_prompt_cache(self._cache, surplus) != surplus
        ):
            self.forget()
            return 0
        self.tokens = self.tokens[:common]
        make_room(self._cache, min(len(prompt), self.model.flash.plan.context))
        return common


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of tokens in the common prefix."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


def make_room(cache: list[Any], tokens: int) -> None:
    """Grows a KV cache in use to hold `tokens`, rounded up to whole steps, as the plan counts it.

    mlx-lm would cut off the unused part of the last step and begin a new step there. The cache would then be up to a
    step larger than planned.
    """
    size = round_up(tokens, KV_STEP_TOKENS)

    def grown(array: mx.array) -> mx.array:
        """array: (B, heads, tokens, width) -> (B, heads, size, width)"""
        rows, heads, held, width = array.shape
        return mx.concatenate([array, mx.zeros((rows, heads, size - held, width), array.dtype)], axis=2)

    for part in (part for entry in cache for part in getattr(entry, "caches", [entry])):
        if type(part) in (KVCache, QuantizedKVCache) and part.keys is not None:
            quantised = type(part) is QuantizedKVCache  # keys, and values, are then three arrays each
            if (part.keys[0] if quantised else part.keys).shape[2] >= size:
                continue
            for name in ("keys", "values"):
                held = getattr(part, name)
                setattr(part, name, tuple(map(grown, held)) if quantised else grown(held))
            mx.eval(part.keys, part.values)
