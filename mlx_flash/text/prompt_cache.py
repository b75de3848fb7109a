"""One KV cache, the plan's, kept over the turns of a conversation: only what is new of a prompt is read."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.cache import KVCache, can_trim_prompt_cache, make_prompt_cache, trim_prompt_cache

from ..defaults import KV_STEP_TOKENS
from ..flash.files import round_up
from .generation import FlashResponse, stream_generate


class ReusedPromptCache:
    """`stream_generate` for whole prompts, of which what the cache holds from the last call is not read again.

    The cache is trimmed to where it and a prompt part, if its kind allows that (mlx-lm's can_trim_prompt_cache); else
    it serves prompts that go on from it, and others begin with an empty one. A token that was decoded stays as it was
    decoded: read again as part of a prompt, it might leave other last bits.

    For one thread at a time.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.tokens: list[int] = []  # in the cache
        self.reused = 0  # of the last prompt: tokens that were in the cache already
        self._cache: list[Any] = make_prompt_cache(model)

    def forget(self) -> None:
        """Begins anew, and gives the memory back."""
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
        """`mlx_flash.stream_generate`, its errors included; `prompt_tokens` of its responses are the new ones.

        The iterator may be closed, and the callback may raise: what the cache holds by then is kept for the next call.
        After any other error the cache is empty.
        """
        try:
            self.reused = self._keep(prompt)
        except BaseException:  # MLX takes an array that it failed to make for a made one
            self.forget()
            raise
        rest = prompt[self.reused :]
        whole = True  # the cache holds self.tokens, and no layer more or less of them than another

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
                    self.tokens = [*prompt, *made]  # the newest token has not been put in
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
        """Makes the cache hold the beginning of the prompt, as far as it can; returns how many tokens that is."""
        fed = prompt[:-1]  # the last one must go through the model, for what follows it
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
    """With how many equal tokens both begin."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((place for place, (x, y) in pairs if x != y), min(len(a), len(b)))


def make_room(cache: list[Any], tokens: int) -> None:
    """Lets a KV cache in use grow to `tokens` in whole steps, as the plan counts it.

    mlx-lm's own would cut off the rest of a step and begin a new one there, and so become up to a step larger.
    """
    size = round_up(tokens, KV_STEP_TOKENS)
    for part in (part for entry in cache for part in getattr(entry, "caches", [entry])):
        if type(part) is KVCache and part.keys is not None and (more := size - part.keys.shape[2]) > 0:
            for name in ("keys", "values"):
                array = getattr(part, name)
                rows, heads, _, width = array.shape
                setattr(part, name, mx.concatenate([array, mx.zeros((rows, heads, more, width), array.dtype)], axis=2))
            mx.eval(part.keys, part.values)
