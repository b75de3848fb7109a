"""Server-sent events from the engine's thread to the listeners at /events."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator
from typing import Any

KEEP_ALIVE_S = 15
MOST_HELD = 64  # maximum events held for a listener; a slow one loses the oldest


class EventHub:
    """`publish` may be called from any thread; `listen` is for coroutines."""

    def __init__(self) -> None:
        self._listeners: dict[asyncio.Queue[str | None], asyncio.AbstractEventLoop] = {}
        self._last_state = _event("state", {"state": "idle", "id": None, "done": 0, "total": 0})
        self._closed = False

    @property
    def listening(self) -> bool:
        return bool(self._listeners)

    def publish(self, name: str, data: dict[str, Any]) -> None:
        text = _event(name, data)
        if name == "state":
            self._last_state = text
        self._send(text)

    def close(self) -> None:
        """Ends every listener's stream."""
        self._closed = True
        self._send(None)

    def _send(self, text: str | None) -> None:
        for queue, loop in list(self._listeners.items()):
            with contextlib.suppress(RuntimeError):  # The listener's loop is closed.
                loop.call_soon_threadsafe(_put, queue, text)

    async def listen(self) -> AsyncGenerator[str, None]:
        """Yields the last state, then every event, and a comment if there was none for KEEP_ALIVE_S."""
        queue: asyncio.Queue[str | None] = asyncio.Queue(MOST_HELD)
        self._listeners[queue] = asyncio.get_running_loop()
        try:
            yield self._last_state
            while not self._closed:
                try:
                    async with asyncio.timeout(KEEP_ALIVE_S):  # Python 3.11's wait_for may swallow a cancellation.
                        text = await queue.get()
                except TimeoutError:
                    text = ": still here\n\n"
                if text is None:
                    return
                yield text
        finally:
            del self._listeners[queue]


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data, separators=(',', ':'))}\n\n"


def _put(queue: asyncio.Queue[str | None], text: str | None) -> None:
    if queue.full():
        queue.get_nowait()
    queue.put_nowait(text)
