"""generate and stream_generate, like mlx-lm's, with our statistics and without a delay of one token.

mlx-lm starts the next token before it hands out this one. Here the host waits for a token's reads anyway, so that
would only delay every token by one. mlx-lm's loop also raises the wired-memory limit, which a process that should stay
small must not do.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..defaults import PREFILL_TOKENS
from ..errors import UsageError
from ..flash.host_arrays import to_numpy
from ..flash.stats import Counters, Statistics
from ..flash.system import large_memory_given_back, peak_memory_bytes
from .detokenizer import Detokenizer
from .encoding import encode, too_long


@dataclass
class FlashResponse(GenerationResponse):
    """mlx-lm's response with the statistics of streaming so far. `peak_memory` is that of the process, in GB."""

    statistics: Statistics | None = None


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompt: str | list[int] | mx.array,
    max_tokens: int = 256,
    *,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: list[Callable[[mx.array, mx.array], mx.array]] | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int = PREFILL_TOKENS,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    prompt_logits_callback: Callable[[mx.array], None] | None = None,
    detokenizer: Detokenizer | None = None,
) -> Iterator[FlashResponse]:
    """Yields text while it is generated. The arguments have the same meaning as in mlx-lm.

    The joined texts are `tokenizer.decode` of the tokens, without the one that ends the text.

    max_tokens: -1 for as many as fit into the planned context. detokenizer: replaces the default one, such as
    `Detokenizer(tokenizer, continues=prompt)`, whose text continues the prompt's. prompt_logits_callback: called with
    the logits (T, V) of each chunk of the prompt, which covers all of its tokens but the last; they are evaluated only
    if it evaluates them, and the plan has no room for those of large chunks.

    The last response has finish_reason "length" if `max_tokens` or the end of the planned context is reached, else
    "stop". Raises UsageError for an empty prompt, or one longer than the planned context; ReadError if the store cannot
    be read.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer, Detokenizer)
    ids = encode_prompt(tokenizer, prompt)
    context = model.flash.plan.context
    cache = prompt_cache if prompt_cache is not None else make_prompt_cache(model)
    taken = cached_tokens(cache) + len(ids)
    if not ids:
        raise UsageError("the prompt is empty: expected at least one token.")
    known = model.flash.vocabulary
    if not 0 <= min(ids) <= max(ids) < known:
        raise UsageError(
            f"the prompt has token ids from {min(ids)} to {max(ids)}, but the model knows only 0 to {known - 1}. "
            "Does the tokenizer belong to this model?"
        )
    if taken > context:
        raise UsageError(too_long(model.flash, f"{taken} tokens", "load with a larger context (--context)"))
    if max_tokens == 0 or max_tokens < -1:
        raise UsageError(f"max_tokens is {max_tokens}, expected a positive number, or -1 for as many as fit.")
    if not 1 <= prefill_step_size <= PREFILL_TOKENS:
        raise UsageError(f"prefill_step_size is {prefill_step_size}; the plan makes room for 1 to {PREFILL_TOKENS}.")
    room = context - taken + 1  # The last token is never fed back.
    limit = room if max_tokens == -1 else min(max_tokens, room)
    return _stream(
        model,
        tokenizer,
        ids,
        limit,
        sampler or greedy_sampler,
        logits_processors or [],
        cache,
        prefill_step_size,
        prompt_progress_callback or (lambda *_: None),
        prompt_logits_callback or (lambda _: None),
        detokenizer or Detokenizer(tokenizer),
    )


def generate(
    model: Any, tokenizer: Any, prompt: str | list[int] | mx.array, verbose: bool = False, **kwargs: Any
) -> str:
    """Returns the whole text at once. The other arguments and the errors are those of `stream_generate`.

    verbose: print the text while it is generated, then the statistics, to standard output as mlx-lm does.
    """
    if not verbose:
        return "".join(response.text for response in stream_generate(model, tokenizer, prompt, **kwargs))
    text, response = "", None
    print("=" * 10)
    for response in stream_generate(model, tokenizer, prompt, **kwargs):
        print(response.text, end="", flush=True)
        text += response.text
    print("\n" + "=" * 10)
    assert response is not None  # There is at least one token.
    for line in summary(response, model):
        print(line)
    return text


def summary(response: FlashResponse, model: Any) -> list[str]:
    """mlx-lm's three lines about a whole answer, followed by ours."""
    statistics = response.statistics
    assert statistics is not None
    return [
        f"Prompt: {response.prompt_tokens} tokens, {response.prompt_tps:.3f} tokens-per-sec",
        f"Generation: {response.generation_tokens} tokens, {response.generation_tps:.3f} tokens-per-sec",
        f"Peak memory: {response.peak_memory:.3f} GB of {model.flash.plan.budget / 1e9:.3f} GB",
        f"First token: {statistics.first_token_s:.3f} s",
        *statistics.lines(model.flash.predictor),
    ]


def encode_prompt(tokenizer: Any, prompt: str | list[int] | mx.array, most: int | None = None) -> list[int]:
    """The token ids of a prompt. Special tokens are added to a text that does not begin with one, as in mlx-lm.

    Raises TokenizerError, and TooManyTokens for a long text of more than `most` tokens (None: no limit).
    """
    if isinstance(prompt, str):
        bare = tokenizer.bos_token is None or not prompt.startswith(tokenizer.bos_token)
        return encode(tokenizer, prompt, special_tokens=bare, most=most)
    ids: Any = prompt.tolist() if isinstance(prompt, mx.array) else prompt
    return [int(i) for i in ids]


