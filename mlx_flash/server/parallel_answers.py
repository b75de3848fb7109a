"""Several answers at once: their newest tokens are fed together, so that they share what a step reads.

A prompt is read alone, and every chunk of it is followed by a step of the answers that have begun. Then its answer
joins them. Requests begin in the order of the queue. An answer alone is decoded as a batch of one, so that what is kept
of a conversation does not depend on who else came.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..flash.stats import Counters, Statistics
from ..flash.swap import swap_counters
from ..flash.system import large_memory_given_back
from ..text.batch_generation import DecodeBatch
from ..text.generation import AnswerTokens, limit_of
from ..text.token_loop import Chooser, Token, TokenLoop
from .api_errors import ApiError, stopping, why_failed
from .jobs import End, Ended, Job, Progress
from .loaded_model import LoadedModel
from .places import Places, QueuePlace
from .running_answer import RunningAnswer

if TYPE_CHECKING:
    from .monitor import RequestWatch


@dataclass(eq=False)
class _ParallelAnswer:
    """An answer that has been begun. tokens: the prompt, and those that were made. newest_at: when the newest came.

    decode: its equal share of every step.
    """

    place: QueuePlace
    watch: RequestWatch
    answer: RunningAnswer
    said: AnswerTokens
    context: Any
    prompt: TokenLoop
    tokens: list[int]
    newest_at: float
    decode: Counters = field(default_factory=Counters)
    first_token_s: float = 0.0

    @property
    def job(self) -> Job:
        return self.answer.job


class ParallelAnswers:
    """The answers of a loaded model. For the engine's thread.

    running: jobs that have been begun are added to it, and taken out at their end. rows: in the
    order of the batch.
    """

    def __init__(self, loaded: LoadedModel, running: list[Job], places: Places, stops: Callable[[], bool]) -> None:
        self._loaded, self._running, self._places, self._stops = loaded, running, places, stops
        self._batch = DecodeBatch(loaded.model)
        self.rows: list[_ParallelAnswer] = []

    @property
    def full(self) -> bool:
        """Whether the plan has room for no further answer."""
        return len(self.rows) >= self._loaded.model.flash.plan.demand.parallel

    def begin(self, place: QueuePlace) -> None:
        """Reads the prompt of a place's job, and lets its answer join the others."""
        job, monitor = place.serving, self._loaded.monitor
        assert job is not None and monitor is not None
        if job.left:
            self._places.served(place)
            return
        self._running.append(job)
        watch = monitor.begin(job)
        try:
            self._check(job)
            self._join(self._read(place, job, watch))
        except Exception as error:
            self._finish(place, job, watch, error)
        except BaseException:
            self._finish(place, job, watch, Ended())
            raise

    def _read(self, place: QueuePlace, job: Job, watch: RequestWatch) -> _ParallelAnswer:
        model, turns = self._loaded.model, self._loaded.turns
        answer = RunningAnswer(job, self._loaded)
        limit = limit_of(model, job.ids, 0, max(1, job.max_tokens))

        def progress(done: int, total: int) -> None:
            watch.cached = turns.reused
            watch.prompt(done)
            if 0 < done < total - 1:
                job.tell(Progress(turns.reused + done, turns.reused + total))
            self._check(job)
            if 0 < done < total - 1:
                self.step()

        answer.start()
        context, loop = turns.read(
            job.ids,
            system_tokens=job.system_tokens,
            fresh=job.sampling.seed is not None,
            prompt_progress_callback=progress,
            **answer.reading,
        )
        answer.reused = turns.reused
        said = AnswerTokens(self._loaded.tokenizer, answer.detokenizer, len(job.ids) - turns.reused, limit)
        return _ParallelAnswer(place, watch, answer, said, context, loop, list(job.ids), loop.began)

    def _join(self, row: _ParallelAnswer) -> None:
        job, answer = row.job, row.answer
        chooser = Chooser(job.ids[answer.reused :], answer.sampler, answer.processors)
        cache, row.context.cache = row.context.cache, []
        try:
            with large_memory_given_back():
                self._batch.join(cache, job.ids[-1], chooser, answer.seed)
        except Exception as error:
            self._loaded.turns.give_back(row.context, None, [])
            self.end(error)  # The batch may be half changed.
            raise
        self.rows.append(row)

    def step(self) -> None:
        """Feeds the newest token of every answer. Raises nothing: an error ends the answers that it belongs to."""
        try:
            for row in list(self.rows):
                if row.job.left or self._stops():
                    self._leave(row, Ended())
            if self.rows:
                self._feed()
        except Exception as error:
            self.end(error)

    def _feed(self) -> None:
        made = self._batch.step()
        share = self._batch.last / len(made)
        for row, token in zip(list(self.rows), made, strict=True):
            row.decode += share
            if isinstance(token, Exception):
                self._leave(row, token, unfed=0)
                continue
            row.tokens.append(token.token)
            try:
                end: End | Exception | None = self._told(row, token)
            except Exception as error:
                end = error
            if end is not None:
                self._leave(row, end)

    def end(self, error: Exception) -> None:
        """Ends all answers with an error. Their contexts are lost."""
        rows, self.rows = self.rows, []
        self._batch = DecodeBatch(self._loaded.model)
        for row in rows:
            self._loaded.turns.give_back(row.context, None, [])
            self._finish(row.place, row.job, row.watch, error)

    def _told(self, row: _ParallelAnswer, token: Token) -> End | None:
        """Tells a client what a token adds. Returns the end of the answer if this is the last one."""
        now = time.perf_counter()
        row.first_token_s = row.first_token_s or now - row.newest_at
        row.said.take(token, now - row.newest_at)
        row.newest_at = now
        statistics = Statistics(row.prompt.counted["prompt"], row.decode, row.said.count, row.first_token_s)
        response = row.said.response(token, statistics)
        row.watch.token(response)
        return row.answer.take(response)

    def _leave(self, row: _ParallelAnswer, item: End | Exception, unfed: int = 1) -> None:
        """Takes an answer out of the batch. unfed: number of its newest tokens that the batch was not fed."""
        at = self.rows.index(row)
        del self.rows[at]
        try:
            with large_memory_given_back():
                fed = row.tokens[: len(row.tokens) - unfed]
                self._loaded.turns.give_back(row.context, self._batch.leave(at), fed)
            self._loaded.model.flash.answered(swap_counters() - row.prompt.swap)
        finally:
            self._finish(row.place, row.job, row.watch, item)

    def _finish(self, place: QueuePlace, job: Job, watch: RequestWatch, item: End | Exception) -> None:
        failed = not isinstance(item, End)
        if isinstance(item, Ended):
            failed, item = not job.left, stopping()
        elif isinstance(item, Exception) and not isinstance(item, ApiError):
            lost, item = self._loaded.is_lost_by(item), why_failed(item, job.id)
            if lost:
                self._places.give_up_model()
        watch.end(failed)  # first, so that a client that has its answer finds it in the totals
        self._running.remove(job)
        job.tell(item)
        self._places.served(place)

    def _check(self, job: Job) -> None:
        if job.left or self._stops():
            raise Ended
