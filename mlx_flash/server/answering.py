"""A job in the engine's queue and the client that waits for it: whole answers, streams, and clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse

from .engine import Engine
from .errors import ApiError
from .jobs import End, Item, Job, Piece, Sampling
from .openai_api import Answer

KEEP_ALIVE_S = 15  # a comment now and then in a stream that has nothing to say, so that no proxy gives up
EVENT_STREAM = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


class Waiting:
    """A job, submitted; its items come out as they are made. Belongs to the event loop."""

    def __init__(self, engine: Engine, **job: Any) -> None:
        self._items: asyncio.Queue[Item] = asyncio.Queue()  # not more of them than tokens
        self._loop = asyncio.get_running_loop()
        self.job = Job(tell=self._tell, **job)
        engine.submit(self.job)

    def _tell(self, item: Item) -> None:
        """In the engine's thread."""
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._items.put_nowait, item)

    async def next(self) -> Piece | End | None:
        """The next item, None if there was none for KEEP_ALIVE_S. Raises what ended the job."""
        try:
            item = await asyncio.wait_for(self._items.get(), KEEP_ALIVE_S)
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
    stream: bool,
    include_usage: bool,
) -> Response:
    """Queues the job. Raises ApiError."""
    waiting = Waiting(
        engine,
        ids=ids,
        max_tokens=max_tokens,
        sampling=sampling,
        stop=stop,
        top_logprobs=top_logprobs,
        prefix="chatcmpl" if chat else "cmpl",
    )
    form = Answer(waiting.job, engine.name, chat)
    if stream:
        events = _events(waiting, form, include_usage)
        return StreamingResponse(events, media_type="text/event-stream", headers=EVENT_STREAM)
    return await _whole(request, waiting, form)


async def _whole(request: Request, waiting: Waiting, form: Answer) -> Response:
    gone = asyncio.ensure_future(_gone(request))
    collecting = asyncio.ensure_future(_collect(waiting))
    try:
        await asyncio.wait((gone, collecting), return_when=asyncio.FIRST_COMPLETED)
        if not collecting.done():
            return Response(status_code=499)  # nobody reads it
        return JSONResponse(form.whole(*collecting.result()))
    finally:
        waiting.job.leave()
        gone.cancel()
        collecting.cancel()


async def _gone(request: Request) -> None:
    """Returns when the client has closed its connection; the body has been read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _collect(waiting: Waiting) -> tuple[list[Piece], End]:
    pieces: list[Piece] = []
    while True:
        item = await waiting.next()
        if isinstance(item, End):
            return pieces, item
        if item is not None:
            pieces.append(item)


async def _events(waiting: Waiting, form: Answer, include_usage: bool) -> AsyncIterator[str]:
    """Starlette closes this when the client goes away."""
    try:
        if (beginning := form.begin()) is not None:
            yield _data(beginning)
        while True:
            item = await waiting.next()
            if item is None:
                yield ": still here\n\n"
            elif isinstance(item, Piece):
                yield _data(form.piece(item))
            else:
                yield _data(form.end(item))
                if include_usage:
                    yield _data(form.usage(item))
                break
    except ApiError as error:  # too late for a status
        yield _data(error.body())
    finally:
        waiting.job.leave()
    yield "data: [DONE]\n\n"


def _data(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'), ensure_ascii=False)}\n\n"
