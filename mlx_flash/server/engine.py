"""Runs models in one thread. MLX's arrays belong to the thread that makes them.

One answer is generated at a time, unless the plan has KV caches for several: parallel_answers.py then runs them.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ..errors import FlashError
from ..flash.swap import swap_counters
from ..text.template_process import TemplateProcess
from .api_errors import ApiError, stopping, why_failed
from .events import EventHub
from .jobs import End, Ended, Job, Progress
from .loaded_model import LoadedModel
from .model_switch import FAILED, LOADING, READY, STOPPED, ModelSwitch, Target, Tell, why_not_loaded
from .places import Load, Places, QueuePlace, Unload

if TYPE_CHECKING:
    from .monitor import RequestWatch
    from .parallel_answers import ParallelAnswers

QUEUE_LIMIT = 64
TELLING_S = 1.0  # for the requests of a server that ends
SENDING_S = 0.5  # for their answers to leave
IDLE_CHECK_S = 2.0  # between two looks at the system's memory while nothing is asked


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
        self.running: list[Job] = []
        self._parallel = 1
        self.started = time.monotonic()
        self.swap_at_start = swap_counters()
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
    def parallel(self) -> int:
        """The number of answers at once of the loaded model, or of the last one."""
        if (loaded := self.switch.loaded) is not None:
            self._parallel = loaded.model.flash.plan.demand.parallel
        return self._parallel

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
            raise stopping()

    def make_room_for_grammars(self) -> None:
        """Takes the memory of structured answers out of that of the prompt caches. Raises ApiError if that is small."""
        demand = self.model.flash.plan.demand
        needed, planned = demand.grammars, demand.prompt_caches
        if needed > planned and self.model.flash.one_conversation:
            raise ApiError(
                400,
                "a dense model over several ranks has no prompt caches, from which structured answers take their "
                "memory. Run it on one machine, or ask without a schema.",
                code="no_memory",
            )
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

    def abandon(self, sentence: str) -> None:
        """Ends every request with an error, while the models' thread may hang; the process has to end after it."""

        def tell() -> None:
            error = ApiError(503, sentence, code="lost_rank")
            for job in list(self.running):
                job.tell(error)
            self.places.close(error)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(TELLING_S)
        time.sleep(SENDING_S)

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
            if self._answers is not None:
                self._answers.step()  # Now all of them end.
        finally:
            if self._answers is not None:
                self._answers.end(stopping())
            self._clear_up()

    def _clear_up(self) -> None:
        self.switch.state = STOPPED
        self.places.close(stopping())
        self.hub.close()
        self.templates.close()
        self.switch.close()

    def _step(self) -> bool:
        """Does what the queue asks for next. Returns whether there was something to do."""
        answers = self._answers
        step = None if answers is not None and answers.full else self.places.next()
        if isinstance(step, QueuePlace) and answers is not None:
            answers.begin(step)
        elif isinstance(step, QueuePlace):
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
        elif answers is not None and answers.rows:
            answers.step()
            return True
        return step is not None

    @property
    def _answers(self) -> ParallelAnswers | None:
        """Those of the loaded model; None if it gives one answer at a time."""
        if (loaded := self.switch.loaded) is None or loaded.model.flash.plan.demand.parallel == 1:
            return None
        if loaded.answers is None:
            from .parallel_answers import ParallelAnswers

            loaded.answers = ParallelAnswers(loaded, self.running, self.places, lambda: self._stopping)
        return loaded.answers

    def _load(self, target: Target) -> None:
        try:
            self.switch.load(target, self._check_stopping)
        except Ended:
            return
        except Exception as error:
            self.places.fail(target, why_not_loaded(target.name, error))
        self.places.set_model(self.switch.current, self.switch.loaded is not None)

    def _check_stopping(self) -> None:
        if self._stopping:
            raise Ended

    def _wait(self) -> None:
        """Waits for a request, or until the model was idle for so long that it is closed.

        Meanwhile the model gives slots back if other programs need the memory.
        """
        left = None
        if self.switch.loaded is not None:
            left = IDLE_CHECK_S
            flash = self.switch.loaded.model.flash
            with flash.lock, contextlib.suppress(FlashError):  # A disk that fails is the next request's to report.
                flash.keeper.check()
        if self.idle_unload_s is not None and self.switch.loaded is not None and self.places.empty:
            unload_in = self.places.quiet_since + self.idle_unload_s - time.monotonic()
            left = min(IDLE_CHECK_S, unload_in)
            if unload_in <= 0:
                if self.places.retire():
                    self.switch.unload()
                return
        with contextlib.suppress(queue.Empty):
            self._wake.get(timeout=left)

    def _serve(self, job: Job) -> None:
        monitor = self._loaded.monitor
        assert monitor is not None
        self.running.append(job)
        watch = monitor.begin(job)
        failed = True
        last: End | ApiError = stopping()
        try:
            last = self._generate(job, watch)
            failed = False
        except Ended:
            failed = not job.left
        except Exception as error:
            last = why_failed(error, job.id)
            if self._loaded.is_lost_by(error):
                self.places.give_up_model()
        finally:
            watch.end(failed)  # first, so that a client that has its answer finds it in the totals
            self.running.remove(job)
            job.tell(last)

    def _generate(self, job: Job, watch: RequestWatch) -> End:
        import mlx.core as mx

        from .running_answer import RunningAnswer

        turns = self._loaded.turns

        def check() -> None:
            if job.left or self._stopping:
                raise Ended

        def progress(done: int, total: int) -> None:
            if done < total:
                watch.prompt(done)
                if 0 < done < total - 1:  # The last token is read with the first of the answer.
                    job.tell(Progress(turns.reused + done, turns.reused + total))
                check()

        check()
        answer = RunningAnswer(job, self._loaded)
        mx.random.seed(answer.seed)
        responses = turns.stream_generate(
            self.tokenizer,
            job.ids,
            max(1, job.max_tokens),
            system_tokens=job.system_tokens,
            seen=job.seen,
            fresh=job.sampling.seed is not None,
            sampler=answer.sampler,
            logits_processors=answer.processors,
            prompt_progress_callback=progress,
            detokenizer=answer.detokenizer,
            **answer.reading,
        )
        watch.cached = answer.reused = turns.reused
        answer.start()
        with closing(responses):
            for response in responses:
                watch.token(response)
                if (end := answer.take(response)) is not None:
                    return end
                check()
        raise AssertionError("a generation ends with a reason")


def _no_load(_tell: Tell) -> tuple[Any, Any]:
    raise AssertionError("`run` sets how the first model is loaded")
