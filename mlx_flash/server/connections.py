"""Limits on uvicorn's connections: their number, and how long each may be silent, in either direction."""

from __future__ import annotations

import asyncio
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from .api_errors import ApiError

# macOS gives a process 256 descriptors, and the model's files need some of them.
MOST = 128  # number of connections; one more replaces a connection that waits for a request
REQUEST_S = 30.0  # from connecting, or from the last answer, until a request's headers have arrived
READING_S = 60.0  # After this time a client that does not read its answer counts as gone.


class Connection(H11Protocol):
    """One connection, with time limits for its requests and for the reading of its answers."""

    _request_limit: asyncio.TimerHandle | None = None
    _reading_limit: asyncio.TimerHandle | None = None

    @property
    def _latest(self) -> RequestResponseCycle | None:
        """The last request; None before the first."""
        return self.cycle

    @property
    def waiting(self) -> bool:
        """Whether none of its requests is being answered."""
        return self._latest is None or self._latest.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._begin_waiting()
        if len(self.connections) > MOST:
            _make_room(self)

    def connection_lost(self, exc: Exception | None) -> None:
        for limit in (self._request_limit, self._reading_limit):
            if limit is not None:
                limit.cancel()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if not self.waiting and self._request_limit is not None:
            self._request_limit.cancel()

    def on_response_complete(self) -> None:
        self._begin_waiting()
        super().on_response_complete()  # It handles a request that has arrived meanwhile.

    def _begin_waiting(self) -> None:
        if self._request_limit is not None:
            self._request_limit.cancel()
        self._request_limit = self.loop.call_later(REQUEST_S, self._end_waiting)

    def _end_waiting(self) -> None:
        if self._latest is None and self.conn.trailing_data[0]:
            self._refuse(ApiError(408, f"the request did not arrive within {REQUEST_S:g} s."))
        else:
            self.transport.abort()  # close() would wait for a client that does not read.

    # -- clients that do not read ----------------------------------------------------------------------------

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_limit = self.loop.call_later(READING_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._reading_limit is not None:
            self._reading_limit.cancel()

    # -- requests that are not valid HTTP --------------------------------------------------------------------

    def send_400_response(self, msg: str) -> None:
        self._refuse(ApiError(400, "this is not a valid HTTP/1.1 request."))

    def _refuse(self, error: ApiError) -> None:
        """Sends the error, unless an answer has begun, and closes the connection."""
        if (cycle := self._latest) is not None and not cycle.response_complete:
            cycle.disconnected = True  # The application's own answer is not sent.
            cycle.message_event.set()
        if cycle is None or cycle.response_complete or not cycle.response_started:
            body = json.dumps(error.body()).encode()
            headers = {"Content-Type": "application/json", "Content-Length": str(len(body)), "Connection": "close"}
            begin = h11.Response(status_code=error.status, headers=[*headers.items()])
            try:
                for event in (begin, h11.Data(data=body), h11.EndOfMessage()):
                    self.transport.write(self.conn.send(event) or b"")
            except h11.LocalProtocolError:  # An answer is not possible in this state.
                pass
        self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Does nothing: the request is answered without an upgrade."""


def _make_room(newest: Connection) -> None:
    """Closes the connection that has waited longest. If all are in use, Guard refuses the newest one's request."""
    waiting = [
        one
        for one in newest.connections
        if isinstance(one, Connection) and one is not newest and one.waiting and not one.transport.is_closing()
        and one.transport.get_write_buffer_size() == 0
    ]  # fmt: skip
    if waiting:
        oldest = min(waiting, key=lambda one: one._request_limit.when() if one._request_limit else 0)
        oldest.transport.close()
