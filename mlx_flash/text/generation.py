"""generate and stream_generate, like mlx-lm's, with our statistics and without a delay of one token.

mlx-lm starts the next token before it hands out this one. Here the host waits for a token's reads anyway, so that
would only delay every token by one. mlx-lm's loop also raises the wired-memory limit, which a process that should stay
small must not do.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx_lm.generate import GenerationResponse
from mlx_lm.models.cache import make_prompt_cache
from mlx_lm.sample_utils import greedy_sampler
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import UsageError
from ..flash.stats import Statistics
from ..flash.system import peak_memory_bytes
from .detokenizer import Detokenizer
from .drafts import MODEL, Drafting, DraftModel
from .encoding import encode, too_long
from .token_loop import Chooser, Token, TokenLoop, cached_tokens


@dataclass
class FlashResponse(GenerationResponse):
    """mlx-lm's response with the statistics of streaming so far. `peak_memory` is that of the process, in GB."""

    statistics: Statistics | None = None


def chunk_of(model: Any) -> int:
    """The number of tokens in a chunk of a prompt, unless a caller asks for fewer."""
    return int(model.flash.prefill_tokens)


def stream_generate(
    model: Any,
    tokenizer: Any,
    prompt: str | list[int] | mx.array,
    max_tokens: int = 256,
    *,
    sampler: Callable[[mx.array], mx.array] | None = None,
    logits_processors: list[Callable[[mx.array, mx.array], mx.array]] | None = None,
    prompt_cache: list[Any] | None = None,
    prefill_step_size: int | None = None,
    prompt_progress_callback: Callable[[int, int], None] | None = None,
    prompt_logits_callback: Callable[[mx.array], None] | None = None,
    detokenizer: Detokenizer | None = None,
    draft_model: Any = None,
    num_draft_tokens: int | None = None,
    cached: Sequence[int] = (),
) -> Generator[FlashResponse]:
    """Yields text while it is generated. The arguments have the same meaning as in mlx-lm.

    The joined texts are `tokenizer.decode` of the tokens, without the one that ends the text.

    max_tokens: -1 for as many as fit into the planned context. detokenizer: replaces the default one, such as
    `Detokenizer(tokenizer, continues=prompt)`, whose text continues the prompt's. prompt_logits_callback: called with
    the logits (T, V) of each chunk of the prompt, which covers all of its tokens but the last; they are evaluated only
    if it evaluates them, and the plan has no room for those of large chunks.

    draft_model: a small model of mlx-lm's with the same vocabulary, whose drafts are verified. The plan does not count
    it, unlike that of `load`; None: draft as `load` was told to. num_draft_tokens: most drafts per pass, 0 for none.
    None: what earlier generations found to be fastest, or FIRST_DEPTH for a `draft_model` that is given here. cached:
    the tokens that `prompt_cache` holds, which drafts may repeat.

    If the iterator is not used up, close it: the cache then holds all tokens but the newest.

    The last response has finish_reason "length" if `max_tokens` or the end of the planned context is reached, else
    "stop". Raises UsageError for an empty prompt, or one longer than the planned context; ReadError if the store cannot
    be read.
    """
    if not isinstance(tokenizer, TokenizerWrapper):
        tokenizer = TokenizerWrapper(tokenizer, Detokenizer)
    ids = encode_prompt(tokenizer, prompt)
    cache = prompt_cache if prompt_cache is not None else make_prompt_cache(model)
    limit = limit_of(model, ids, cached_tokens(cache), max_tokens)
    most = chunk_of(model)
    step = most if prefill_step_size is None else prefill_step_size
    if not 1 <= step <= most:
        raise UsageError(f"prefill_step_size is {step}; the plan makes room for 1 to {most} (--prefill-chunk).")
    drafting = model.flash.drafting
    if draft_model is not None:
        drafting = Drafting(MODEL, model.flash.most_positions, DraftModel(draft_model))
    if num_draft_tokens is not None:
        if drafting is None:
            raise UsageError("num_draft_tokens is given without drafts. Load with draft or draft_model.")
        if not 0 <= num_draft_tokens < drafting.most_positions:
            raise UsageError(
                f"num_draft_tokens is {num_draft_tokens}, expected 0 to {drafting.most_positions - 1} for this model."
            )
    return _stream(
        model,
        tokenizer,
        ids,
        limit,
        sampler or greedy_sampler,
        logits_processors or [],
        cache,
        step,
        prompt_progress_callback or (lambda *_: None),
        prompt_logits_callback,
        detokenizer or Detokenizer(tokenizer),
        drafting,
        num_draft_tokens,
        [*cached, *ids],
    )