def cached_tokens(cache: list[Any]) -> int:
    """The number of tokens in a prompt cache. Some models have layers, or parts of layers, that do not count them."""
    parts = [part for entry in cache for part in getattr(entry, "caches", [entry])]
    return max((int(part.offset) for part in parts if hasattr(part, "offset")), default=0)


class _TokenLoop:
    """Calls and times the model. Prompt and decoded tokens are counted separately, without other generations'."""

    def __init__(self, model: Any, cache: list[Any]) -> None:
        self.model, self.cache = model, cache
        self.counted = {"prompt": Counters(), "decode": Counters()}
        self.began = time.perf_counter()
        self.first_token_s = 0.0
        self.decoded = 0

    def prefill(
        self, ids: list[int], step: int, progress: Callable[[int, int], None], logits: Callable[[mx.array], None]
    ) -> None:
        """Feeds all tokens but the last, in chunks. `decode` feeds the last one, as in mlx-lm.

        Chunks end at multiples of `step` tokens of the whole context, so that they are those of a prompt read from its
        beginning even if some of it is in the cache.
        """
        done, total, begin = 0, len(ids), cached_tokens(self.cache)
        progress(0, total)
        while total - done > 1:
            piece = ids[done : min(done + step - (begin + done) % step, total - 1)]
            with large_memory_given_back():
                with self._counting("prompt"):
                    logits(self.model(mx.array(piece)[None], cache=self.cache)[0])
                    mx.eval([c.state for c in self.cache])
                    self.model.flash.evaluate_guarded()
                mx.clear_cache()
            done += len(piece)
            progress(done, total)

    def decode(self, token: mx.array, finish: Callable[[mx.array], tuple[mx.array, mx.array]]) -> tuple[int, mx.array]:
        """Feeds one token, (1,). Returns the next token and the log-probabilities it was chosen from, (V,)."""
        with self._counting("decode") as counters:
            began = time.perf_counter()
            chosen, logprobs = finish(self.model(token[None], cache=self.cache)[:, -1, :])
            mx.eval(chosen, logprobs)
            counters.total_s += time.perf_counter() - began
        self.model.flash.verify_unchanged()  # The files must not have changed while this token was computed.
        self.decoded += 1
        if self.decoded == 1:
            self.first_token_s = time.perf_counter() - self.began
        return int(to_numpy(chosen).item()), logprobs

    @contextlib.contextmanager
    def _counting(self, kind: str) -> Iterator[Counters]:
        """Locks the model for this generation, and adds the counts inside the context to this generation's."""
        counters: Counters = self.model.flash.streamer.counters
        with self.model.flash.lock:
            before = counters.copy()
            try:
                yield counters
            except BaseException:
                # Only this thread can evaluate what it began, and the next generation may come from another one.
                with contextlib.suppress(Exception):
                    self.model.flash.evaluate_guarded()
                raise
            self.counted[kind] += counters - before

    def statistics(self) -> Statistics:
        return Statistics(
            prompt=self.counted["prompt"],
            decode=self.counted["decode"],
            decoded_tokens=self.decoded,
            first_token_s=self.first_token_s,
        )


def _stream(
    model: Any,
    tokenizer: Any,
    ids: list[int],
    limit: int,
    sampler: Callable[[mx.array], mx.array],
    processors: list[Callable[[mx.array, mx.array], mx.array]],
    cache: list[Any],
    prefill_step_size: int,
    progress: Callable[[int, int], None],
    prompt_logits: Callable[[mx.array], None],
    detokenizer: Detokenizer,
) -> Iterator[FlashResponse]:
    seen = mx.array(ids)

    def finish(logits: mx.array) -> tuple[mx.array, mx.array]:
        for processor in processors:
            logits = processor(seen, logits)
        logprobs = logits - mx.logsumexp(logits, keepdims=True)
        return sampler(logprobs), logprobs.squeeze(0)

    steps = _TokenLoop(model, cache)
    steps.prefill(ids, prefill_step_size, progress, prompt_logits)
    prompt_s = generation_s = 0.0
    token = ids[-1]
    for count in range(1, limit + 1):
        began = time.perf_counter()
        token, logprobs = steps.decode(mx.array([token]), finish)
        if count == 1:
            progress(len(ids), len(ids))
            prompt_s = steps.first_token_s
        else:
            generation_s += time.perf_counter() - began
        if processors:
            seen = mx.concatenate([seen, mx.array([token])])
        stop = token in tokenizer.eos_token_ids
        if not stop:
            detokenizer.add_token(token)
        last = stop or count == limit
        if last:
            detokenizer.finalize()
        yield FlashResponse(
            text=detokenizer.last_segment,
            token=token,
            logprobs=logprobs,
            from_draft=False,
            prompt_tokens=len(ids),
            prompt_tps=len(ids) / prompt_s,
            generation_tokens=count,
            generation_tps=(count - 1) / generation_s if generation_s else 0.0,
            peak_memory=peak_memory_bytes() / 1e9,
            finish_reason=("stop" if stop else "length") if last else None,
            statistics=steps.statistics(),
        )
        if last:
            return
