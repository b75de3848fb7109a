"""Runs models in one thread, one generation at a time. MLX's arrays belong to the thread that makes them.

There are no batches: each row of a batch needs its own KV cache, and the plan has room for one context. A step would
also read the union of the units that its rows need. That is less per token, but each request waits longer.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import Any

from ..errors import FlashError, GrammarError, ImageError
from ..source.failures import foreseen
from ..text.sampling import make_processors, make_sampler
from ..text.template_process import TemplateProcess
from .answer_progress import AnswerInProgress
from .api_errors import ApiError
from .events import EventHub
from .jobs import End, Job, Piece, Progress
from .loaded_model import LoadedModel
from .model_switch import FAILED, LOADING, READY, STOPPED, ModelSwitch, Target, Tell, why_not_loaded
from .places import Load, Places, QueuePlace, Unload

QUEUE_LIMIT = 64

log = logging.getLogger(__name__)


class _Ended(Exception):
    """The rest of the answer is not wanted: the client has left, or the server stops."""


class Engine:
    """The queue of requests and the loop that serves them.

    Call `run` from the thread that should own the models. Everything else may be called from any thread.

    name: the first model's name in the API. path: its location, for people to read. limit: of the queue, in requests.
    """

    def __init__(self, name: str, path: str, limit: int = QUEUE_LIMIT) -> None:
        self.hub = EventHub()
        own = Target(name, path, _no_load)
        self.own_path = path
        self.switch = ModelSwitch(own, self.hub)
        self.places = Places(limit, own)
        self.template_variables: dict[str, Any] = {}  # for the chat template, where a request sets none
        self.thinking_tokens: int | None = None  # most tokens of an answer's thoughts; None: no limit
        self.idle_unload_s: float | None = None  # time without requests after which the model is closed
        self.templates = TemplateProcess()
        self.job: Job | None = None  # the job that is running
        self.started = time.monotonic()
        # A SimpleQueue, because a signal handler may put into it while this thread is inside another of its methods.
        self._wake: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._stopping = False
        self._bounds = (0, False)

    # -- from any thread ------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name of the model that answers requests which name no other one."""
        return self.switch.current.name

    @property
    def path(self) -> str:
        return self.switch.current.path

    @property
    def state(self) -> str:
        return self.switch.state

    @property
    def failure(self) -> str:
        return self.switch.failure

    @property
    def ready(self) -> bool:
        """Whether a model is loaded."""
        return self.state == READY

    @property
    def opened(self) -> bool:
        """Whether the first model was loaded. From then on requests wait for a model that is being loaded."""
        return self.switch.loads > 0

    @property
    def stoppable(self) -> bool:
        """Whether `stop` has an effect soon: not while a model is being loaded."""
        return self.state not in (LOADING, STOPPED)

    # What a request needs of the loaded model. Only a request whose place was called may use it.

    @property
    def model(self) -> Any:
        return self._loaded.model

    @property
    def tokenizer(self) -> Any:
        return self._loaded.tokenizer

    @property
    def format(self) -> Any:
        return self._loaded.format

    @property
    def grammars(self) -> Any:
        return self._loaded.grammars

    @property
    def _loaded(self) -> LoadedModel:
        if (loaded := self.switch.loaded) is None:
            raise ApiError(503, "no model is loaded now; try again.", code="loading", retry_after_s=2)
        return loaded

    @property
    def bounds(self) -> tuple[int, bool]:
        """(tokens of the context, whether images are read) of the loaded model, or of the last one."""
        if (loaded := self.switch.loaded) is not None:
            flash = loaded.model.flash
            self._bounds = flash.plan.context, flash.images is not None
        return self._bounds

    def check_ready(self) -> None:
        """Raises ApiError if the server does not take requests: the first model was not loaded, or the server stops."""
        if self.state == LOADING and not self.opened:
            raise ApiError(503, "the model is being loaded; try again soon.", code="loading", retry_after_s=2)
        if self.state == FAILED and not self.opened:
            raise ApiError(500, f"the model could not be loaded: {self.failure}", code="load_failed")
        if self.state == STOPPED or self._stopping:
            raise _stopping()

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
        self._loaded.turns.planned_bytes = planned - needed

    def take(self, place: QueuePlace, limited: bool = True) -> None:
        """Gives a request its place in the queue. Raises ApiError if it is full, unless it is not `limited`."""
        self.check_ready()
        self.places.take(place, limited)
        self._wake.put(None)

    def fill(self, place: QueuePlace, job: Job, more: bool = False) -> None:
        """Puts the next job of a request into its place. more: whether others follow. Raises ApiError."""
        self.check_ready()
        self.places.fill(place, job, more)
        self._wake.put(None)

    def leave(self, place: QueuePlace) -> None:
        """Gives up a request's place, and what runs for it."""
        self.places.leave(place)
        self._wake.put(None)

    def stop(self) -> None:
        """Ends the running generation within one token, then `run`. Safe in a signal handler."""
        self._stopping = True
        self._wake.put(None)

    @property
    def waiting(self) -> int:
        return self.places.waiting

    # -- the models' thread ---------------------------------------------------------------------------------

    def run(self, load: Callable[[Tell], tuple[Any, Any]]) -> None:
        """Loads the first model, then serves requests until `stop`. Raises the errors of `load`.

        load: returns (model, tokenizer). Its argument receives the progress. It is called again when the model was
        closed and a request needs it.
        """
        own = replace(self.switch.current, load=load)
        self.switch.load(own)
        self.places.set_model(own, loaded=True)
        try:
            while not self._stopping:
                if not self._step():
                    self._wait()
        finally:
            self._clear_up()

    def _clear_up(self) -> None:
        self.switch.state = STOPPED
        self.places.close(_stopping())
        self.hub.close()
        self.templates.close()
        self.switch.close()

    def _step(self) -> bool:
        """Does what the queue asks for next. Returns whether there was something to do."""
        step = self.places.next()
        if isinstance(step, QueuePlace):
            try:
                assert step.serving is not None
                if not step.serving.left:
                    self._serve(step.serving)
            finally:
                self.places.served(step)
        elif isinstance(step, Load):
            self._load(step.target)
        elif isinstance(step, Unload):
            self.switch.unload()
        return step is not None

    def _load(self, target: Target) -> None:
        try:
            self.switch.load(target, self._check_stopping)
        except _Ended:
            return
        except Exception as error:
            self.places.fail(target, why_not_loaded(target.name, error))
        self.places.set_model(self.switch.current, self.switch.loaded is not None)

    def _check_stopping(self) -> None:
        if self._stopping:
            raise _Ended

    def _wait(self) -> None:
        """Waits for a request, or until the model was idle for so long that it is closed."""
        left = None
        if self.idle_unload_s is not None and self.switch.loaded is not None and self.places.empty:
            left = self.places.quiet_since + self.idle_unload_s - time.monotonic()
            if left <= 0:
                if self.places.retire():
                    self.switch.unload()
                return
        with contextlib.suppress(queue.Empty):
            self._wake.get(timeout=left)

    def _serve(self, job: Job) -> None:
        monitor = self._loaded.monitor
        assert monitor is not None
        self.job = job
        monitor.begin(job)
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
            monitor.end(failed)
            self.job = None

    def _generate(self, job: Job) -> End:
        import mlx.core as mx

        from ..text.detokenizer import Detokenizer
        from .prompt_echo import PromptEcho, chunk_for, text_of

        monitor, turns = self._loaded.monitor, self._loaded.turns
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
            options = {"prompt_logits_callback": echo.read, "prefill_step_size": step}  # so all of it is read
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


def _no_load(_tell: Tell) -> tuple[Any, Any]:
    raise AssertionError("`run` sets how the first model is loaded")
