"""The queue: every request has a place from its arrival on, and models are loaded and jobs served in that order.

A request is encoded by the tokenizer of the model that answers it. So it takes its place first. Its place is *called*
once that model is loaded and stays so until all requests before it have been served; then the request is encoded, and
its jobs fill the place, one after the other.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..text.images import MOST_WAITING
from .api_errors import ApiError
from .jobs import Job

if TYPE_CHECKING:
    from .model_switch import Target

Called = Callable[[ApiError | None], None]


def nobody(_error: ApiError | None) -> None:
    """The `called` of a place behind which no request waits."""


@dataclass(eq=False)
class QueuePlace:
    """A place in the queue.

    target: the model that must be loaded; None for the one that is loaded then. unload: asks for no model instead.
    called: called once, in any thread: with None when the model is loaded, or with the error that ends the wait.
    errand: whether the place asks for nothing but that a model is loaded, or unloaded.
    """

    target: Target | None
    called: Called = nobody
    errand: bool = False
    unload: bool = False
    was_called: bool = False
    job: Job | None = None  # the next one, which waits
    serving: Job | None = None  # the one that runs
    more: bool = False  # whether further jobs of the same request follow
    gone: bool = False

    def call(self, error: ApiError | None = None) -> None:
        if not self.was_called:
            self.was_called = True
            self.called(error)


@dataclass(frozen=True)
class Load:
    """The next step is to load this model: the first place asks for it."""

    target: Target


@dataclass(frozen=True)
class Unload:
    """The next step is to close the model: the first place asked for it."""


class Places:
    """The places in their order. Any thread may use it.

    limit: of requests that wait. `current` is the model that a request means which names no other one, and `loaded`
    says whether that model is loaded.
    """

    def __init__(self, limit: int, current: Target) -> None:
        self.limit = limit
        self.current, self.loaded = current, False
        self.quiet_since = time.monotonic()  # when the last request left
        self._places: list[QueuePlace] = []
        self._closed: ApiError | None = None
        self._lock = threading.Lock()

    def take(self, place: QueuePlace, limited: bool = True) -> None:
        """Puts a place at the end. Raises ApiError if the queue is full, unless it is not `limited`."""
        with self._lock:
            if self._closed is not None:
                raise self._closed
            waiting = self._waiting()
            if limited and waiting >= self.limit:
                message = f"the queue is full: {waiting} requests are waiting; try again later."
                raise ApiError(429, message, code="queue_full", retry_after_s=5)
            if place.errand:  # A later choice replaces the earlier ones that still wait.
                self._places = [each for each in self._places if not each.errand]
            self._places.append(place)
            self._call()

    def fill(self, place: QueuePlace, job: Job, more: bool = False) -> None:
        """Puts the next job into a place that was called. Raises ApiError if too many images wait."""
        with self._lock:
            if self._closed is not None:
                raise self._closed
            seeing = sum(each.job is not None and each.job.seen is not None for each in self._places)
            if job.seen is not None and seeing >= MOST_WAITING and not job.begun:
                message = f"{seeing} requests with images are waiting, the most; try again later."
                raise ApiError(429, message, code="queue_full", retry_after_s=5)
            if not place.gone:
                place.job, place.more = job, more

    def leave(self, place: QueuePlace) -> None:
        """Gives a place up. A job that runs ends within one token."""
        with self._lock:
            place.gone, place.more, place.job = True, False, None
            if place.serving is not None:
                place.serving.leave()
            else:
                self._remove(place)

    def served(self, place: QueuePlace) -> None:
        """Ends the job that `next` returned. A place with more jobs moves behind those of the same model."""
        with self._lock:
            place.serving = None
            if (place.more or place.job is not None) and place in self._places:
                behind = len(self._same())
                self._places.remove(place)
                self._places.insert(behind - 1, place)
            else:
                self._remove(place)

    def next(self) -> QueuePlace | Load | Unload | None:
        """What the engine is to do: run the job of a place, load or close a model, or wait (None)."""
        with self._lock:
            for place in self._same():
                if place.errand:  # its model is loaded
                    self._remove(place)
                elif place.job is not None and place.serving is None:
                    place.serving, place.job = place.job, None
                    return place
            if not self._places or self._same():
                return None
            self.loaded = False  # From here on, no place is called.
            first = self._places[0]
            if first.unload:
                self._remove(first)
                return Unload()
            return Load(first.target or self.current)

    def retire(self) -> bool:
        """Whether the queue is empty. If so, no place is called until `set_model`."""
        with self._lock:
            if self._places:
                return False
            self.loaded = False
            return True

    def give_up_model(self) -> None:
        """Orders that the model is closed behind the places that were called, unless another order waits already.

        The next request then loads it again.
        """
        with self._lock:
            if self._closed is None and not any(place.errand for place in self._places):
                self._places.insert(len(self._same()), QueuePlace(None, errand=True, unload=True))

    def set_model(self, current: Target, loaded: bool) -> None:
        """Says which model is loaded, or is to be loaded next, and calls the places that waited for it."""
        with self._lock:
            self.current, self.loaded = current, loaded
            self.quiet_since = time.monotonic()
            self._call()

    def fail(self, target: Target, error: ApiError) -> None:
        """Ends the wait of the first places, as far as they ask for a model that could not be loaded."""
        with self._lock:
            while self._places and (first := self._places[0]).target in (target, None) and not first.unload:
                if first.target is None and target != self.current:
                    break  # another model answers it
                self._remove(first)
                first.call(error)

    def close(self, error: ApiError) -> None:
        """Ends every wait."""
        with self._lock:
            places, self._places, self._closed = self._places, [], error
            for place in places:
                place.call(error)
                if place.job is not None:
                    place.job.tell(error)

    @property
    def waiting(self) -> int:
        with self._lock:
            return self._waiting()

    @property
    def empty(self) -> bool:
        with self._lock:
            return not self._places

    @property
    def coming(self) -> Target | None:
        """The next model that is to be loaded; None if the queue asks for no other one."""
        with self._lock:
            behind = len(self._same())
            if behind == len(self._places) or self._places[behind].unload:
                return None
            return self._places[behind].target or self.current

    def _waiting(self) -> int:
        return sum(place.serving is None and not place.errand for place in self._places)

    def _remove(self, place: QueuePlace) -> None:
        if place in self._places:
            self._places.remove(place)
            self._call()
        self.quiet_since = time.monotonic()

    def _same(self) -> list[QueuePlace]:
        """The first places, as far as the loaded model serves them."""
        found: list[QueuePlace] = []
        for place in self._places if self.loaded else ():
            if place.unload or place.target not in (None, self.current):
                break
            found.append(place)
        return found

    def _call(self) -> None:
        for place in self._same():
            place.call()
