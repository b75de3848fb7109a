"""Queues jobs for a request and answers its client, in one piece or as a stream. A client that leaves ends them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .api_errors import ApiError
from .apis.answer_form import Answered, AnswerForm
from .engine import Engine
from .jobs import End, Item, Job, Progress
from .model_switch import Target
from .places import QueuePlace
from .streams import EventStream, unless_gone

KEEP_ALIVE_S = 15  # An idle stream sends a comment after this time, so that proxies do not close it.


class RequestTurn:
    """A request's place in the queue, and the wait until the model is loaded that answers it. For coroutines.

    Leaving the `with` block gives the place up, unless a job was submitted.
    """

    def __init__(self, engine: Engine, target: Target | None = None, limited: bool = True) -> None:
        """target: the model that is named; None for the loaded one. Raises ApiError."""
        self.engine = engine
        self._loop = asyncio.get_running_loop()
        self._coming = asyncio.Event()
        self._error: ApiError | None = None
        self._used = False
        self.place = QueuePlace(target, self._call)
        engine.take(self.place, limited)

    @property
    def has_come(self) -> bool:
        """Whether the model is loaded, and stays so until the place is given up."""
        return self.place.was_called and self._error is None

    def _call(self, error: ApiError | None) -> None:
        self._error = error
        with contextlib.suppress(RuntimeError):  # The loop is closed, so nothing waits for it.
            self._loop.call_soon_threadsafe(self._coming.set)

    async def come(self, most_s: float | None = None) -> bool:
        """Waits until the turn has come, for at most `most_s`. Raises the ApiError that ends the wait."""
        if not self.place.was_called:
            try:
                async with asyncio.timeout(most_s):
                    await self._coming.wait()
            except TimeoutError:
                return False
        if self._error is not None:
            raise self._error
        return True

    def submit(self, job: Job, more: bool = False) -> None:
        """Puts the next job into the place. more: whether others follow. Raises ApiError."""
        self.engine.fill(self.place, job, more)
        self._used = True

    def leave(self) -> None:
        self.engine.leave(self.place)

    def __enter__(self) -> RequestTurn:
        return self

    def __exit__(self, *_: object) -> None:
        if not self._used:
            self.leave()


class Waiting:
    """Submits a job and receives its items. Belongs to the event loop."""

    def __init__(self, submit: Callable[[Job], None], **job: Any) -> None:
        self._items: asyncio.Queue[Item] = asyncio.Queue()  # a few per token at most
        self._loop = asyncio.get_running_loop()
        self.job = Job(tell=self._tell, **job)
        submit(self.job)

    def _tell(self, item: Item) -> None:
        """Receives an item in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # The loop is closed, so nothing waits for the item.
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def next(self) -> Any:
        """The next item; None if there was none for KEEP_ALIVE_S. Raises the error that ended the job."""
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):  # Python 3.11's wait_for may swallow a cancellation.
                item = await self._items.get()
        except TimeoutError:
            return None
        if isinstance(item, Exception):
            raise item
        return item


class Answering:
    """The jobs of one request, one after the other."""

    def __init__(self, turn: RequestTurn, jobs: list[dict[str, Any]], form: AnswerForm) -> None:
        """Submits the first job. Raises ApiError."""
        self.turn, self.form = turn, form
        self._jobs = jobs
        form.prompt_tokens = len(jobs[0]["ids"])
        self.waiting = self._submit(0)

    def _submit(self, index: int) -> Waiting:
        number = f"-{index}" if index else ""
        submit = partial(self.turn.submit, more=index + 1 < len(self._jobs))
        return Waiting(submit, begun=index > 0, id=self.form.id + number, **self._jobs[index])

    async def choices(self) -> AsyncGenerator[tuple[int, Any], None]:
        """Yields (number of the choice, item). The item is None if there was nothing for a while."""
        for index in range(len(self._jobs)):
            if index:
                self.waiting = self._submit(index)
            item = None
            while not isinstance(item, End):
                item = await self.waiting.next()
                yield index, item

    def leave(self) -> None:
        self.waiting.job.leave()
        self.turn.leave()

    async def collect(self) -> dict[str, Any]:
        """The whole answer. Raises ApiError."""
        answers: list[Answered] = []
        items: list[Any] = []
        async for _, item in self.choices():
            if isinstance(item, End):
                answers.append(Answered(items, item))
                items = []
            elif item is not None and not isinstance(item, Progress):
                items.append(item)
        return self.form.whole(answers)

    async def events(self) -> AsyncGenerator[str, None]:
        form = self.form
        try:
            yield form.begin()
            async for index, item in self.choices():
                if item is None or isinstance(item, Progress):
                    yield form.waiting(item)
                elif isinstance(item, End):
                    yield form.end(index, item)
                else:
                    yield form.item(index, item)
            yield form.finish()
        except ApiError as error:  # It is too late for an HTTP status.
            yield form.failed(error)


# The jobs of a request, and the form of its answer; called when the request's turn has come.
Prepare = Callable[[], Awaitable[tuple[list[dict[str, Any]], AnswerForm]]]


async def answer(request: Request, answering: Answering, stream: bool) -> Response:
    """The answer of jobs that are queued. Raises ApiError, or Gone if the client leaves."""
    if stream:
        return _JobStream(answering)
    try:
        return JSONResponse(await unless_gone(request.receive, answering.collect()))
    finally:
        answering.leave()


class _JobStream(EventStream):
    def __init__(self, answering: Answering) -> None:
        self.media_type = answering.form.media_type
        super().__init__(answering.events())
        self.answering = answering

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.answering.leave()


class LateStream(EventStream):
    """The stream of a request whose model is still to be loaded. It begins at once, and waits for that."""

    def __init__(self, turn: RequestTurn, prepare: Prepare, form: AnswerForm, held: contextlib.AsyncExitStack) -> None:
        """form: for what is sent before the turn has come. held: closed when the request was prepared."""
        self.media_type = form.media_type
        super().__init__(self._answer(turn, prepare, form, held))
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._held.aclose()  # The client may have left before the first event.

    @staticmethod
    async def _answer(
        turn: RequestTurn, prepare: Prepare, form: AnswerForm, held: contextlib.AsyncExitStack
    ) -> AsyncGenerator[str, None]:
        try:
            yield form.loading()
            async with held:
                while not await turn.come(KEEP_ALIVE_S):
                    yield form.loading()
                jobs, form = await prepare()
                answering = Answering(turn, jobs, form) if jobs else None
        except ApiError as error:
            yield form.failed(error)
            return
        if answering is None:
            yield form.only_loaded()
            return
        try:
            async for event in answering.events():
                yield event
        finally:
            answering.leave()
