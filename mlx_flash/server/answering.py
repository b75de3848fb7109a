"""Queues jobs for a request and answers its client, in one piece or as a stream. A client that leaves ends them."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .api_errors import ApiError
from .apis.answer_form import Answered, AnswerForm
from .engine import Engine
from .jobs import End, Item, Job, Progress
from .streams import EventStream, unless_gone

KEEP_ALIVE_S = 15  # An idle stream sends a comment after this time, so that proxies do not close it.


class Waiting:
    """Submits a job and receives its items. Belongs to the event loop."""

    def __init__(self, engine: Engine, **job: Any) -> None:
        self._items: asyncio.Queue[Item] = asyncio.Queue()  # a few per token at most
        self._loop = asyncio.get_running_loop()
        self.job = Job(tell=self._tell, **job)
        engine.submit(self.job)

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

    def __init__(self, engine: Engine, jobs: list[dict[str, Any]], form: AnswerForm) -> None:
        """Submits the first job. Raises ApiError."""
        self.engine, self.form = engine, form
        self._jobs = jobs
        form.prompt_tokens = len(jobs[0]["ids"])
        self.waiting = self._submit(0)

    def _submit(self, index: int) -> Waiting:
        number = f"-{index}" if index else ""
        return Waiting(self.engine, begun=index > 0, id=self.form.id + number, **self._jobs[index])

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


async def answer(
    request: Request, engine: Engine, jobs: list[dict[str, Any]], form: AnswerForm, stream: bool
) -> Response:
    """Queues the jobs and returns their answer. Raises ApiError, or Gone if the client leaves."""
    if not jobs:
        return JSONResponse(form.whole([]))
    answering = Answering(engine, jobs, form)
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
