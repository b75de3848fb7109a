"""Runs one model in one thread, one generation at a time. MLX's arrays belong to the thread that makes them.

There are no batches: each row of a batch needs its own KV cache, and the plan has room for one context. A step would
also read the union of the units that its rows need. That is less per token, but each request waits longer.
"""

from __future__ import annotations

import logging
import os
import queue
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from typing import Any

from ..errors import FlashError, GrammarError, ImageError
from ..source.failures import foreseen
from ..text.images import MOST_WAITING
from ..text.sampling import make_processors, make_sampler
from ..text.template_process import TemplateProcess
from .answer_progress import AnswerInProgress
from .api_errors import ApiError
from .events import EventHub
from .jobs import End, Job, Piece, Progress
from .monitor import Monitor

QUEUE_LIMIT = 64
LOADING = "loading"
READY = "ready"
FAILED = "failed"
STOPPED = "stopped"

log = logging.getLogger(__name__)


class _Ended(Exception):
    """The rest of the answer is not wanted: the client has left, or the server stops."""


class Engine:
    """The queue of jobs and the loop that serves them.

    Call `run` from the thread that should own the model. Everything else may be called from any thread.

    name: the model's name in the API. path: the model's location, for people to read. limit: of the queue, in jobs.
    """

    def __init__(self, name: str, path: str, limit: int = QUEUE_LIMIT) -> None:
        self.name, self.path, self.limit = name, path, limit
        self.state, self.failure = LOADING, ""
        self.hub = EventHub()
        self.model: Any = None
        self.tokenizer: Any = None
        self.format: Any = None  # the tokenizer's AnswerFormat
        self.grammars: Any = None
        self.template_variables: dict[str, Any] = {}  # for the chat template, where a request sets none
        self.thinking_tokens: int | None = None  # most tokens of an answer's thoughts; None: no limit
        self.monitor: Monitor | None = None
        self.templates = TemplateProcess()
        self.job: Job | None = None  # the job that is running
        self.started = time.monotonic()
        self._waiting: deque[Job] = deque()
        self._lock = threading.Lock()
        # A SimpleQueue, because a signal handler may put into it while this thread is inside another of its methods.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stopping = False

    # -- from any thread ------------------------------------------------------------------------------------

    @property
    def ready(self) -> bool:
        return self.state == READY

    def check_ready(self) -> None:
        """Raises ApiError if the model is not ready."""
        if self.state == LOADING:
            raise ApiError(503, "the model is being loaded; try again soon.", code="loading", retry_after_s=2)
        if self.state == FAILED:
            raise ApiError(500, f"the model could not be loaded: {self.failure}", code="load_failed")
        if self.state == STOPPED or self._stopping:
            raise ApiError(503, "the server is stopping.", code="stopping")

    def make_room_for_grammars(self) -> None:
        """Takes the memory of structured answers out of that of the prompt caches. Raises ApiError if that is small."""
        demand = self.model.flash.plan.demand
        needed, planned = demand.grammars, demand.prompt_caches
        if needed > planned:
            raise ApiError(
                400,
                f"structured answers need up to {needed / 1e6:.0f} MB, which this server takes from its prompt caches, "
                f"but they have {planned / 1e6:.0f} MB. Start it with --prompt-cache {-(-needed // 10**6)}MB or more.",
                code="no_memory",
            )
        self._turns.planned_bytes = planned - needed

    def submit(self, job: Job) -> None:
        """Puts a job at the end of the queue. Raises ApiError if it is full, unless the job's request has begun."""
        with self._lock:
            self.check_ready()
            for left in [job for job in self._waiting if job.left]:
                self._waiting.remove(left)
            if len(self._waiting) >= self.limit and not job.begun:
                raise ApiError(
                    429,
                    f"the queue is full: {len(self._waiting)} requests are waiting; try again later.",
                    code="queue_full",
                    retry_after_s=5,
                )
            seeing = sum(waiting.seen is not None for waiting in self._waiting)
            if job.seen is not None and seeing >= MOST_WAITING and not job.begun:
                raise ApiError(
                    429,
                    f"{seeing} requests with images are waiting, the most; try again later.",
                    code="queue_full",
                    retry_after_s=5,
                )
            self._waiting.append(job)
        self._wake.put(None)

    def stop(self) -> None:
        """Ends the running generation within one token, then `run`. Safe in a signal handler."""
        self._stopping = True
        self._wake.put(None)

    @property
    def waiting(self) -> int:
        with self._lock:
            return sum(not job.left for job in self._waiting)

    @property
    def prompt_caches(self) -> Any:
        return self._turns.statistics()

    # -- the model's thread ---------------------------------------------------------------------------------

    def run(self, load: Callable[[], tuple[Any, Any]]) -> None:
        """Loads the model, then serves jobs until `stop`. Raises the errors of `load`."""
        try:
            self.model, self.tokenizer = load()
            from ..text.answer_parts import AnswerFormat
            from ..text.grammar import Grammars
            from ..text.prompt_cache import ReusedPromptCache  # The import of mlx-lm is part of loading.

            self.format = AnswerFormat(self.tokenizer)
            self.grammars = Grammars(self.tokenizer, self.model.flash.vocabulary)
            self._turns = ReusedPromptCache(self.model)
            self.monitor = Monitor(self.model, self.hub)
        except Exception as error:
            self.failure, self.state = foreseen(error) or str(error) or type(error).__name__, FAILED
            raise
        except BaseException:  # such as a signal
            self.state = STOPPED
            raise
        try:
            self.state = READY
            while not self._stopping:
                self._wake.get()
                if (job := self._next()) is not None:
                    self._serve(job)
        finally:
            self._clear_up()

    def _clear_up(self) -> None:
        with self._lock:
            self.state = STOPPED
            waiting, self._waiting = self._waiting, deque()
        for job in waiting:
            job.tell(_stopping())
        self.hub.close()
        self.templates.close()
        self.model.flash.close()

    def _next(self) -> Job | None:
        with self._lock:
            while self._waiting and not self._stopping:
                if not (job := self._waiting.popleft()).left:
                    return job
        return None

    def _serve(self, job: Job) -> None:
        assert self.monitor is not None
        self.job = job
        self.monitor.begin(job)
        failed = True
        try:
            job.tell(self._generate(job))
            failed = False
        except _Ended:
            failed = not job.left
            job.tell(_stopping())
        except GrammarError as error:  # The grammar became too complex in the middle of the answer.
            job.tell(ApiError(400, str(error), code="invalid_grammar"))
        except ImageError as error:
            job.tell(ApiError(400, str(error), code="invalid_image"))
        except FlashError as error:
            job.tell(ApiError(500, str(error), code="read_failed"))
        except Exception as error:
            log.exception("request %s failed", job.id)
            what = foreseen(error) or f"{type(error).__name__}: {error}; the server's log has its traceback."
            job.tell(ApiError(500, f"this request failed: {what}", code="failed"))
        except BaseException:
            job.tell(_stopping())
            raise
        finally:
            self.monitor.end(failed)
            self.job = None

    def _generate(self, job: Job) -> End:
        import mlx.core as mx

        from ..text.detokenizer import Detokenizer
        from .prompt_echo import PromptEcho, chunk_for, text_of

        monitor, turns = self.monitor, self._turns
        assert monitor is not None

        def check() -> None:
            if job.left or self._stopping:
                raise _Ended

        def progress(done: int, total: int) -> None:
            if done < total:
                monitor.prompt(done)
                if 0 < done < total - 1:  # The last token is read with the first of the answer.
                    job.tell(Progress(turns.reused + done, turns.reused + total))
                check()

        check()
        sampling = job.sampling
        # The seed of one request must not affect the text of the next.
        mx.random.seed(sampling.seed if sampling.seed is not None else int.from_bytes(os.urandom(8), "little"))
        answer = AnswerInProgress(job, self.tokenizer, self.format)
        echo: PromptEcho | None = None
        options: dict[str, Any] = {}
        if job.echo and job.top_logprobs is not None:
            echo = PromptEcho(self.tokenizer, job.ids, job.top_logprobs)
            step = chunk_for(self.model.flash.vocabulary, self.model.flash.prefill_tokens)
            options = {"prompt_logits_callback": echo.read, "prefill_step_size": step}
            turns.forget()  # All of the prompt must be read.
        processors = make_processors(sampling, lambda: job.ids[: turns.reused])
        responses = turns.stream_generate(
            self.tokenizer,
            job.ids,
            max(1, job.max_tokens),
            system_tokens=job.system_tokens,
            seen=job.seen,
            fresh=sampling.seed is not None,
            sampler=make_sampler(sampling, self.model.flash.vocabulary),
            logits_processors=[*processors, *answer.processors],
            prompt_progress_callback=progress,
            detokenizer=Detokenizer(self.tokenizer, answer.continues),
            **options,
        )
        monitor.cached = turns.reused
        start, first = time.monotonic(), 0.0
        with closing(responses):
            for response in responses:
                first = first or time.monotonic()
                monitor.token(response)
                if job.echo and response.generation_tokens == 1:
                    text = text_of(self.tokenizer, job.ids)
                    job.tell(Piece(text) if echo is None else echo.piece(text))
                    answer.begin_with(text)
                if job.max_tokens == 0:
                    return End("length", len(job.ids), turns.reused, 0, 0, None, first - start, 0.0)
                for item in answer.take(response):
                    job.tell(item)
                if answer.finish_reason is not None:
                    return End(
                        answer.finish_reason,
                        len(job.ids),
                        turns.reused,
                        response.generation_tokens,
                        answer.thought_tokens,
                        answer.stop_word,
                        first - start,
                        time.monotonic() - first,
                    )
                check()
        raise AssertionError("a generation ends with a reason")


def _stopping() -> ApiError:
    return ApiError(503, "the server is stopping.", code="stopping")