def limit_of(model: Any, ids: list[int], cached: int, max_tokens: int) -> int:
    """The most tokens of an answer. ids: the prompt without the `cached` tokens. max_tokens: see `stream_generate`.

    Raises UsageError for a prompt that the model cannot be given.
    """
    context, taken = model.flash.plan.context, cached + len(ids)
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
    room = context - taken + 1  # The last token is never fed back.
    return room if max_tokens == -1 else min(max_tokens, room)


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
        *([model.flash.trials.line()] if model.flash.trials else []),
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
    prompt_logits: Callable[[mx.array], None] | None,
    detokenizer: Detokenizer,
    drafting: Drafting | None,
    depth: int | None,
    text: list[int],
) -> Generator[FlashResponse]:
    steps = TokenLoop(model, cache)
    steps.prefill(ids, prefill_step_size, progress, prompt_logits)
    choose = Chooser(ids, sampler, processors)
    if drafting is None:
        tokens = steps.plain(ids[-1], choose)
    else:
        depth = drafting.choose_depth() if depth is None else depth
        tokens = steps.drafted(ids[-1], choose, limit, text, drafting, depth, sampler)
    answer = AnswerTokens(tokenizer, detokenizer, len(ids), limit)
    with closing(tokens):
        last = False
        while not last:
            began = time.perf_counter()
            made = next(tokens)
            took_s = time.perf_counter() - began
            if not answer.count:
                progress(len(ids), len(ids))
                took_s = steps.first_token_s
            last = answer.take(made, took_s)
            if last:
                tokens.close()  # now the cache holds what it should
            statistics = steps.statistics(last)
            if last:
                model.flash.answered(statistics.swap)
            yield answer.response(made, statistics)


class AnswerTokens:
    """Turns the tokens of one answer into responses.

    prompt_tokens: number of those that were read for it. limit: most tokens of the answer. count: of those so far.
    """

    def __init__(self, tokenizer: Any, detokenizer: Detokenizer, prompt_tokens: int, limit: int) -> None:
        self.count = 0
        self._reason: str | None = None
        self._tokenizer, self._detokenizer = tokenizer, detokenizer
        self._prompt_tokens, self._limit = prompt_tokens, limit
        self._prompt_s = self._generation_s = 0.0

    def take(self, made: Token, seconds: float) -> bool:
        """Adds a token, and returns whether it is the last.

        seconds: since the one before; for the first one, since the beginning.
        """
        self.count += 1
        if self.count == 1:
            self._prompt_s = seconds
        else:
            self._generation_s += seconds
        stop = made.token in self._tokenizer.eos_token_ids
        if not stop:
            self._detokenizer.add_token(made.token)
        if stop or self.count == self._limit:
            self._reason = "stop" if stop else "length"
            self._detokenizer.finalize()
        return self._reason is not None

    def response(self, made: Token, statistics: Statistics) -> FlashResponse:
        """The response for the token that was taken last."""
        count, generation_s = self.count, self._generation_s
        return FlashResponse(
            text=self._detokenizer.last_segment,
            token=made.token,
            logprobs=made.logprobs,
            from_draft=made.from_draft,
            prompt_tokens=self._prompt_tokens,
            prompt_tps=self._prompt_tokens / self._prompt_s,
            generation_tokens=count,
            generation_tps=(count - 1) / generation_s if generation_s else 0.0,
            peak_memory=peak_memory_bytes() / 1e9,
            finish_reason=self._reason,
            statistics=statistics,
        )
