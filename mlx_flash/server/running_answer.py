"""How a job chooses its tokens, and what becomes of them, however they are decoded."""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any

from ..text.detokenizer import Detokenizer
from ..text.sampling import make_processors, make_sampler
from .answer_progress import AnswerInProgress
from .jobs import End, Job, Piece
from .loaded_model import LoadedModel
from .prompt_echo import PromptEcho, chunk_for, text_of

if TYPE_CHECKING:
    from ..text.generation import FlashResponse


class RunningAnswer:
    """An answer that has been begun.

    reused: number of the prompt's tokens that were in a cache already; the owner sets it before the first token.
    sampler, processors, detokenizer: of the generation. seed: of its random numbers, so that those of one request do
    not affect the text of the next. reading: further arguments for reading the prompt.
    """

    def __init__(self, job: Job, loaded: LoadedModel) -> None:
        model, self._tokenizer = loaded.model, loaded.tokenizer
        sampling = job.sampling
        self.job, self.reused = job, 0
        self.seed = sampling.seed if sampling.seed is not None else int.from_bytes(os.urandom(8), "little")
        self._answer = AnswerInProgress(job, self._tokenizer, loaded.format)
        self._echo: PromptEcho | None = None
        self.reading: dict[str, Any] = {}
        if job.echo and job.top_logprobs is not None:
            self._echo = PromptEcho(self._tokenizer, job.ids, job.top_logprobs)
            step = chunk_for(model.flash.vocabulary, model.flash.prefill_tokens)
            # All of the prompt is read then.
            self.reading = {"prompt_logits_callback": self._echo.read, "prefill_step_size": step}

        def cached() -> list[int]:
            return job.ids[: self.reused]

        self.processors = [*make_processors(sampling, cached), *self._answer.processors]
        self.sampler = make_sampler(sampling, model.flash.vocabulary)
        self.detokenizer = Detokenizer(self._tokenizer, self._answer.continues)
        self._first = 0.0

    def start(self) -> None:
        """Starts the clock."""
        self._start = time.monotonic()

    def take(self, response: FlashResponse) -> End | None:
        """Tells what a response adds. Returns the end of the answer if this is the last one."""
        job, answer = self.job, self._answer
        self._first = self._first or time.monotonic()
        if job.echo and response.generation_tokens == 1:
            text = text_of(self._tokenizer, job.ids)
            job.tell(Piece(text) if self._echo is None else self._echo.piece(text))
            answer.begin_with(text)
        if job.max_tokens == 0:
            return End("length", len(job.ids), self.reused, 0, 0, None, self._first - self._start, 0.0)
        for item in answer.take(response):
            job.tell(item)
        if answer.finish_reason is None:
            return None
        return End(
            answer.finish_reason,
            len(job.ids),
            self.reused,
            response.generation_tokens,
            answer.thought_tokens,
            answer.stop_word,
            self._first - self._start,
            time.monotonic() - self._first,
        )
