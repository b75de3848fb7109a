"""Queues a job for a request and answers its client, in one piece or as a stream. A client that leaves ends its job."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from .api_errors import ApiError
from .engine import Engine
from .jobs import End, Item, Job, Piece, Sampling
from .openai_api import Answer
from .streams import EventStream, unless_gone

LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"}  # Some clients split lines at these.
KEEP_ALIVE_S = 15  # An idle stream sends a comment after this time, so that proxies do not close it.


class Waiting:
    """Submits a job and receives its items. Belongs to the event loop."""

    def __init__(self, engine: Engine, **job: Any) -> None:
        self._items: asyncio.Queue[Item] = asyncio.Queue()  # at most one per token
        self._loop = asyncio.get_running_loop()
        self.job = Job(tell=self._tell, **job)
        engine.submit(self.job)

    def _tell(self, item: Item) -> None:
        """Receives an item in the engine's thread."""
        with contextlib.suppress(RuntimeError):  # The loop is closed, so nothing waits for the item.
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def next(self) -> Piece | End | None:
        """The next item; None if there was none for KEEP_ALIVE_S. Raises the error that ended the job."""
        try:
            async with asyncio.timeout(KEEP_ALIVE_S):  # Python 3.11's wait_for may swallow a cancellation.
                item = await self._items.get()
        except TimeoutError:
            return None
        if isinstance(item, Exception):
            raise item
        return item


async def answer(
    request: Request,
    engine: Engine,
    *,
    ids: list[int],
    max_tokens: int,
    sampling: Sampling,
    stop: tuple[str, ...],
    top_logprobs: int | None,
    chat: bool,
    continues: bool,
    stream: bool,
    include_usage: bool,
) -> Response:
    """Queues a job and returns its answer. Raises ApiError, or Gone if the client leaves.

    continues: whether the answer's text continues the prompt's.
    """
    waiting = Waiting(
        engine,
        ids=ids,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
        top_logprobs=top_logprobs,
        continues=continues,
        prefix="chatcmpl" if chat else "cmpl",
    )
    form = Answer(waiting.job, engine.name, chat)
    if stream:
        return _JobStream(waiting, _events(waiting, form, include_usage))
    try:
        return JSONResponse(form.whole(*await unless_gone(request.receive, _collect(waiting))))
    finally:
        waiting.job.leave()


class _JobStream(EventStream):
    def __init__(self, waiting: Waiting, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events)
        self.job = waiting.job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.job.leave()


async def _collect(waiting: Waiting) -> tuple[list[Piece], End]:
    pieces: list[Piece] = []
    while True:
        item = await waiting.next()
        if isinstance(item, End):
            return pieces, item
        if item is not None:
            pieces.append(item)


async def _events(waiting: Waiting, form: Answer, include_usage: bool) -> AsyncGenerator[str, None]:
    try:
        if (beginning := form.begin()) is not None:
            yield _data(beginning)
        while not isinstance(item := await waiting.next(), End):
            yield ": still here\n\n" if item is None else _data(form.piece(item))
        yield _data(form.end(item))
        if include_usage:
            yield _data(form.usage(item))
    except ApiError as error:  # It is too late for an HTTP status.
        yield _data(error.body())
    yield "data: [DONE]\n\n"


def _data(value: dict[str, Any]) -> str:
    text = json.dumps(value, separators=(",", ":"), ensure_ascii=False).translate(LINE_ENDS)
    return f"data: {text}\n\n"
